"""Workers: what they measure, and what happens when they do not come back."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from searches import evaluator_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.allocation import Allocation
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.exceptions import UsageError
from rankNAS.execution import parallel
from rankNAS.execution.parallel import Parallel, Workers
from rankNAS.execution.scheduler import Evaluation, Outcome
from rankNAS.objectives import Objective
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.storage.store import Claim

Pair = tuple[TensorDataset, TensorDataset]


class Misbehaving:
    """An objective that does what a file named like the allocation's MACs says.

    Whoever has done it once takes the file away, unless it says "always".
    """

    __name__ = "misbehaving"
    direction = "maximize"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        own = self.folder / str(sum(p.numel() for p in network.parameters()))
        text = own.read_text() if own.exists() else ""
        if text and "always" not in text:
            own.unlink()
        if "die" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in text:
            time.sleep(3600)
        if "memory" in text:
            raise MemoryError
        if "exit" in text:
            sys.exit(3)
        if "wrong" in text:
            raise ValueError("wrong")
        return 1.0


def evaluator(folder: Path, model: nn.Module) -> Evaluator:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 8, generator=generator)
    y = torch.randint(0, 4, (64,), generator=generator)
    space = compile_space(model, x[:1], min_weights=1)
    factorisation = factorise(model, space, calibrate(model, space, x, norm="input"))
    objective = Objective(Misbehaving(folder), name="misbehaving")
    return evaluator_of(factorisation, x, y, objectives=[objective], sequential=True)


def done(executor: Parallel, evaluations: list[Evaluation]) -> dict[Allocation, Outcome]:
    found: dict[Allocation, Outcome] = {}
    waiting = list(evaluations)
    running = 0
    while waiting or running:
        while waiting and running < executor.slots:
            executor.submit(waiting.pop(0))
            running += 1
        for outcome in executor.wait():
            found[outcome.evaluation.claim.allocation] = outcome
            running -= 1
    return found


@pytest.mark.slow
def test_each_trial_fails_alone(cluster: str, tmp_path: Path, small_net: nn.Module) -> None:
    own = evaluator(tmp_path, small_net)
    space = own.factorisation.space
    evaluations = []
    for i in range(9):
        choices = {n: layer.choices[i % len(layer.choices)] for n, layer in space.layers.items()}
        evaluations.append(Evaluation(Claim(Allocation.of(choices), "t"), final=i == 1))
    allocations = [t.claim.allocation for t in evaluations]
    assert len(set(allocations)) == 9
    orders = {2: "die", 3: "always die", 4: "hang", 5: "memory", 6: "wrong", 7: "exit"}
    for i, order in orders.items():
        params = sum(p.numel() for p in own.network(allocations[i]).parameters())
        (tmp_path / str(params)).write_text(order)
    executor = Parallel(own, Workers(2, cluster, timeout=5.0))
    try:
        found = done(executor, evaluations)
    finally:
        executor.close()
    outcomes = [found[a] for a in allocations]
    failed = [i for i, outcome in enumerate(outcomes) if outcome.state == "failed"]
    assert failed == [3, 4, 5, 6, 7]  # who died once was tried again
    assert "died 3 times" in outcomes[3].reason
    assert "5 seconds (--trial-timeout)" in outcomes[4].reason
    assert "MemoryError" in outcomes[5].reason or "out of memory" in outcomes[5].reason
    assert "ValueError: wrong" in outcomes[6].reason
    assert "called sys.exit(3)" in outcomes[7].reason
    for i in (0, 1, 2, 8):
        here = own.evaluate(allocations[i], final=i == 1)
        assert outcomes[i].metrics == pytest.approx(here, rel=1e-5, abs=1e-6)
        assert outcomes[i].evaluation == evaluations[i]


@pytest.mark.slow
def test_one_worker_measures_what_no_worker_does(
    cluster: str, small_net: nn.Module, small_data: Pair
) -> None:
    settings = rankNAS.Settings(calibration=64, validation=50, early_stopping=True)

    def searched(workers: Workers) -> rankNAS.Study:
        return rankNAS.search(
            small_net,
            small_data,
            budget={"macs": 0.5},
            objectives=["loss"],
            strategy="random",
            n_trials=10,
            settings=settings,
            workers=workers,
        )

    alone, ray = searched(Workers(1)), searched(Workers(1, cluster))
    assert [t.allocation for t in ray.trials] == [t.allocation for t in alone.trials]
    assert [t.state for t in ray.trials] == [t.state for t in alone.trials]
    assert "pruned" in {t.state for t in alone.trials}
    for one, other in zip(alone.trials, ray.trials, strict=True):
        assert other.metrics == pytest.approx(one.metrics, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_two_workers_share_a_search(cluster: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 4)).eval()
    x, y = torch.randn(200, 64), torch.randint(0, 4, (200,))
    data = TensorDataset(x[:150], y[:150]), TensorDataset(x[150:], y[150:])
    settings = rankNAS.Settings(calibration=64, validation=50)
    study = rankNAS.search(
        model,
        data,
        budget=[{"macs": 0.5}, {"macs": 0.4}],
        strategy="bo",
        n_trials=8,
        settings=settings,
        storage=f"sqlite:///{tmp_path}/study.db",
        workers=Workers(2, cluster),
    )
    for problem in study.problems:
        assert len(study.history.candidates(problem)) == 8
    own = [t.allocation for t in study.trials]
    assert len(set(own)) == len(own) == 16
    alone = rankNAS.search(model, data, budget={"macs": 0.5}, n_trials=1, settings=settings)
    for trial in study.trials:
        again = alone.evaluator.evaluate(trial.allocation)
        assert trial.metrics == pytest.approx(again, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "at least 1"),
        ({"count": 2, "gpus": -0.5}, "negative"),
        ({"count": 1, "timeout": 0.0}, "positive"),
        ({"count": 1, "gpus": float("nan")}, "negative"),
        ({"count": 1, "gpus": 1.5}, "a whole number or a fraction"),
    ],
)
def test_bad_numbers(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Workers(**arguments)  # type: ignore[arg-type]


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for them for ever."""
    monkeypatch.setattr(parallel, "_ray_runs", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for count, gpus in ((2, 1.0), (1, 2.0), (4, 0.5), (20, 0.1), (4, 0.4)):
        Workers(count, gpus=gpus)
    for count, gpus in ((3, 1.0), (2, 2.0), (5, 0.5), (21, 0.1), (5, 0.4)):
        with pytest.raises(UsageError, match="need more GPUs than the 2 there are"):
            Workers(count, gpus=gpus)
        Workers(count, "auto", gpus)  # of a cluster, whose GPUs are not known yet
