"""Claims on lease."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.storage import claims
from rankNAS.storage.claims import Claim, Owner, keep_alive

CHOICES = {"a": ["dense", "svd:2", "svd:4"], "b": ["dense", "tucker2:4x2"]}


def claim(rank: int, **more: Any) -> Claim:
    choice = Choice("svd", (rank,)) if rank else DENSE
    return Claim(Allocation.of({"a": choice, "b": Choice("tucker2", (4, 2))}), "t", **more)


def test_others_read_what_was_written() -> None:
    import json

    one, other = Owner(CHOICES), Owner(CHOICES)
    held = [claim(2), claim(0, probe=True)]
    attributes = {"else": 1, one.slot({}): json.loads(json.dumps(one.document(held)))}
    assert other.others(attributes) == tuple(held)
    assert one.others(attributes) == ()
    assert one.holds(attributes) and not other.holds(attributes)


def test_claims_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Owner(CHOICES), Owner(CHOICES)
    attributes = {one.slot({}): one.document([claim(2)])}
    now = time.time()
    monkeypatch.setattr(claims.time, "time", lambda: now + claims.LEASE - 1)
    assert other.others(attributes)
    monkeypatch.setattr(claims.time, "time", lambda: now + claims.LEASE + 1)
    assert not other.others(attributes)


def test_claims_end_with_their_process(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    one, other = Owner(CHOICES), Owner(CHOICES)
    with monkeypatch.context() as patch:
        patch.setattr(claims.os, "getpid", lambda: process.pid)
        document = one.document([claim(2)])
    assert other.others({"ranknas:claim:0": document})
    process.kill()
    deadline = time.time() + 10
    while other.others({"ranknas:claim:0": document}) and time.time() < deadline:
        time.sleep(0.01)  # until it is a zombie
    assert not other.others({"ranknas:claim:0": document})
    process.communicate()
    assert not other.others({"ranknas:claim:0": document})
    # Elsewhere the number says nothing, nor does it if another process has it by now.
    assert other.others({"ranknas:claim:0": document | {"place": "another computer"}})
    reused = document | {"pid": os.getpid()}
    assert not other.others({"ranknas:claim:0": reused})


def test_slots_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    attributes: dict[str, Any] = {}
    owners = [Owner(CHOICES) for _ in range(3)]
    for owner in owners:
        attributes[owner.slot(attributes)] = owner.document([claim(2)])
    assert sorted(attributes) == [f"ranknas:claim:{i}" for i in range(3)]
    assert [o.slot(attributes) for o in owners] == sorted(attributes)
    attributes["ranknas:claim:1"] = owners[1].document([])
    assert Owner(CHOICES).slot(attributes) == "ranknas:claim:1"
    now = time.time()
    monkeypatch.setattr(claims.time, "time", lambda: now + 2 * claims.LEASE)
    for i in range(50):
        owner = Owner(CHOICES)
        attributes[owner.slot(attributes)] = owner.document([claim(2)])
        monkeypatch.setattr(claims.time, "time", lambda i=i: now + i * 2 * claims.LEASE)
    assert len(attributes) == 3


def test_a_slot_that_is_garbage_does_not_count() -> None:
    owner = Owner(CHOICES)
    documents: list[object] = [None, "x", {}, {"claims": []}, {"claims": [1]}, [1]]
    for document in documents:
        assert owner.others({"ranknas:claim:0": document}) == ()
        assert owner.slot({"ranknas:claim:0": document}) == "ranknas:claim:0"


def test_keep_alive_calls_until_it_is_ended() -> None:
    class Counter:
        calls = 0

        def count(self) -> None:
            self.calls += 1

    counter = Counter()
    ended = keep_alive(counter.count, 0.01)
    deadline = time.time() + 10
    while counter.calls < 3 and time.time() < deadline:
        time.sleep(0.01)
    assert counter.calls >= 3
    ended.set()
    del counter  # the other way to end it
    ended = keep_alive(Counter().count, 0.01)
    while "ranknas-lease" in {t.name for t in threading.enumerate()} and time.time() < deadline:
        time.sleep(0.01)
    assert "ranknas-lease" not in {t.name for t in threading.enumerate()}
