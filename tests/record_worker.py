"""Works on a study until it has its trials, as a search would; prints each one it has recorded.

python record_worker.py STORAGE SEED MOST SECONDS, where SECONDS is the longest time of a trial. It
opens the study, says that it is ready, and begins when a line is written to it.
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
import time

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.record import Claim, Record
from rankNAS.strategies.base import Trial

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


def opened(storage: object, **change: object) -> Record:
    return Record.open(
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
        -1, claim.allocation, "complete", (found,), {"accuracy": found}, target=claim.target
    )


def work(storage: str, seed: int, most: int, seconds: float) -> None:
    """Claim up to three, evaluate one after the other."""
    drawn = random.Random(seed)
    with opened(storage) as record:
        print("ready", flush=True)
        sys.stdin.readline()
        while len(record.history().trials) < most:
            wanted = [Claim(a, TARGET) for a in drawn.sample(ALLOCATIONS, 3)]
            running = record.claim(wanted, most=most)
            if not running:
                time.sleep(0.01)
            for claim in running:
                time.sleep(drawn.uniform(0, seconds))
                trial = record.add(evaluated(claim), ("accuracy",))
                print("lost" if trial is None else trial.allocation.to_json(), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    logging.getLogger("filelock").setLevel(logging.WARNING)
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
