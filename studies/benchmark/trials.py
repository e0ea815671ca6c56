"""CPU time of a trial of a long study, with an evaluation that does nothing.

    python studies/benchmark/trials.py [--trials 10000] [--storage memory|journal|sqlite …]

needs no data. Prints the milliseconds of process time per trial of the first and of the last
thousand: proposal, bookkeeping and storage.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.execution.scheduler import Outcome, Serial, schedule
from rankNAS.storage.store import StudyStore

STORAGES = ("memory", "journal", "sqlite")
MEASURED = 1000  # trials at either end
NORMS = {"accuracy": 0.5, "loss": 1.0, "macs": 1.0}


class Nothing(Serial):
    """Evaluates nothing."""

    def wait(self) -> Sequence[Outcome]:
        return [Outcome(self._waiting.pop(0), "complete", NORMS)]


def prepared() -> rankNAS.Study:
    """A study of random search over a network of nine layers, with its first trial."""
    torch.manual_seed(0)
    layers = (nn.Linear(192, 192) for _ in range(8))
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(192, 10)).eval()
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 10, (64,))
    data = TensorDataset(x, y)
    settings = rankNAS.Settings(norm="weight", calibration=16, validation=16)
    return rankNAS.search(
        model, (data, data), budget={"macs": 0.5}, strategy="random", n_trials=1, settings=settings
    )


def measure(study: rankNAS.Study, storage: str, trials: int) -> tuple[float, float]:
    """Seconds per trial of the first and of the last thousand."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study"
        url = {"journal": f"journal:{path}.journal", "sqlite": f"sqlite:///{path}.db"}
        store = StudyStore.open(
            url.get(storage),
            "long",
            configuration={},
            choices=study.problem.labels(),
            directions=study.problem.directions,
            resume=False,
        )
        study.evaluator.forget()
        own = replace(study, store=store)
        ends: list[float] = []

        def on_trial(*_: object) -> None:
            ends.append(time.process_time())

        schedule(own, trials, Nothing(study.evaluator), on_trial)
        store.close()
    count = min(MEASURED, (len(ends) - 1) // 2)
    return (ends[count] - ends[0]) / count, (ends[-1] - ends[-1 - count]) / count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=STORAGES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = prepared()
    for kind in given.storage:
        early, late = measure(base, kind, given.trials)
        print(
            f"{kind}: {1e3 * early:.2f} ms a trial in the first thousand, {1e3 * late:.2f} ms in "
            f"the last of {given.trials}, {late / early:.2f} times",
            flush=True,
        )
