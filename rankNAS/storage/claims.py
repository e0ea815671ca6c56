"""Leased claims: processes that share a study reserve the allocations they evaluate.

A process writes its claims into one user attribute of the study, its slot. A claim is valid until
its lease expires without renewal, or until its process is found dead. Optuna cannot delete
attributes, so expired slots are reused.
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

LEASE = 60.0  # seconds; far above clock differences between computers that share a study
SLOT = "ranknas:claim:"


@dataclass(frozen=True)
class Claim:
    """A reserved allocation: a process evaluates it or will do so next.

    Args:
        allocation: The allocation.
        budget_key: The key of the budget that it was proposed for.
        probe: Whether it is a probe, which does not count as a trial of the budget.
        weights: The file of the weights that the strategy has trained for it; empty if none.
            Other processes do not see it.
    """

    allocation: Allocation
    budget_key: str
    probe: bool = False
    weights: str = ""


@dataclass(frozen=True)
class Owner:
    """Owner of claims: one open store in one process.

    Args:
        choices: The choices of each layer as labels; an allocation is written as indices.
        name: A unique name.

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
        """Contents of the slot as JSON values; valid for `LEASE` seconds."""
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
        """Whether this owner still has its slot; another owner may have reused an expired one.

        Args:
            attributes: The study's user attributes.
        """
        slots = (v for k, v in attributes.items() if k.startswith(SLOT))
        return any(isinstance(v, dict) and v.get("owner") == self.name for v in slots)

    def slot(self, attributes: Mapping[str, Any]) -> str:
        """Name of the attribute to write: the owner's slot, else an expired one, else a new one.

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
        """Valid claims of all other owners.

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
    """Call a method periodically in a thread, as long as its object exists.

    Args:
        renew: A bound method.
        every: The period in seconds.

    Returns:
        The event that stops the thread when set.
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
    """Whether the claims of a slot are valid."""
    if not isinstance(document, dict) or not document.get("claims"):
        return False
    try:
        if document["expires"] < time.time():
            return False
        # Remote processes cannot be checked; a killed local one frees its slot at once.
        return document["place"] != _place() or bool(_born(document["pid"]) == document["born"])
    except (KeyError, TypeError):  # not in our format
        return False


def _place() -> str:
    """Scope in which a process number is unique: the machine's boot and the PID namespace."""
    parts = [platform.node()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # no Linux
        pass
    return " ".join(parts)


def _born(pid: int) -> str:
    """Start time of a process as text, for comparison; empty if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        # Without /proc, a process cannot be distinguished from a later one with its number.
        return "" if Path("/proc/self/stat").exists() else "unknown"
    return "" if fields[0] in "ZX" else fields[19]
