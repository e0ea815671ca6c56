"""Crash-safe store of a search in an Optuna study.

A finished trial is written in one transaction, so partial trials do not exist and a crash needs no
clean-up. The configuration is a user attribute of the study; a search cannot resume with another
one. Several processes may share a study: see `StudyStore.claim`.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial
from sqlalchemy.engine import Engine

from rankNAS.allocation import Allocation
from rankNAS.exceptions import StudyError
from rankNAS.io.formats import FORMAT, current_format, format_of
from rankNAS.objectives.base import Direction
from rankNAS.storage.backends import open_storage, storage_name
from rankNAS.storage.claims import LEASE, Claim, Owner, keep_alive
from rankNAS.storage.configuration import canonical, differences
from rankNAS.storage.locks import study_lock
from rankNAS.storage.retries import format_error, retrying
from rankNAS.storage.trial_format import TrialFormat
from rankNAS.storage.writing import TrialWriter
from rankNAS.strategies.history import History, Trial

__all__ = ["Claim", "StudyStore", "has_trials", "study_names"]

logger = logging.getLogger(__name__)
CONFIGURATION, CHOICES = "ranknas:configuration", "ranknas:choices"
STUDY_FORMAT = f"ranknas:{FORMAT}"
LOOK = 1.0  # seconds
T = TypeVar("T")


class StudyStore:
    """An open study.

    Call `close` at the end, or use a ``with`` statement, to release its claims at once.

    Args:
        study: The Optuna study.
        storage: The study's storage.
        choices: The choices of each layer as labels, which define the parameters' distributions.

    Attributes:
        study: The Optuna study.
        choices: The choices of each layer as labels.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: optuna.storages.BaseStorage,
        choices: Mapping[str, Sequence[str]],
    ) -> None:
        self.study = study
        self.choices = choices
        self._storage = storage
        self._place = storage_name(storage)
        self._id = storage.get_study_id_from_name(study.study_name)
        self._owner = Owner(choices)
        self._one_thread = threading.RLock()
        self._ended: threading.Event | None = None
        written = study.user_attrs.get(STUDY_FORMAT)
        where = f"study {study.study_name!r} in {storage_name(storage)}"
        self._format = TrialFormat(choices, format_of("study", written, where))
        self._writer = TrialWriter(storage, self._id, self._format.distributions)
        self._history = History()
        self._read = 0  # number of trials of the Optuna study read so far
        self._open: set[int] = set()  # those not finished when read
        self._counts: Counter[str] = Counter()  # trials by budget, without probes
        self._mine: dict[str, Trial] = {}  # by token
        self._since: dict[Allocation, int] = {}  # claims: number of trials when granted
        self._own: tuple[Claim, ...] = ()
        self._others: tuple[Claim, ...] = ()
        self._looked = 0.0  # time of the last look at other claims
        self._expires = 0.0  # when the lease on the claims ends

    @classmethod
    def open(
        cls,
        storage: str | optuna.storages.BaseStorage | None,
        name: str,
        *,
        configuration: Mapping[str, Any],
        choices: Mapping[str, Sequence[str]],
        directions: Sequence[Direction],
        resume: bool,
    ) -> StudyStore:
        """Open or create a study.

        Args:
            storage: As for `rankNAS.storage.backends.open_storage`; None keeps the study in
                memory.
            name: The study's name in the storage.
            configuration: Settings that must not change between sessions: JSON values and
                dataclasses.
            choices: Labels of each layer's choices. A resumed study keeps its original ones.
            directions: Directions of the objectives.
            resume: Whether to continue an existing study.

        Raises:
            StudyError: The storage cannot be read, the study exists and `resume` is false, or it
                was created with another configuration.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        opened = open_storage(storage)
        try:
            # If two processes start a study at the same time, the second one resumes it.
            with study_lock(opened, name):
                study = optuna.create_study(
                    storage=opened,
                    study_name=name,
                    directions=list(directions),
                    load_if_exists=True,
                )
                attributes = study.user_attrs
                if CONFIGURATION not in attributes:
                    if study.get_trials(deepcopy=False):
                        raise StudyError(f"study {name!r} exists and was not made by RankNAS.")
                    # Configuration last: a study without it was killed at its start; start anew.
                    study.set_user_attr(CHOICES, {k: list(v) for k, v in choices.items()})
                    study.set_user_attr(STUDY_FORMAT, current_format("study"))
                    study.set_user_attr(CONFIGURATION, canonical(configuration))
                    return cls(study, opened, choices)
                size = len(study.get_trials(deepcopy=False))
        except Exception as error:
            raise format_error(error, storage_name(opened)) from None
        if not resume:
            raise StudyError(
                f"study {name!r} exists already, with {size} trials: add --resume to go on with "
                "it, or give another --study name."
            )
        _check_format(name, attributes.get(STUDY_FORMAT), storage_name(opened))
        _check_configuration(name, attributes[CONFIGURATION], configuration)
        return cls(study, opened, attributes[CHOICES])

    def history(self) -> History:
        """All finished trials, oldest first, including those of other processes.

        Trials that RankNAS did not write are excluded.

        Raises:
            StudyError: The storage does not respond, or a trial is damaged.
        """
        with self._one_thread:
            self._retrying(self._refresh)
            return self._history

    def known(self) -> History:
        """Cached trials as of the last read or write; the storage is not accessed."""
        return self._history

    def add(self, trial: Trial, objectives: Sequence[str]) -> Trial | None:
        """Write a finished trial exactly once, in one transaction, despite storage outages.

        Args:
            trial: The trial; its number is ignored.
            objectives: Names of the objectives, in the order of the values.

        Returns:
            The trial with its number in the study. None, with nothing written, if another process
            recorded the allocation while this one held a claim to it, as after a suspension.

        Raises:
            StudyError: The storage does not respond.
        """
        token = f"{self._owner.name}:{uuid.uuid4().hex}"
        frozen = self._format.finished(trial, token)
        attempts = 0

        def write() -> Trial | None:
            nonlocal attempts
            attempts += 1
            with study_lock(self._storage, self.study.study_name):
                if attempts > 1:
                    self._settle()
                # Read time grows with the trials; a leased allocation cannot have changed.
                if attempts > 1 or not self._leased(trial.allocation):
                    self._refresh()
                if token in self._mine:  # the connection broke after the write
                    return self._mine.pop(token)
                if self._overtaken(trial.allocation):
                    return None
                frozen.number = self._writer.write(frozen)
                self._take_in(frozen)
                return self._mine.pop(token)

        with self._one_thread:
            written = self._retrying(write)
            self._since.pop(trial.allocation, None)
        if written is None:
            logger.warning("a trial was recorded by another process meanwhile; ours is dropped")
        return written

    def claim(
        self,
        wanted: Sequence[Claim],
        running: Sequence[Claim] = (),
        most: Mapping[str, int] | int = 0,
    ) -> list[Claim]:
        """Claim allocations that no other process evaluates.

        Granted and running claims are held until the next call omits them, or until release. A
        thread renews their lease. Claims of a killed process expire after a minute, or at once if
        the process ran on this computer.

        Args:
            wanted: Allocations to evaluate next, in order of preference.
            running: Evaluations of this process in progress; their claims are kept, all others
                released.
            most: Total number of trials of each budget, over all processes and without probes; one
                number for all budgets, or a number by budget.

        Returns:
            Claims of `wanted` that are neither finished nor claimed, within the limits of `most`.

        Raises:
            StudyError: The storage does not respond.
        """

        def ask() -> list[Claim]:
            with study_lock(self._storage, self.study.study_name):
                self._refresh()
                attributes = self._attributes()
                self._look(attributes)
                granted = self._grant(wanted, running, most)
                self._publish((*running, *granted), attributes)
            return granted

        with self._one_thread:
            granted = self._retrying(ask)
            for claim in granted:
                self._since[claim.allocation] = len(self._history.trials)
            return granted

    def interrupt(self, claims: Sequence[Claim]) -> None:
        """Record interrupted evaluations, for information only, and release their claims.

        They are not part of the history: a resumed search evaluates them again. If the storage
        does not respond, nothing is written.
        """
        with self._one_thread:
            try:
                for claim in claims:
                    self.study.add_trial(self._format.broken_off(claim))
                self._hold(())
            except Exception as error:  # an interrupt must not wait
                logger.debug("not recorded: %s", format_error(error, self._place))

    def release(self, claims: Sequence[Claim]) -> None:
        """Release claims, so that other processes can take them.

        Raises:
            StudyError: The storage does not respond.
        """
        with self._one_thread:
            left = tuple(c for c in self._own if c not in claims)
            if left != self._own:
                self._retrying(lambda: self._hold(left))

    def others(self) -> tuple[Claim, ...]:
        """Claims of other processes, at most about one second old.

        Raises:
            StudyError: The storage does not respond.
        """
        with self._one_thread:
            # `claim` sees new claims; claims that end, even by a kill, must be seen here.
            if self._others and time.monotonic() - self._looked > LOOK:
                self._retrying(lambda: self._look(self._attributes()))
            return tuple(c for c in self._others if not self._is_done(c))

    def close(self) -> None:
        """Release all claims, if the storage responds; the store remains usable."""
        with self._one_thread:
            if self._ended is not None:
                self._ended.set()
                self._ended = None
            if self._own:
                try:
                    self._hold(())
                except Exception as error:  # they expire; an exit must not wait for the storage
                    logger.debug("claims were not given up: %s", format_error(error, self._place))

    def __enter__(self) -> StudyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _retrying(self, action: Callable[[], T]) -> T:
        return retrying(action, self._place)

    def _attributes(self) -> Mapping[str, Any]:
        # Read-only, without the study's deep copy of all choices.
        return self._storage.get_study_user_attrs(self._id)

    # ------------------------------------------------------------------------------ reading

    def _refresh(self) -> None:
        """Read new trials, and those not finished at the last read."""
        # The time to list all trials grows with their number.
        fresh = list(self._news()) if self._read else self.study.get_trials(deepcopy=False)
        late = [f for n in sorted(self._open) if (f := self._numbered(n)).state.is_finished()]
        new = [self._trial(f) for f in fresh if f.state.is_finished()]
        found = [t for f in late if (t := self._trial(f)) is not None]
        self._open.update(f.number for f in fresh if not f.state.is_finished())
        self._open.difference_update(f.number for f in late)
        self._read += len(fresh)
        self._extend([t for t in new if t is not None])
        if found:
            trials = sorted((*self._history.trials, *found), key=lambda t: t.number)
            self._history = History()
            self._counts.clear()
            self._extend(trials)

    def _numbered(self, number: int) -> FrozenTrial:
        """A trial of the Optuna study by number; raises KeyError if it does not exist."""
        found = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        return self._storage.get_trial(found)

    def _news(self) -> Iterator[FrozenTrial]:
        """Trials not read yet."""
        with suppress(KeyError):
            for number in count(self._read):
                yield self._numbered(number)

    def _take_in(self, frozen: FrozenTrial) -> None:
        """Add a trial just written to the trials read."""
        if frozen.number != self._read:  # other trials are not read yet
            self._refresh()
            return
        self._read += 1
        self._extend([t for t in [self._trial(frozen)] if t is not None])

    def _extend(self, trials: Sequence[Trial]) -> None:
        if trials:
            self._history = self._history.extended(*trials)
            self._counts.update(t.budget_key for t in trials if not t.probe)

    def _trial(self, frozen: FrozenTrial) -> Trial | None:
        """Convert a finished Optuna trial; None if RankNAS did not write it."""
        try:
            found = self._format.read(frozen)
        except ValueError as error:
            raise StudyError(
                f"trial {frozen.number} of study {self.study.study_name!r} in {self._place} is "
                f"damaged: {error}. Bring the storage back from a copy, or start a new study."
            ) from None
        if found is None:
            return None
        trial, token = found
        if token.startswith(self._owner.name):
            self._mine[token] = trial
        return trial

    # ------------------------------------------------------------------------------ writing

    def _leased(self, allocation: Allocation) -> bool:
        """Whether our lease on an allocation is certainly valid, given small clock differences."""
        held = any(c.allocation == allocation for c in self._own)
        return held and time.time() < self._expires - LEASE / 2

    def _overtaken(self, allocation: Allocation) -> bool:
        """Whether another process recorded an allocation after it was granted to this one."""
        since = self._since.get(allocation)
        if since is None or allocation not in self._history.found:
            return False
        return any(t.allocation == allocation for t in self._history.trials[since:])

    def _settle(self) -> None:
        """Wait for a transaction that a broken connection left unfinished in the database."""
        engine = getattr(self._storage, "engine", None)
        if isinstance(engine, Engine) and engine.dialect.name != "sqlite":
            # Optuna locks this row before it writes a trial.
            query = sqlalchemy.text(
                "SELECT study_id FROM studies WHERE study_name = :name FOR UPDATE"
            )
            with engine.begin() as connection:
                connection.execute(query, {"name": self.study.study_name})

    def _grant(
        self, wanted: Sequence[Claim], running: Sequence[Claim], most: Mapping[str, int] | int
    ) -> list[Claim]:
        busy = (c for c in (*self._others, *running) if not self._is_done(c))
        taken = {c.allocation: c for c in busy}
        counts = self._counts + Counter(c.budget_key for c in taken.values() if not c.probe)
        granted = []
        for claim in wanted:
            if self._is_done(claim) or claim.allocation in taken:
                continue
            limit = most if isinstance(most, int) else most.get(claim.budget_key, 0)
            if not claim.probe and counts[claim.budget_key] >= limit:
                continue
            counts[claim.budget_key] += not claim.probe
            taken[claim.allocation] = claim
            granted.append(claim)
        return granted

    def _is_done(self, claim: Claim) -> bool:
        return self._history.has(claim.allocation, probe=claim.probe)

    def _look(self, attributes: Mapping[str, Any]) -> None:
        self._others = self._owner.others(attributes)
        self._looked = time.monotonic()

    def _publish(self, claims: tuple[Claim, ...], attributes: Mapping[str, Any]) -> None:
        """Write held claims into the slot, under the study's lock, unless already there."""
        held = self._owner.holds(attributes)
        if (claims and not held) or (held and claims != self._own):
            self._write_claims(claims, attributes)
        self._own = claims
        if claims and self._ended is None:
            self._ended = keep_alive(self._renew, LEASE / 4)

    def _write_claims(self, claims: tuple[Claim, ...], attributes: Mapping[str, Any]) -> None:
        document = self._owner.document(claims)
        self.study.set_user_attr(self._owner.slot(attributes), document)
        self._expires = document.get("expires", 0.0)

    def _hold(self, claims: tuple[Claim, ...]) -> None:
        with study_lock(self._storage, self.study.study_name):
            self._publish(claims, self._attributes())

    def _renew(self) -> None:
        """Renew the lease; called by a thread."""
        with self._one_thread:
            if not self._own:
                return
            try:
                with study_lock(self._storage, self.study.study_name):
                    self._write_claims(self._own, self._attributes())
            except Exception as error:  # the next call may succeed
                logger.debug("the lease was not renewed: %s", format_error(error, self._place))


def study_names(storage: str) -> list[str]:
    """Names of all studies in an existing storage.

    Raises:
        StudyError: The storage cannot be read.
    """
    opened = open_storage(storage, create=False)
    try:
        return optuna.get_all_study_names(opened)
    except Exception as error:
        raise format_error(error, storage_name(opened)) from None


def has_trials(storage: str | optuna.storages.BaseStorage, name: str) -> bool:
    """Whether a storage has a study with a trial that succeeded.

    Raises:
        StudyError: The storage does not respond.
    """
    opened = open_storage(storage)
    try:
        if name not in optuna.get_all_study_names(opened):
            return False
        trials = optuna.load_study(study_name=name, storage=opened).get_trials(deepcopy=False)
    except Exception as error:
        raise format_error(error, storage_name(opened)) from None
    return any(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials)


def _check_format(name: str, written: object, place: str) -> None:
    """Raise a StudyError unless a study has the format of this version."""
    current = current_format("study")
    found = format_of("study", written, f"study {name!r} in {place}")
    if found < current:
        raise StudyError(
            f"study {name!r} in {place} was made by an older version of RankNAS (format {found}; "
            f"this version continues format {current}). Search anew under another name and begin "
            "with its best allocation: search(..., start=[allocation]), or --start FOLDER."
        )


def _check_configuration(name: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if listed := "; ".join(differences(stored, given)):
        raise StudyError(
            f"study {name!r} exists with another configuration: {listed}. Give the same options, "
            "or another --study name."
        )
