from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.data.samples import Samples
from rankNAS.exceptions import ObjectiveError, UnknownNameError, UsageError
from rankNAS.objectives import (
    OBJECTIVES,
    CostObjective,
    EvaluationResult,
    Latency,
    Metric,
    Objective,
    ObjectiveBase,
    make_objective,
)
from rankNAS.tasks import METRICS, Classification, Regression, Segmentation, Task
from rankNAS.tasks.language import MaskedLanguageModelling
from rankNAS.testing import ObjectiveContract


def measured(
    task: Task, logits: Tensor, targets: Tensor, dense: Tensor | None = None
) -> dict[str, float]:
    """The metrics of outputs, with the dense model's outputs as the reference."""
    batch = torch.zeros(len(logits), 3), targets
    task = task.bound(batch, nn.Linear(3, 2))
    reference = task.predict(logits if dense is None else dense, batch)
    return task.finish(task.predict(logits, batch).sums(reference))


def accuracy(logits: Tensor, targets: Tensor) -> float:
    return measured(_task(logits), logits, targets)["accuracy"]


def loss(logits: Tensor, targets: Tensor) -> float:
    return measured(_task(logits), logits, targets)["loss"]


def kl_divergence(logits: Tensor, dense: Tensor) -> float:
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    return measured(_task(logits), logits, labels, dense)["kl_divergence"]


def reverse_kl(logits: Tensor, dense: Tensor) -> float:
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    return measured(_task(logits), logits, labels, dense)["reverse_kl"]


def _task(logits: Tensor) -> Task:
    return MaskedLanguageModelling() if logits.dim() == 3 else Classification()


def candidate(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> EvaluationResult:
    torch.manual_seed(0)
    network = nn.Linear(3, 2).eval()
    costs = {"macs": 6.0, "params": 8.0, "weight_bytes": 32.0}
    batch = torch.randn(len(targets), 3), targets
    task = Classification().bound(batch, network)
    metrics = measured(Classification(), logits, targets.long(), dense)
    samples = Samples.of(batch)
    return EvaluationResult(Allocation.of({}), metrics, costs, task, samples, lambda: network)


class Width(ObjectiveBase):
    name = "width"
    direction = "minimize"

    def measure(self, candidate: EvaluationResult) -> float:
        return float(candidate.build().in_features)


class TestAccuracy(ObjectiveContract):
    objective = Metric("accuracy", "maximize")


class TestLoss(ObjectiveContract):
    objective = Metric("loss", "minimize")


class TestAgreement(ObjectiveContract):
    objective = Metric("kl_divergence", "minimize")


class TestReverseAgreement(ObjectiveContract):
    objective = Metric("reverse_kl", "minimize")


class TestCost(ObjectiveContract):
    objective = CostObjective("macs")


class TestLayerCost(ObjectiveContract):
    objective = CostObjective("layer_params")


class TestLatency(ObjectiveContract):
    objective = Latency(repeats=3)
    noise = 1e3  # of microseconds, on a machine with other work


class TestFunction(ObjectiveContract):
    objective = Objective(lambda network, data: float(network(data[0]).sum().detach()), name="sum")


class TestOwnClass(ObjectiveContract):
    objective = Width()

    def candidate(self) -> EvaluationResult:
        return candidate(torch.zeros(2, 2), torch.zeros(2))


sizes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(2, 5))


@given(sizes, st.integers(0, 1000))
def test_quality_in_closed_form(size: tuple[int, int, int], seed: int) -> None:
    n, t, classes = size
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, t, classes, generator=generator)
    dense = 3 * torch.randn(n, t, classes, generator=generator)
    targets = torch.randint(classes, (n, t), generator=generator)
    right, nats, divergence = 0, 0.0, 0.0
    for i in range(n):
        for j in range(t):
            z, d = logits[i, j].tolist(), dense[i, j].tolist()
            q = [math.exp(v) / sum(map(math.exp, z)) for v in z]
            p = [math.exp(v) / sum(map(math.exp, d)) for v in d]
            right += z.index(max(z)) == targets[i, j]
            nats -= math.log(q[int(targets[i, j])])
            divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert accuracy(logits, targets) == pytest.approx(float(right) / (n * t))
    assert loss(logits, targets) == pytest.approx(nats / (n * t), rel=1e-6)
    assert kl_divergence(logits, dense) == pytest.approx(divergence / (n * t), rel=1e-6, abs=1e-9)
    flat = logits.flatten(0, 1), targets.flatten()
    assert accuracy(*flat) == accuracy(logits, targets)
    assert loss(*flat) == pytest.approx(loss(logits, targets), rel=1e-12)


def test_closed_forms_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    targets = torch.tensor([1, 0])
    assert accuracy(logits, targets) == 1.0
    assert loss(logits, targets) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    uniform = torch.zeros(2, 2)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence(uniform, logits) == pytest.approx(kl / 2)
    assert kl_divergence(logits, logits) == 0
    # only differences between logits count
    assert kl_divergence(logits + 5, logits) == pytest.approx(0, abs=1e-7)


def test_t_c4_the_directions_of_the_divergence() -> None:
    dense = torch.tensor([[0.5, 0.5]]).log()
    compressed = torch.tensor([[0.9, 0.1]]).log()
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert (forward, reverse) == pytest.approx((0.510826, 0.368064), abs=1e-6)
    assert kl_divergence(compressed, dense) == pytest.approx(forward, rel=1e-6)
    assert reverse_kl(compressed, dense) == pytest.approx(reverse, rel=1e-6)
    assert reverse_kl(dense, dense) == 0


def test_agreement_survives_extreme_logits() -> None:
    far = torch.tensor([[1000.0, -1000.0]])
    assert kl_divergence(far, far) == 0
    # all of p's mass on a class to which q gives exp(-2000)
    assert kl_divergence(far.flip(1), far) == pytest.approx(2000)


def test_regression() -> None:
    def error(output: Tensor, targets: Tensor) -> float:
        return measured(Regression(), output, targets)["loss"]

    y, targets = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 2.0, 1.0])
    assert error(y, targets) == pytest.approx((1 + 0 + 9) / 3)
    # a column of outputs belongs to the row of targets, not to every pair of them
    assert error(y[:, None], targets) == pytest.approx((1 + 0 + 9) / 3)
    wide = torch.stack([y, targets], 1)
    assert error(wide, torch.zeros(3, 2)) == pytest.approx((1 + 4 + 16 + 0 + 4 + 1) / 6)


def test_objectives_measure_these() -> None:
    logits, dense, targets = torch.randn(7, 3), torch.randn(7, 3), torch.randint(3, (7,))
    given = candidate(logits, targets, dense)
    assert make_objective("accuracy")(given) == accuracy(logits, targets)
    assert make_objective("loss")(given) == loss(logits, targets)
    assert make_objective("kl_divergence")(given) == kl_divergence(logits, dense)
    assert make_objective("reverse_kl")(given) == reverse_kl(logits, dense)
    with pytest.raises(ObjectiveError, match="'miou' is no metric of the task 'classification'"):
        make_objective("miou")(given)
    assert CostObjective("params")(given) == 8
    assert 0 < Latency(batch_size=3, repeats=2)(given) < 1
    with pytest.raises(ObjectiveError, match="'energy' raised KeyError"):
        CostObjective("energy")(given)


def test_latency_times_what_it_says() -> None:
    sizes = []

    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            sizes.append(len(x))
            return x

    given = candidate(torch.zeros(9, 2), torch.zeros(9))
    given = EvaluationResult(**{**vars(given), "build": Network})
    Latency(batch_size=4, repeats=3)(given)
    assert sizes == [4] * (2 + 3)


def test_names_and_directions() -> None:
    for name, objective in OBJECTIVES.items():
        assert make_objective(name) is objective and objective.name == name
        expected = METRICS[name][0] if name in METRICS else "minimize"
        assert objective.direction == expected
    for name in ("accuracy", "f1", "miou", "r2"):
        assert make_objective(name).direction == "maximize"
    assert make_objective(own := Width()) is own


def test_objectives_are_metrics_of_the_task() -> None:
    found = make_objective("miou", Segmentation())
    assert (found.name, found.direction) == ("miou", "maximize")
    assert make_objective("layer_macs", Segmentation()) == CostObjective("layer_macs")
    with pytest.raises(UsageError, match="'r2' is no metric of this data: the task is segm"):
        make_objective("r2", Segmentation())
    with pytest.raises(UnknownNameError, match="Did you mean 'miou'"):
        make_objective("mioo", Segmentation())


def test_functions_get_the_data_in_the_form_of_the_data() -> None:
    class Tokens(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return (ids * mask).float()

    batch = {"ids": torch.arange(12).reshape(4, 3), "mask": torch.ones(4, 3, dtype=torch.bool)}
    task = Regression().bound({**batch, "labels": torch.zeros(4, 3)}, Tokens())
    given = EvaluationResult(Allocation.of({}), {}, {}, task, Samples.of(iter([batch])), Tokens)

    def total(network: nn.Module, data: dict[str, Tensor]) -> float:
        return float(network(**data).sum())

    assert Objective(total)(given) == 66
    several = Objective(lambda n, batches: sum(total(n, b) for b in batches), batches=True)
    assert several(EvaluationResult(**{**vars(given), "batch_size": 3})) == 66
    assert given.example(2).kwargs["ids"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown objective 'acuracy'\. Did you mean 'acc"):
        make_objective("acuracy")
    with pytest.raises(UnknownNameError, match=r"Known: accuracy, .*path/to/file\.py:function"):
        make_objective("x")
    with pytest.raises(UsageError, match=r"got function; wrap a function as Objective\("):
        make_objective(lambda network, data: 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", ["plain", "a=b"])
def test_functions_from_files(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    file = tmp_path / folder / "mine.py"
    file.write_text(
        "def width(network, data): return network.in_features + len(data[0])\n"
        "def error(network, data): return 1.0\n"
        "error.direction = 'minimize'\n"
        "def wrong(network, data): return 1.0\n"
        "wrong.direction = 'down'\n"
    )
    width = make_objective(f"{file}:width")
    assert (width.name, width.direction) == ("width", "maximize")
    assert width(candidate(torch.zeros(5, 2), torch.zeros(5))) == 3 + 5
    assert make_objective(f"{file}:width=minimize").direction == "minimize"
    assert make_objective(f"{file}:error").direction == "minimize"
    assert make_objective(f"{file}:error=maximize").direction == "maximize"
    for spec in ("width=down", "wrong"):
        with pytest.raises(UsageError, match="must be 'maximize' or 'minimize', got 'down'"):
            make_objective(f"{file}:{spec}")
    with pytest.raises(UnknownNameError, match="Did you mean 'width'"):
        make_objective(f"{file}:widht=minimize")
    with pytest.raises(UsageError, match="cannot read"):
        make_objective(f"{tmp_path}/none.py:f")


def test_functions_are_checked() -> None:
    with pytest.raises(UsageError, match="`fn` must be callable, got int"):
        Objective(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="got 'up'"):
        Objective(max, "up")  # type: ignore[arg-type]
    assert Objective(lambda n, d: 0.0, name="mine").name == "mine"


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan), "x", None])
def test_values_are_checked(value: Any) -> None:
    broken = Objective(lambda network, data: value, name="broken")
    with pytest.raises(ObjectiveError, match="'broken'"):
        broken(candidate(torch.zeros(2, 2), torch.zeros(2)))


def test_tensors_and_numbers_are_values() -> None:
    given = candidate(torch.zeros(2, 2), torch.zeros(2))
    for value in (2, 2.0, torch.tensor(2.0), torch.tensor([2], dtype=torch.int64)):
        number = Objective(lambda network, data, value=value: value)(given)
        assert type(number) is float and number == 2


def test_own_objective_errors_pass_unwrapped() -> None:
    def refuse(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        raise ObjectiveError("needs a GPU")

    with pytest.raises(ObjectiveError, match="^needs a GPU$"):
        Objective(refuse)(candidate(torch.zeros(2, 2), torch.zeros(2)))
