"""What many workers and long studies cost.

    python studies/benchmark/scaling.py [--only speedup|samples|memory|throughput|growth]

takes about twenty minutes on two CPU cores and needs no data. ResNet-20 with random weights on
random images. Measured in turns, so that what disturbs one disturbs all:

- trials a second of two workers over those of one, each with one thread, study in SQLite;
- seconds of a trial on one thread with 128 and 256 samples at once over those with 64;
- what a trial costs beyond its evaluation, and trials a second, with an evaluation that does
  nothing and eight workers;
- seconds of a trial at 10,000 trials over those at 100, with an evaluation that does nothing;
- what a worker holds in memory beyond what all share.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.allocation import Allocation
from rankNAS.engine import run
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.execution.parallel import Parallel, Workers
from rankNAS.execution.scheduler import Evaluation, Outcome, Serial, schedule
from rankNAS.execution.sharing import shared_bytes
from rankNAS.search_spaces.zoo import build_model
from rankNAS.storage.store import StudyStore

IMAGES, WARM, WIDE = 1000, 4, 49
BUDGET = {"macs": 0.5}
NORMS = {"accuracy": 0.5, "loss": 1.0, "macs": 1.0}


def prepared(model: nn.Module, side: int, images: int) -> rankNAS.Study:
    """A study of random search with its first trials."""
    data = [torch.randn(n, 3, side, side) for n in (2 * images, 100)]
    labels = [torch.randint(0, 10, (len(x),)) for x in data]
    pair = tuple(TensorDataset(x, y) for x, y in zip(data, labels, strict=True))
    settings = rankNAS.Settings(norm="weight", calibration=images, validation=images)
    return rankNAS.search(
        model,
        (pair[0], pair[1]),
        budget=BUDGET,
        strategy="random",
        n_trials=1,
        settings=settings,
    )


def fresh(study: rankNAS.Study, storage: str | None) -> rankNAS.Study:
    """The same without its trials, recorded elsewhere."""
    store = StudyStore.open(
        storage,
        "study",
        configuration={},
        choices=study.problem.labels(),
        directions=study.problem.directions,
        resume=False,
    )
    study.evaluator.forget()
    return replace(study, store=store)


class Seconds:
    """When each trial ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    def each(self, first: int, last: int) -> float:
        """Mean seconds of the trials from `first` to `last`."""
        return (self.times[last] - self.times[first]) / (last - first)


def speedup(rounds: int, trials: int) -> None:
    """Two workers against one, in turns."""
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    study = prepared(model, 32, IMAGES)
    ratios, overheads = [], []
    for _ in range(rounds):
        rates = {}
        for count in (1, 2):
            torch.set_num_threads(count)  # a worker gets one of them
            with tempfile.TemporaryDirectory() as folder:
                timed, own = Seconds(), fresh(study, url("sqlite", folder))
                run(own, trials, timed, Workers(count, timeout=600.0))
                spent = [t.seconds for t in own.trials[WARM:]]
                own.store.close()
            rates[count] = 1 / timed.each(WARM, trials - 1)
            overheads.append(timed.each(WARM, trials - 1) * count - statistics.mean(spent))
        ratios.append(rates[2] / rates[1])
    print(
        f"two workers over one: {statistics.median(ratios):.2f} times the trials a second "
        f"({', '.join(f'{r:.2f}' for r in ratios)}); a trial of one worker: {1 / rates[1]:.2f} s"
    )
    print(f"beyond the evaluation: {1e3 * statistics.median(overheads):.0f} ms a trial")


def samples(rounds: int) -> None:
    """How many samples a CPU should take at once."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    study = prepared(model, 32, IMAGES)
    # As in a worker: its copy keeps no activations.
    state, random_ = study.evaluator.__getstate__(), Random(0)
    evaluators = {}
    for count in (64, 128, 256):
        with mock.patch("rankNAS.evaluation.evaluator.CPU_SAMPLES", count):
            evaluators[count] = Evaluator(**state)
    seconds: dict[int, list[float]] = {count: [] for count in evaluators}
    for _ in range(rounds):
        layers = study.evaluator.factorisation.space.layers
        allocation = Allocation.of({n: random_.choice(x.choices) for n, x in layers.items()})
        for count, evaluator in evaluators.items():
            started = time.process_time()
            evaluator.evaluate(allocation)
            seconds[count].append(time.process_time() - started)
    for count in (128, 256):
        ratios = sorted(a / b for a, b in zip(seconds[count], seconds[64], strict=True))
        print(
            f"{count} samples at once take {statistics.median(ratios):.2f} times the CPU time of "
            f"64 ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def memory() -> None:
    """What a worker holds by itself, beyond what a worker of a tiny network holds."""
    torch.manual_seed(0)
    wide = [layer for _ in range(WIDE - 1) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    models = {
        "tiny": (nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Linear(64, 10)), 8, 16),
        "ResNet-20": (
            build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)),
            32,
            IMAGES,
        ),
        f"{WIDE} linear layers of 1,024": (
            nn.Sequential(
                nn.Flatten(), nn.Linear(192, 1024), nn.ReLU(), *wide, nn.Linear(1024, 10)
            ),
            8,
            IMAGES,
        ),
    }
    base = (0.0, 0.0)
    for name, (model, side, images) in models.items():
        study = fresh(prepared(model.eval(), side, images), None)
        seen: list[float] = []
        executor = Parallel(study.evaluator, Workers(2))
        try:
            schedule(study, 8, executor)  # what workers need to begin with is not what they hold
            with _watching(seen):
                schedule(study, 20, executor)
            time.sleep(1)
            own = max(seen), statistics.mean(map(_private, filter(_is_worker, _processes())))
        finally:
            executor.close()
        base = base if any(base) else own
        compressed = statistics.mean(t.metrics["weight_bytes"] for t in study.trials)
        print(
            f"{name}: a worker's own memory is {own[0] / 1e6:.0f} MB at most, "
            f"{own[1] / 1e6:.0f} MB after its trials; {(own[0] - base[0]) / 1e6:.0f} and "
            f"{(own[1] - base[1]) / 1e6:.0f} MB more than for the tiny network. The weights are "
            f"{study.dense['weight_bytes'] / 1e6:.1f} MB, compressed {compressed / 1e6:.1f}; "
            f"all share {shared_bytes(study.evaluator) / 1e6:.0f} MB",
            flush=True,
        )


@contextlib.contextmanager
def _watching(seen: list[float]) -> Iterator[None]:
    """Within, what workers hold by themselves is noted, every tenth of a second."""
    over = threading.Event()

    def note() -> None:
        with contextlib.suppress(OSError):  # one has ended
            seen.extend(map(_private, filter(_is_worker, _processes())))

    def watch() -> None:
        while not over.wait(0.1):
            note()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        note()


def _processes() -> list[Path]:
    return list(Path("/proc").glob("[0-9]*"))


def _is_worker(process: Path) -> bool:
    try:
        command = (process / "cmdline").read_text()
    except OSError:  # it has ended
        return False
    return command.startswith("ray::ImplicitFunc")  # what Tune calls the trials that are workers


def _private(process: Path) -> float:
    """Bytes that no other process has."""
    lines = (process / "smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


class Nothing(Serial):
    """Evaluates nothing."""

    def wait(self) -> Sequence[Outcome]:
        return [nothing(self._waiting.pop(0))]


def nothing(task: Evaluation) -> Outcome:
    return Outcome(task, "complete", NORMS)


class NoOperation(Evaluator):
    """Measures nothing."""

    def evaluate(self, allocation: Allocation, **_: Any) -> dict[str, float]:
        return dict(NORMS)


def throughput(storage: str, trials: int, workers: int) -> None:
    """An evaluation that does nothing, with workers."""
    small = nn.Sequential(*(nn.Linear(192, 192) for _ in range(8)), nn.Linear(192, 10))
    study = prepared(nn.Sequential(nn.Flatten(), small).eval(), 8, 16)
    with tempfile.TemporaryDirectory() as folder:
        timed, own = Seconds(), fresh(study, url(storage, folder))
        same = {f.name: getattr(study.evaluator, f.name) for f in fields(Evaluator)}
        executor = Parallel(NoOperation(**same), Workers(workers))
        try:
            schedule(own, trials, executor, timed)
        finally:
            executor.close()
            own.store.close()
    rate = 1 / timed.each(trials // 4, trials - 1)
    print(f"{storage}: {rate:.0f} trials a second with {workers} workers")


def growth(storage: str, trials: int) -> None:
    """A long study."""
    small = nn.Sequential(*(nn.Linear(192, 192) for _ in range(8)), nn.Linear(192, 10))
    study = prepared(nn.Sequential(nn.Flatten(), small).eval(), 8, 16)
    with tempfile.TemporaryDirectory() as folder:
        timed, own = Seconds(), fresh(study, url(storage, folder))
        schedule(own, trials, Nothing(study.evaluator), timed)
        own.store.close()
    early, late = timed.each(50, 150), timed.each(trials - 101, trials - 1)
    print(
        f"{storage}: {1e3 * early:.1f} ms a trial at 100 trials, {1e3 * late:.1f} ms at {trials}, "
        f"{late / early:.2f} times"
    )


def url(storage: str, folder: str) -> str:
    path = Path(folder) / "study"
    return f"sqlite:///{path}.db" if storage == "sqlite" else f"journal:{path}.journal"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000, help="of the long study")
    parser.add_argument("--only", choices=["speedup", "samples", "memory", "throughput", "growth"])
    given = parser.parse_args()
    if given.only in (None, "speedup"):
        speedup(rounds=3, trials=20)
    if given.only in (None, "samples"):
        samples(rounds=9)
    if given.only in (None, "memory"):
        memory()
    for kind in ("journal", "sqlite"):
        if given.only in (None, "throughput"):
            throughput(kind, 1000, 8)
        if given.only in (None, "growth"):
            growth(kind, given.trials)
