"""Who is evaluating what: processes that work on one study claim allocations, on lease.

A process writes what it claims into one user attribute of the study, its slot. A claim counts
until it expires, unless it is renewed, or until its process is found to be gone. Optuna cannot
delete attributes, so slots that no longer count are taken over.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankNAS.allocation import Allocation, Choice

__all__ = ["LEASE", "Claim", "Owner", "keep_alive"]

LEASE = 60.0  # seconds; the clocks of computers that share a study agree better than that
SLOT = "ranknas:claim:"


@dataclass(frozen=True)
class Claim:
    """An allocation that a process evaluates or is about to.

    Args:
        allocation: What is evaluated.
        budget_key: The key of the budget that it was proposed for.
        probe: Whether it does not count as one of the budget's trials.
    """

    allocation: Allocation
    budget_key: str
    probe: bool = False


@dataclass(frozen=True)
class Owner:
    """A holder of claims: one open record in one process.

    Args:
        choices: The choices of each layer as labels; an allocation is written as indices.
        name: Unlike that of any other owner.

    Example:
        >>> choices = {"conv1": ["dense", "svd:4"]}
        >>> claim = Claim(Allocation.of({"conv1": Choice("svd", (4,))}), "macs<=0.5")
        >>> one, other = Owner(choices), Owner(choices)
        >>> attributes = {one.slot({}): one.document([claim])}
        >>> other.others(attributes) == (claim,), one.others(attributes)
        (True, ())
    """

    choices: Mapping[str, Sequence[str]]
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def document(self, claims: Sequence[Claim]) -> dict[str, Any]:
        """What is written into the slot, as JSON values; it counts for `LEASE` seconds."""
        rows = [[self._indices(c.allocation), c.budget_key, c.probe] for c in claims]
        if not rows:
            return {}
        pid = os.getpid()
        return {
            "owner": self.name,
            "place": _place(),
            "pid": pid,
            "born": _born(pid),
            "expires": time.time() + LEASE,
            "claims": rows,
        }

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether a slot is still this owner's; of a lost lease it may be another's by now.

        Args:
            attributes: The study's user attributes.
        """
        slots = (v for k, v in attributes.items() if k.startswith(SLOT))
        return any(isinstance(v, dict) and v.get("owner") == self.name for v in slots)

    def slot(self, attributes: Mapping[str, Any]) -> str:
        """The attribute to write into: one's own, or the first that does not count, or a new one.

        Args:
            attributes: The study's user attributes.
        """
        slots = {k: v for k, v in attributes.items() if k.startswith(SLOT)}
        for key, document in slots.items():
            if isinstance(document, dict) and document.get("owner") == self.name:
                return key
        free = (k for k in sorted(slots) if not _counts(slots[k]))
        fresh = (f"{SLOT}{i}" for i in range(len(slots) + 1) if f"{SLOT}{i}" not in slots)
        return next(free, None) or next(fresh)

    def others(self, attributes: Mapping[str, Any]) -> tuple[Claim, ...]:
        """What all other owners claim now.

        Args:
            attributes: The study's user attributes.
        """
        documents = [v for k, v in sorted(attributes.items()) if k.startswith(SLOT)]
        return tuple(
            claim
            for document in documents
            if _counts(document) and document["owner"] != self.name
            for claim in self._read(document)
        )

    def _indices(self, allocation: Allocation) -> list[int]:
        return [list(labels).index(str(allocation[k])) for k, labels in self.choices.items()]

    def _read(self, document: Mapping[str, Any]) -> list[Claim]:
        found = []
        for indices, budget_key, probe in document["claims"]:
            pairs = zip(self.choices.items(), indices, strict=True)
            labels = {name: Choice.parse(labels[i]) for (name, labels), i in pairs}
            found.append(Claim(Allocation.of(labels), str(budget_key), bool(probe)))
        return found


def keep_alive(renew: Callable[[], None], every: float) -> threading.Event:
    """Call a method every so many seconds, in a thread, as long as its object lives.

    Args:
        renew: A bound method.
        every: Seconds.

    Returns:
        What ends it when it is set.
    """
    method, ended = weakref.WeakMethod(renew), threading.Event()

    def run() -> None:
        while not ended.wait(every):
            call = method()
            if call is None:
                return
            call()
            del call

    threading.Thread(target=run, name="ranknas-lease", daemon=True).start()
    return ended


def _counts(document: object) -> bool:
    """Whether the claims of a slot are still to be heeded."""
    if not isinstance(document, dict) or not document.get("claims"):
        return False
    try:
        if document["expires"] < time.time():
            return False
        # Of processes elsewhere nothing is known; here, a killed one need not be waited for.
        return document["place"] != _place() or bool(_born(document["pid"]) == document["born"])
    except (KeyError, TypeError):  # nobody writes that
        return False


def _place() -> str:
    """Where a process number means the same process: a machine since its start, a namespace."""
    parts = [platform.node()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # no Linux
        pass
    return " ".join(parts)


def _born(pid: int) -> str:
    """When a process was started, as a text to compare; empty if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        # Without a /proc, processes cannot be told from later ones of the same number.
        return "" if Path("/proc/self/stat").exists() else "unknown"
    return "" if fields[0] in "ZX" else fields[19]
