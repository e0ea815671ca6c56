"""Works on a study until it has its trials, as a search would; tells of each it has recorded."""

from __future__ import annotations

import itertools
import logging
import random
import sys
import time
import traceback
from pathlib import Path

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.storage.backends import open_storage
from rankNAS.storage.locks import study_lock
from rankNAS.storage.store import Claim, StudyStore
from rankNAS.strategies.history import Trial

TARGET = "macs<=0.5"
CHOICES = {f"layer{i}": ["dense", "svd:1", "svd:2", "svd:3"] for i in range(4)}
ALLOCATIONS = [
    Allocation.of(
        {k: Choice("svd", (r,)) if r else DENSE for k, r in zip(CHOICES, ranks, strict=True)}
    )
    for ranks in itertools.product(range(4), repeat=4)
]


def accuracy(allocation: Allocation) -> float:
    """What is measured: a number that belongs to the allocation and nothing else."""
    return 1 / (1 + sum(4**i * sum(allocation[k].rank) for i, k in enumerate(CHOICES)))


def opened(storage: object, **change: object) -> StudyStore:
    return StudyStore.open(
        storage,  # type: ignore[arg-type]
        "name",
        configuration={"seed": 0, **change},
        choices=CHOICES,
        directions=("maximize",),
        resume=True,
    )


def evaluated(claim: Claim) -> Trial:
    found = accuracy(claim.allocation)
    return Trial(
        -1,
        claim.allocation,
        "complete",
        (found,),
        {"accuracy": found},
        budget_key=claim.budget_key,
    )


def work(storage: str, go: str, seed: int, most: int, seconds: float) -> None:
    """Claim up to three, evaluate one after the other; each takes at most so many seconds."""
    drawn = random.Random(seed)
    with opened(storage) as store:
        print("ready")
        while not Path(go).exists():
            time.sleep(0.001)
        while len(store.history().trials) < most:
            wanted = [Claim(a, TARGET) for a in drawn.sample(ALLOCATIONS, 3)]
            running = store.claim(wanted, most=most)
            if not running:
                time.sleep(0.01)
            for claim in running:
                time.sleep(drawn.uniform(0, seconds))
                trial = store.add(evaluated(claim), ("accuracy",))
                print("lost" if trial is None else trial.allocation.to_json())


def hold(storage: str, told: str) -> None:
    """Take the lock of a study and keep it."""
    with study_lock(open_storage(storage), "name"):
        Path(told).touch()
        time.sleep(60)


def begin(storage: str, log: str, go: str, seed: int, most: int, seconds: float) -> None:
    """Write all that is printed to a file, open the study, and work when another file is there."""
    with open(log, "w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, force=True)
        logging.getLogger("filelock").setLevel(logging.WARNING)
        try:
            work(storage, go, seed, most, seconds)
        except BaseException:
            traceback.print_exc()
            raise
