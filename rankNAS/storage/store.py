"""The record of a search: an Optuna study that can be killed at any moment.

A trial is written in one transaction when it ends, so there is never half a trial, and nothing to
clean up after a crash. The configuration is a user attribute of the study; going on with another
one is refused. Several processes may work on one study: see `StudyStore.claim`.
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

__all__ = ["Claim", "StudyStore", "study_names"]

logger = logging.getLogger(__name__)
CONFIGURATION, CHOICES = "ranknas:configuration", "ranknas:choices"
STUDY_FORMAT = f"ranknas:{FORMAT}"
LOOK = 1.0  # seconds
T = TypeVar("T")


class StudyStore:
    """An open study.

    Leave it with `close`, or use it in a ``with`` statement: what it claims is then free at once.

    Args:
        study: The Optuna study.
        storage: The storage that it is in.
        choices: The choices of each layer as labels: the distributions of the parameters.

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
        self._read = 0  # trials of the Optuna study that were looked at
        self._open: set[int] = set()  # and that were not finished then
        self._counts: Counter[str] = Counter()  # trials by target, without probes
        self._mine: dict[str, Trial] = {}  # by token
        self._since: dict[Allocation, int] = {}  # claims: how many trials there were before
        self._own: tuple[Claim, ...] = ()
        self._others: tuple[Claim, ...] = ()
        self._looked = 0.0  # when
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
        """Open or make a study.

        Args:
            storage: As for `rankNAS.storage.backends.open_storage`; None keeps the study in
                memory.
            name: The study's name in the storage.
            configuration: What must not change between sessions: JSON values and dataclasses.
            choices: Labels of each layer's choices. A resumed study keeps those it was made with.
            directions: Of the objectives.
            resume: Whether an existing study may be gone on with.

        Raises:
            StudyError: The storage cannot be read, the study exists and `resume` is false, or it
                was made with another configuration.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        opened = open_storage(storage)
        try:
            # Of two processes that start a study at the same moment, the second one resumes it.
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
                    # The configuration last: without it, a start that was killed is done again.
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
        """All finished trials, oldest first, those of other processes too.

        Trials that RankNAS did not write are left out.

        Raises:
            StudyError: The storage does not answer, or a trial is damaged.
        """
        with self._one_thread:
            self._retrying(self._refresh)
            return self._history

    def known(self) -> History:
        """The trials as of the last call that read or wrote some; the storage is not asked."""
        return self._history

    def add(self, trial: Trial, objectives: Sequence[str]) -> Trial | None:
        """Write a finished trial, in one transaction, once, whatever happens to the storage.

        Args:
            trial: Its number is not used.
            objectives: Their names, in the order of the values.

        Returns:
            The trial with its number in the study. None if another process recorded the same
            allocation while this one had a claim to it, as after a suspension: nothing is written.

        Raises:
            StudyError: The storage does not answer.
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
                # Reading takes longer with every trial; of what is on lease there is no news.
                if attempts > 1 or not self._leased(trial.allocation):
                    self._refresh()
                if token in self._mine:  # the connection broke after it was written
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
        """Ask for allocations to evaluate that no other process evaluates.

        What is granted or running is held until it is left out of the next call, or released. It
        is on lease, renewed by a thread: what a killed process held is free after a minute, or at
        once if it ran on this computer.

        Args:
            wanted: What to evaluate next, most wanted first.
            running: What this process evaluates already; it goes on holding that and nothing else.
            most: How many trials each target shall have in the end, of all processes together,
                probes excepted; one number for all targets, or by target.

        Returns:
            Those of `wanted` that are neither finished nor claimed, and not too many.

        Raises:
            StudyError: The storage does not answer.
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
        """Put on record that evaluations were broken off, for whoever looks, and release them.

        They are no trials of the history: a search that goes on does them again. Where the storage
        does not answer, nothing is written.
        """
        with self._one_thread:
            try:
                for claim in claims:
                    self.study.add_trial(self._format.broken_off(claim))
                self._hold(())
            except Exception as error:  # whoever interrupts does not want to wait
                logger.debug("not recorded: %s", format_error(error, self._place))

    def release(self, claims: Sequence[Claim]) -> None:
        """Give claims up, so that other processes may have them.

        Raises:
            StudyError: The storage does not answer.
        """
        with self._one_thread:
            left = tuple(c for c in self._own if c not in claims)
            if left != self._own:
                self._retrying(lambda: self._hold(left))

    def others(self) -> tuple[Claim, ...]:
        """What other processes are evaluating, as was known a second ago.

        Raises:
            StudyError: The storage does not answer.
        """
        with self._one_thread:
            # What comes anew is seen by `claim`; what ends, even by a kill, must be seen here.
            if self._others and time.monotonic() - self._looked > LOOK:
                self._retrying(lambda: self._look(self._attributes()))
            found = self._history.found
            return tuple(c for c in self._others if c.allocation not in found)

    def close(self) -> None:
        """Give all claims up, if the storage answers; the record may still be used."""
        with self._one_thread:
            if self._ended is not None:
                self._ended.set()
                self._ended = None
            if self._own:
                try:
                    self._hold(())
                except Exception as error:  # they expire; an exit need not wait for the storage
                    logger.debug("claims were not given up: %s", format_error(error, self._place))

    def __enter__(self) -> StudyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _retrying(self, action: Callable[[], T]) -> T:
        return retrying(action, self._place)

    def _attributes(self) -> Mapping[str, Any]:
        # Without the deep copy that the study would make of all choices; only looked at.
        return self._storage.get_study_user_attrs(self._id)

    # ------------------------------------------------------------------------------ reading

    def _refresh(self) -> None:
        """Look at the trials that are new, and at those that were not finished before."""
        # A list of all takes longer with every trial.
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
        """A trial of the Optuna study by number; a KeyError if there is none."""
        found = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        return self._storage.get_trial(found)

    def _news(self) -> Iterator[FrozenTrial]:
        """The trials that were not read yet."""
        with suppress(KeyError):
            for number in count(self._read):
                yield self._numbered(number)

    def _take_in(self, frozen: FrozenTrial) -> None:
        """Have the trial that was just written among those that were read."""
        if frozen.number != self._read:  # there are others that were not read
            self._refresh()
            return
        self._read += 1
        self._extend([t for t in [self._trial(frozen)] if t is not None])

    def _extend(self, trials: Sequence[Trial]) -> None:
        if trials:
            self._history = self._history.extended(*trials)
            self._counts.update(t.budget_key for t in trials if not t.probe)

    def _trial(self, frozen: FrozenTrial) -> Trial | None:
        """A finished trial of Optuna as ours; None if it is not ours."""
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
        """Whether nobody else can have been granted an allocation, though clocks differ a bit."""
        held = any(c.allocation == allocation for c in self._own)
        return held and time.time() < self._expires - LEASE / 2

    def _overtaken(self, allocation: Allocation) -> bool:
        """Whether another process recorded an allocation since this one was granted it."""
        since = self._since.get(allocation)
        if since is None or allocation not in self._history.found:
            return False
        return any(t.allocation == allocation for t in self._history.trials[since:])

    def _settle(self) -> None:
        """Wait for what a broken connection has left half done in the database."""
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
        found = self._history.found
        taken = {c.allocation: c for c in (*self._others, *running) if c.allocation not in found}
        counts = self._counts + Counter(c.budget_key for c in taken.values() if not c.probe)
        granted = []
        for claim in wanted:
            if claim.allocation in found or claim.allocation in taken:
                continue
            limit = most if isinstance(most, int) else most.get(claim.budget_key, 0)
            if not claim.probe and counts[claim.budget_key] >= limit:
                continue
            counts[claim.budget_key] += not claim.probe
            taken[claim.allocation] = claim
            granted.append(claim)
        return granted

    def _look(self, attributes: Mapping[str, Any]) -> None:
        self._others = self._owner.others(attributes)
        self._looked = time.monotonic()

    def _publish(self, claims: tuple[Claim, ...], attributes: Mapping[str, Any]) -> None:
        """Write what is held into the slot, under the study's lock, if it is not there."""
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
        """Lengthen the lease; called by a thread."""
        with self._one_thread:
            if not self._own:
                return
            try:
                with study_lock(self._storage, self.study.study_name):
                    self._write_claims(self._own, self._attributes())
            except Exception as error:  # the next call may do better
                logger.debug("the lease was not renewed: %s", format_error(error, self._place))


def study_names(storage: str) -> list[str]:
    """The names of all studies in a storage, which must exist.

    Raises:
        StudyError: The storage cannot be read.
    """
    opened = open_storage(storage, create=False)
    try:
        return optuna.get_all_study_names(opened)
    except Exception as error:
        raise format_error(error, storage_name(opened)) from None


def _check_format(name: str, written: object, place: str) -> None:
    """Raise a StudyError unless a study has the format that this version writes."""
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
