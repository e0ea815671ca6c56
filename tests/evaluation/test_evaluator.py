from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from rankNAS.allocation import Allocation
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.data.samples import Samples
from rankNAS.decompositions.shapes import EXACT_COSTS
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.evaluation.pruning import PrunedError
from rankNAS.exceptions import ObjectiveError, UsageError
from rankNAS.objectives import CostObjective, Latency, Metric, Objective
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.trainer import Recovery, train
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.tasks.categorical import Categorical
from rankNAS.tasks.infer import infer_task

TASK_METRICS = [
    Metric("accuracy", "maximize"),
    Metric("loss", "minimize"),
    Metric("kl_divergence", "minimize"),
]


def images(n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 3, 8, 8, generator=generator),
        torch.randint(6, (n,), generator=generator),
    )


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, 3, stride=2),
        nn.BatchNorm2d(12),
        nn.Flatten(),
        nn.Linear(108, 6),
    )
    model(images()[0] * 1.5 + 0.2)  # running statistics that are not those of the data
    return model.eval()


def factorised(model: nn.Module, x: Tensor, **options: Any) -> Factorisation:
    space = compile_space(model, x[:1], min_weights=1, keep_output_dense=False)
    norm = options.pop("norm", "input")
    return factorise(model, space, calibrate(model, space, x, norm=norm), norm=norm)


def evaluating(factors: Factorisation, x: Tensor, y: Tensor, **options: Any) -> Evaluator:
    """An evaluator whose task follows from the data."""
    task = options.pop("task", None) or infer_task(factors.model, (x, y))
    calibration = options.pop("calibration", (x, y))
    return Evaluator(factors, task, Samples.of(calibration), Samples.of((x, y)), **options)


def evaluator(batch_norm: bool = True, **options: Any) -> Evaluator:
    x, y = images()
    return evaluating(
        factorised(convolutional(), x),
        *(x, y),
        calibration=images(40),
        batch_norm=batch_norm,
        **options,
    )


def drawn(of: Evaluator, seed: int) -> Allocation:
    rng = random.Random(seed)
    layers = of.factorisation.space.layers
    return Allocation.of({n: rng.choice(layer.choices) for n, layer in layers.items()})


def by_hand(network: nn.Module, dense: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    with torch.no_grad():
        log_q = network.eval()(x).double().log_softmax(-1)
        log_p = dense.eval()(x).double().log_softmax(-1)
    return {
        "accuracy": (log_q.argmax(-1) == y).double().mean().item(),
        "loss": -log_q.gather(-1, y[:, None]).mean().item(),
        "kl_divergence": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1).mean().item(),
    }


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("batch_size", [17, 256])
def test_metrics_are_those_of_the_network(batch_norm: bool, batch_size: int) -> None:
    ev = evaluator(batch_norm, batch_size=batch_size)
    for seed in range(4):
        allocation = drawn(ev, seed)
        metrics = ev.evaluate(allocation)
        network = ev.network(allocation)
        assert not network.training
        for name, value in by_hand(network, convolutional(), *images()).items():
            assert metrics[name] == pytest.approx(value, abs=1e-4), name
        cost = ev.factorisation.space.cost(allocation)
        assert metrics["params"] == cost.params == sum(p.numel() for p in network.parameters())
        assert (metrics["macs"], metrics["weight_bytes"]) == (cost.macs, cost.weight_bytes)


@pytest.mark.parametrize("low_memory", [False, True])
def test_batch_norms_move_by_what_compression_changes_on_the_calibration_data(
    low_memory: bool,
) -> None:
    ev = evaluator(batch_size=100, low_memory=low_memory)
    network, dense, x = ev.network(drawn(ev, 3)), convolutional(), images(40)[0]
    stored, norm = dense[1], network[1]  # type: ignore[index]
    hidden, before = network[0](x), dense[0](x)  # type: ignore[index]
    shift = hidden.mean((0, 2, 3)) - before.mean((0, 2, 3))
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(norm.running_mean, stored.running_mean + shift, **close)
    ratio = hidden.var((0, 2, 3)) / before.var((0, 2, 3))
    torch.testing.assert_close(norm.running_var, stored.running_var * ratio, rtol=1e-3, atol=1e-5)
    kept = evaluator(batch_norm=False)
    for name, value in convolutional()[1].state_dict().items():  # type: ignore[index]
        assert torch.equal(kept.network(drawn(kept, 3))[1].state_dict()[name], value)  # type: ignore[index]


SEEN: list[int] = []


class Recording(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        SEEN.append(len(input))
        return input


@pytest.mark.parametrize(("batch_size", "most"), [(50, 50), (1000, 128)])
def test_a_cpu_takes_so_many_samples_at_once_that_its_caches_hold_them(
    batch_size: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, y = images(300)
    factorisation = factorised(nn.Sequential(Recording(), *convolutional()).eval(), x)
    task = infer_task(factorisation.model, (x, y))
    SEEN.clear()
    ev = evaluating(factorisation, x, y, task=task, batch_size=batch_size, low_memory=True)
    ev.evaluate(drawn(ev, 0))
    assert max(SEEN) == most
    # For outputs and for batch norms, of the dense network too; and one for the size of outputs.
    assert sum(SEEN) == 4 * len(x) + 1


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_dense_network_keeps_its_batch_norms(low_memory: bool) -> None:
    ev = evaluator(low_memory=low_memory)
    ev.evaluate(drawn(ev, 1))
    metrics = ev.evaluate(ev.factorisation.space.dense)
    assert metrics["kl_divergence"] == pytest.approx(0, abs=1e-9)


def test_dense_without_batch_norm_is_the_model() -> None:
    ev = evaluator(batch_norm=False)
    metrics = ev.evaluate(ev.factorisation.space.dense)
    expected = by_hand(convolutional(), convolutional(), *images())
    assert metrics["kl_divergence"] == 0 == expected["kl_divergence"]
    assert metrics["accuracy"] == expected["accuracy"]
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert ev.dense() == {name: metrics[name] for name in ev.task.directions}
    (reference,), (part,) = ev.backend.references, ev.backend.parts
    predictions = [reference.prediction(i, batch) for i, batch in enumerate(part)]
    logits = torch.cat([p.logits for p in predictions if isinstance(p, Categorical)])
    torch.testing.assert_close(logits, convolutional()(images()[0]).detach())


def test_agreement_is_positive_elsewhere() -> None:
    ev = evaluator(batch_norm=False)
    smallest = {n: layer.choices[-1] for n, layer in ev.factorisation.space.layers.items()}
    assert ev.evaluate(Allocation.of(smallest))["kl_divergence"] > 0


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_order_of_evaluations_does_not_matter(batch_norm: bool) -> None:
    allocations = [drawn(evaluator(), seed) for seed in range(4)]
    alone = [evaluator(batch_norm).evaluate(allocation) for allocation in allocations]
    ev = evaluator(batch_norm)
    rng = random.Random(0)
    for _ in range(12):
        i = rng.randrange(4)
        ev._known.clear()  # the same numbers must come out of measuring anew
        assert ev.evaluate(allocations[i]) == alone[i]


def count_forwards(ev: Evaluator) -> list[int]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    ev.backend.network.register_forward_hook(count)
    return calls


def test_equal_allocations_are_evaluated_once() -> None:
    ev = evaluator(batch_norm=False, low_memory=True)
    calls = count_forwards(ev)
    allocation = drawn(ev, 0)
    first = ev.evaluate(allocation)
    assert calls == [1]
    reordered = Allocation.of(dict(reversed(list(allocation.items()))))
    second = ev.evaluate(reordered)
    assert calls == [1] and first == second
    second["loss"] = -1.0  # what is returned is the caller's own
    assert ev.evaluate(allocation) == first
    ev.evaluate(drawn(ev, 1))
    assert calls == [2]


def test_remembered_metrics_are_not_measured() -> None:
    ev = evaluator()
    calls = count_forwards(ev)
    allocation = drawn(ev, 0)
    ev.remember(allocation, {"loss": 1.5})
    assert ev.evaluate(allocation) == {"loss": 1.5} and calls == [0]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_what_is_kept_of_earlier_passes_changes_nothing(batch_norm: bool) -> None:
    reusing, plain = evaluator(batch_norm), evaluator(batch_norm, low_memory=True)
    assert reusing.backend.incremental and not plain.backend.incremental
    layers = reusing.factorisation.space.layers
    rng = random.Random(5)
    current = dict(drawn(reusing, 5))
    for step in range(12):
        for name in rng.sample(list(layers), rng.choice([0, 1, 2])):
            current[name] = rng.choice(layers[name].choices)
        allocation = Allocation.of(current)
        assert reusing.evaluate(allocation) == plain.evaluate(allocation)
        if step % 3 == 0:  # building a network in between must not disturb what is kept
            states = [ev.network(allocation).state_dict() for ev in (reusing, plain)]
            assert all(torch.equal(states[0][k], v) for k, v in states[1].items())


def test_only_what_follows_the_first_change_is_computed() -> None:
    ev = evaluator(low_memory=False)
    calls = [0]
    first_layer = ev.backend.network[0]  # type: ignore[index]
    first_layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    names = list(ev.factorisation.space.layers)
    dense = dict(ev.factorisation.space.dense)
    ev.evaluate(Allocation.of(dense))
    assert calls[0] > 0
    calls[0] = 0
    for choice in ev.factorisation.space.layers[names[-1]].choices[1:]:
        ev.evaluate(Allocation.of(dense | {names[-1]: choice}))
    assert calls[0] == 0


def test_time_is_accounted_for() -> None:
    ev = evaluator()
    before = ev.timing.forward
    ev.evaluate(drawn(ev, 0))
    assert ev.timing.forward > before > 0 and ev.timing.other > 0


def test_the_model_and_its_factors_are_not_changed() -> None:
    model = convolutional()
    before = copy.deepcopy(model.state_dict())
    x, y = images()
    ev = evaluating(factorised(model, x), x, y)
    for seed in range(3):
        ev.evaluate(drawn(ev, seed))
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_a_custom_objective_gets_the_network_and_the_data() -> None:
    seen: list[tuple[nn.Module, tuple[Tensor, Tensor]]] = []

    def worst(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        seen.append((network, data))
        with torch.no_grad():
            return float(
                functional.cross_entropy(network(data[0]), data[1], reduction="none").max()
            )

    ev = evaluator(objectives=[Objective(worst, direction="minimize")])
    allocation = drawn(ev, 2)
    metrics = ev.evaluate(allocation)
    (network, (x, y)) = seen[0]
    assert not network.training
    assert torch.equal(x, images()[0]) and torch.equal(y, images()[1])
    logits = ev.network(allocation)(images()[0])
    expected = functional.cross_entropy(logits, y, reduction="none").max().item()
    assert metrics["worst"] == pytest.approx(expected, rel=1e-5)
    assert sum(p.numel() for p in network.parameters()) == metrics["params"]


def test_a_custom_objective_with_the_name_of_a_metric_is_the_one_that_counts() -> None:
    def accuracy(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        return 42.0

    ev = evaluator(objectives=[Objective(accuracy)])
    assert ev.evaluate(drawn(ev, 0))["accuracy"] == 42.0


def test_built_in_objectives() -> None:
    built_in = [*TASK_METRICS, CostObjective("macs"), Latency(repeats=1)]
    ev, plain = evaluator(objectives=built_in), evaluator()
    metrics, expected = ev.evaluate(drawn(ev, 0)), plain.evaluate(drawn(plain, 0))
    assert metrics.pop("latency") > 0
    assert metrics == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "text", None, [1, 2]])
def test_objectives_that_return_no_finite_number(value: Any) -> None:
    def broken(network: nn.Module, data: tuple[Tensor, Tensor]) -> Any:
        return value

    ev = evaluator(objectives=[Objective(broken)])
    for _ in range(2):  # a failure is not remembered as a result
        with pytest.raises(ObjectiveError, match="'broken'"):
            ev.evaluate(drawn(ev, 0))


def test_objectives_that_raise() -> None:
    def broken(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        raise ZeroDivisionError("by zero")

    ev = evaluator(objectives=[Objective(broken)])
    with pytest.raises(ObjectiveError, match="'broken' raised ZeroDivisionError: by zero"):
        ev.evaluate(drawn(ev, 0))


def test_extra_costs() -> None:
    def extra(allocation: Any) -> dict[str, float]:
        return {"latency": float(len(allocation)), "energy": 2.0}

    ev = evaluator(extra_costs=extra, objectives=[Latency(), CostObjective("energy")])
    metrics = ev.evaluate(drawn(ev, 0))
    # a predicted latency stands in for a measured one
    assert metrics["latency"] == len(ev.factorisation.space.layers) and metrics["energy"] == 2
    assert ev.costs(drawn(ev, 0)).items() <= metrics.items()


def test_allocations_of_another_space() -> None:
    ev = evaluator()
    with pytest.raises(UsageError, match="no layer 'x'"):
        ev.evaluate(Allocation.of({"x": drawn(ev, 0)["0"]}))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 4)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 10) -> (N, T, 4)
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_sequences_and_tied_layers() -> None:
    torch.manual_seed(0)
    model, x, y = Tied(), torch.randn(9, 5, 10), torch.randint(4, (9, 5))
    ev = evaluating(factorised(model, x, norm="fisher"), x, y, batch_size=4)
    for seed in range(3):
        allocation = drawn(ev, seed)
        metrics = ev.evaluate(allocation)
        network = ev.network(allocation)
        expected = by_hand(
            nn.Sequential(network, nn.Flatten(0, 1)),
            nn.Sequential(model, nn.Flatten(0, 1)),
            x,
            y.flatten(),
        )
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, abs=1e-5)


def test_regression_has_its_own_metrics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))
    x, y = torch.randn(20, 12), torch.randn(20)
    ev = evaluating(factorised(model, x), x, y)
    metrics = ev.evaluate(ev.factorisation.space.dense)
    assert set(metrics) == {"r2", "mae", "loss", "distance", *EXACT_COSTS}
    residual = model(x).squeeze(1).double() - y.double()
    assert metrics["loss"] == pytest.approx(residual.square().mean().item(), rel=1e-6)
    assert metrics["mae"] == pytest.approx(residual.abs().mean().item(), rel=1e-6)
    variance = y.double().var(correction=0).item()
    assert metrics["r2"] == pytest.approx(1 - metrics["loss"] / variance, rel=1e-6)
    assert metrics["distance"] == pytest.approx(0, abs=1e-12)


def test_hugging_face_layers_are_folded_transposed() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(24, 12), nn.ReLU(), conv1d(4, 24))
    x, y = torch.randn(15, 12), torch.randint(4, (15,))
    ev = evaluating(factorised(model, x), x, y)
    for seed in range(3):
        allocation = drawn(ev, seed)
        expected = by_hand(ev.network(allocation), model, x, y)
        metrics = ev.evaluate(allocation)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


class Counted(Dataset[tuple[Tensor, Tensor]]):
    """A dataset that records which items are read, and how far ahead."""

    def __init__(self) -> None:
        self.x, self.y = images()
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= len(self.x):
            raise IndexError(index)
        self.read.append(index)
        return self.x[index], self.y[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("items are to be read in batches")


def test_test_metrics_stream() -> None:
    model, counted = convolutional(), Counted()
    ahead: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor]) -> None:
        ahead.append(len(counted.read))

    model.register_forward_pre_hook(note)
    samples, task = Samples.of(counted), infer_task(convolutional(), images())
    assert samples.uniform  # a few items are read once to see that shapes are equal
    counted.read.clear()
    metrics = network_metrics(model.train(), samples, task, batch_size=25)
    # The first sample is run alone, to see how large outputs are.
    assert ahead == [1, 26, 51, 61] and counted.read == [0, *range(60)]
    expected = by_hand(convolutional(), convolutional(), *images())
    assert metrics["accuracy"] == expected["accuracy"]
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for source in (images(), TensorDataset(*images())):
        again = network_metrics(convolutional(), Samples.of(source), task, batch_size=7)
        assert again == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("low_memory", [False, True])
def test_parts_of_the_samples_are_measured_on_the_way(batch_norm: bool, low_memory: bool) -> None:
    whole = evaluator(batch_norm, low_memory=low_memory)
    parts = evaluator(batch_norm, low_memory=low_memory, parts=(0.25, 0.5, 1.0))
    for seed in range(4):
        allocation = drawn(whole, seed)
        seen: dict[int, float] = {}

        def should_continue(
            samples: int, metrics: Mapping[str, float], seen: dict[int, float] = seen
        ) -> bool:
            seen[samples] = metrics["accuracy"]
            return True

        found = parts.evaluate(allocation, should_continue=should_continue)
        assert found == pytest.approx(whole.evaluate(allocation))
        assert list(seen) == [15, 30]
        network = whole.network(allocation)
        x, y = images()
        for count, accuracy in seen.items():
            correct = network(x[:count]).argmax(-1) == y[:count]
            assert accuracy == pytest.approx(correct.double().mean().item())


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_stopped_evaluation_leaves_the_next_ones_as_they_are(batch_norm: bool) -> None:
    whole = evaluator(batch_norm)
    parts = evaluator(batch_norm, parts=(0.25, 0.5, 1.0))
    for seed in range(8):
        allocation = drawn(whole, seed)
        if seed % 2:
            with pytest.raises(PrunedError, match="after 30") as stopped:
                parts.evaluate(allocation, should_continue=lambda n, m: n < 30)
            assert stopped.value.metrics["macs"] == parts.costs(allocation)["macs"]
        else:
            assert parts.evaluate(allocation) == pytest.approx(whole.evaluate(allocation))


def test_a_copy_in_another_place_measures_the_same() -> None:
    own = evaluator(sequential=True, objectives=TASK_METRICS[:2])
    copied = pickle.loads(pickle.dumps(own))
    for seed in range(3):
        allocation = drawn(own, seed)
        assert copied.evaluate(allocation) == own.evaluate(allocation)
        refitted = own.evaluate(allocation, final=True)
        assert copied.evaluate(allocation, final=True) == refitted


def recovery(epochs: int = 2, learning_rate: float = 0.01) -> Recovery:
    config = TrainingConfig(
        epochs, batch_size=20, learning_rate=learning_rate, distill=0.5, augment=False
    )
    task = infer_task(convolutional(), images())
    return Recovery(Samples.of(images()), task, config)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_final_evaluation_is_that_of_the_trained_network(sequential: bool) -> None:
    x, y = images()
    plain = evaluator(sequential=sequential)
    own = evaluator(sequential=sequential, recovery=recovery())
    dense = copy.deepcopy(own.factorisation.model.state_dict())
    for seed in range(3):
        allocation = drawn(own, seed)
        network = own.network(allocation)
        metrics = own.evaluate(allocation, final=True)
        by_that = by_hand(network, own.factorisation.model, x, y)
        assert metrics == pytest.approx(metrics | by_that, rel=1e-5)
        # The training is the one of `train`, from the network that there is without it.
        expected = train(
            plain.network(allocation),
            TensorDataset(x, y),
            recovery().config,
            teacher=copy.deepcopy(own.factorisation.model),
        )
        pairs = zip(expected.state_dict().values(), network.state_dict().values(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
        assert own.evaluate(allocation) == plain.evaluate(allocation)
        assert metrics["loss"] < plain.evaluate(allocation, final=True)["loss"]
    after = own.factorisation.model.state_dict()
    assert all(torch.equal(after[k], dense[k]) for k in dense)


def test_epochs_are_measured_on_the_way() -> None:
    own = evaluator(recovery=recovery(4), parts=(0.25, 0.5, 1.0))
    seen: dict[int, float] = {}

    def should_continue(epoch: int, metrics: Mapping[str, float]) -> bool:
        seen[epoch] = metrics["loss"]
        return epoch < 2

    allocation = drawn(own, 1)
    with pytest.raises(PrunedError, match="after 2 of 4 epochs") as stopped:
        own.evaluate(allocation, final=True, should_continue=should_continue)
    assert list(seen) == [1, 2] and stopped.value.metrics["loss"] == seen[2]
    assert seen[2] < seen[1] < own.evaluate(allocation)["loss"]
    whole = own.evaluate(allocation, final=True, should_continue=lambda epoch, metrics: True)
    assert whole == evaluator(recovery=recovery(4)).evaluate(allocation, final=True)


def test_a_training_that_diverges_fails_alone() -> None:
    own = evaluator(recovery=recovery(learning_rate=1e30))
    with pytest.raises(ObjectiveError, match="the loss is nan"):
        own.evaluate(drawn(own, 1), final=True)


def test_copies_elsewhere_keep_no_activations() -> None:
    own = evaluator()
    copied = pickle.loads(pickle.dumps(own))
    assert not own.low_memory and copied.low_memory and not copied.backend.incremental


@pytest.mark.parametrize("batch_norm", [True, False])
def test_lean_copies_of_a_heavy_network_copy_no_weights(
    batch_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"sequential": True, "parts": (0.5, 1.0)}
    own = evaluator(batch_norm, **options)
    allocations = [own.factorisation.space.dense, *(drawn(own, seed) for seed in range(3))]
    monkeypatch.setattr("rankNAS.compression.surgery.LIGHT", 0)
    low_memory = pickle.loads(pickle.dumps(own))
    dense = {p.data_ptr() for p in low_memory.factorisation.model.parameters()}
    assert {p.data_ptr() for p in low_memory.backend.network.parameters()} == dense
    for allocation in allocations:
        for final in (False, True):
            expected = own.evaluate(allocation, final=final)
            assert low_memory.evaluate(allocation, final=final) == pytest.approx(
                expected, abs=1e-4
            )
            assert {p.data_ptr() for p in low_memory.backend.network.parameters()} <= dense
    before = low_memory.factorisation.model.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in own.factorisation.model.state_dict().items())
    stops = []
    with pytest.raises(PrunedError):
        low_memory.forget()
        low_memory.evaluate(
            allocations[1], should_continue=lambda step, _: bool(stops.append(step))
        )
    assert stops == [30]


def test_refitted_factors_are_let_go() -> None:
    own = evaluator(sequential=True)
    own.evaluate(drawn(own, 1), final=True)
    assert all(own.backend._applied[n][0] is f for n, f in own.factorisation.layers.items())
