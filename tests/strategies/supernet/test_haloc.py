"""The search on a super-net: its mathematics in closed form, and the training on tiny networks.

T-H1, T-H3 and T-H4, on the Tucker-2 decomposition, are in ``tests/decompositions/test_tucker.py``.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import softmax
from searches import evaluator_of
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import rankNAS
from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.data.samples import Samples
from rankNAS.data.splits import Splits
from rankNAS.decompositions import OPERATORS, ErrorNorm, Target
from rankNAS.evaluation.context import SearchContext
from rankNAS.exceptions import ObjectiveError, UsageError
from rankNAS.hw_models import CallableModel, compile_latency
from rankNAS.io.files import cache_folder
from rankNAS.search_spaces import RankPolicy, compile_space
from rankNAS.strategies.base import Request
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.supernet.candidates import coarse, picked
from rankNAS.strategies.supernet.haloc import Haloc
from rankNAS.strategies.supernet.losses import (
    alignment,
    expected_costs,
    feature_distance,
    gumbel_softmax,
    penalised,
)
from rankNAS.strategies.supernet.network import FactoredWeight, SuperNet, multiply
from rankNAS.strategies.tables import build_problem
from rankNAS.testing import LAYERS, StrategyContract, random_problem


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def features() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )


def samples(*size: int) -> TensorDataset:
    x = torch.randn(60, *size, generator=generator(1))
    return TensorDataset(x, torch.randint(0, 4, (60,), generator=generator(2)))


def workbench(
    make: Callable[[], nn.Module] = images,
    training: Dataset[Any] | None = None,
    *,
    policy: RankPolicy | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> SearchContext:
    model = seeded(make)
    data = samples(12) if make is features else samples(3, 6, 6)
    x, y = data.tensors
    space = compile_space(model, x[:1], policy=policy or RankPolicy(), min_weights=1)
    factorisation = factorise(model, space)
    held = Samples.of(data)
    splits = Splits(Samples.of(training or data), held, held, held)
    evaluator = evaluator_of(factorisation, x, y)
    report = report or (lambda *_: None)
    return SearchContext(factorisation, splits, evaluator, evaluator.task, report=report)


def problem_of(context: SearchContext, budget: Mapping[str, float]) -> Problem:
    space = context.factorisation.space
    latency = None
    if "latency" in budget:
        hardware = CallableModel(lambda layer, choice: 1e-6 + 1e-9 * layer[choice].macs)
        latency = compile_latency(hardware, space)
    return build_problem(space, context.factorisation.errors(), budget, latency=latency)


def tiny(**kwargs: Any) -> Haloc:
    return Haloc(**({"epochs": 1, "steps": 1, "batch_size": 8} | kwargs))


def proposed(strategy: Haloc, context: SearchContext, problem: Problem) -> list[Allocation]:
    return strategy.bind_context(context).propose(problem, History(), 1, np.random.default_rng(0))


def checkpoint() -> dict[str, Any]:
    (path,) = (cache_folder() / "checkpoints").glob("*.pt")
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


BENCH = workbench()


class TestHaloc(StrategyContract):
    strategy = Haloc(epochs=1, steps=1, batch_size=8).bind_context(BENCH)
    problems = {
        "one_budget": problem_of(BENCH, {"macs": 0.5}),
        "two_budgets": problem_of(BENCH, {"macs": 0.6, "params": 0.5}),
        "latency": problem_of(BENCH, {"latency": 0.5}),
    }


# ------------------------------------------------------------------------------------ candidates


def test_t_h2_counts_and_coarse_equal_ranks() -> None:
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(64, 2)
    )
    policy = RankPolicy(multiple_of=8, operators=("tucker2",))
    space = compile_space(model, torch.zeros(1, 64, 1, 1), policy=policy, min_weights=1)
    found = factorise(model, space)
    problem = build_problem(space, found.errors(), {"params": 0.5})
    assert problem.costs["params"][0][0] == 36_864
    shapes = {name: layer.shape for name, layer in space.layers.items()}
    reduced = coarse(problem, shapes, ("tucker2", "svd"), 8)
    assert {str(c) for c in reduced.choices["0"]} == {
        "dense",
        *(f"tucker2:{r}x{r}" for r in range(8, 57, 8)),
    }
    params = dict(zip(reduced.choices["0"], reduced.costs["params"][0], strict=True))
    assert params[Choice("tucker2", (16, 16))] == 4_352
    # Break-even, (-(f + c) + sqrt((f + c)^2 + 4 k^2 f c k^2)) / (2 k^2), is at 57.28.
    root = (-128 + math.sqrt(128**2 + 4 * 9 * 64 * 64 * 9)) / 18
    assert root == pytest.approx(57.28, abs=0.005)
    assert coarse(problem, shapes, ("tucker2",)).choices == reduced.choices  # an eighth of 64


def test_candidates_are_choices_near_equal_ranks_with_dense_and_the_cheapest() -> None:
    problem = problem_of(BENCH, {"macs": 0.5, "params": 0.5})
    shapes = {n: layer.shape for n, layer in BENCH.factorisation.space.layers.items()}
    reduced = coarse(problem, shapes, ("tucker2", "svd"))
    assert list(reduced.choices) == list(problem.choices)
    assert reduced.limits == problem.limits
    for i, (name, choices) in enumerate(reduced.choices.items()):
        assert choices[0] == DENSE
        assert set(choices) <= set(problem.choices[name])
        assert 3 <= len(choices) <= 10
        rows = [j for j, c in enumerate(problem.choices[name]) if c.operator in ("tucker2", "svd")]
        for cost in ("macs", "params"):
            assert reduced.costs[cost][i].min() == problem.costs[cost][i][rows].min()
        for j, choice in enumerate(choices):
            row = problem.choices[name].index(choice)
            assert reduced.errors[i][j] == problem.errors[i][row]
            assert reduced.costs["macs"][i][j] == problem.costs["macs"][i][row]
    assert all(c.operator in ("dense", "svd") for c in reduced.choices["5"])  # 1 x 1
    ranks = [c.rank for c in reduced.choices["3"] if c.operator == "tucker2"]
    assert all(max(rank) - min(rank) <= 2 for rank in ranks)  # 16 x 12, offered in twelfths


def test_a_smaller_rank_that_is_no_faster_leaves() -> None:
    problem = problem_of(BENCH, {"latency": 0.5})
    staircase = tuple(np.ceil(t * 1e6 / 20) for t in problem.costs["latency"])
    problem = replace(problem, costs=problem.costs | {"latency": staircase})
    shapes = {n: layer.shape for n, layer in BENCH.factorisation.space.layers.items()}
    reduced = coarse(problem, shapes, ("tucker2", "svd"))
    for errors, latency in zip(reduced.errors, reduced.costs["latency"], strict=True):
        order = np.argsort(latency)
        assert (np.diff(latency[order]) > 0).all()
        assert (np.diff(errors[order]) < 0).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    choices=st.integers(2, 5),
    budgets=st.integers(1, 2),
    sharpness=st.sampled_from([0.1, 1.0, 1e3]),
)
def test_the_answer_is_the_likely_one_within_the_budgets(
    seed: int, layers: int, choices: int, budgets: int, sharpness: float
) -> None:
    problem = random_problem(seed, layers=layers, choices=choices, budgets=budgets)
    logits = [
        sharpness * torch.randn(len(e), generator=generator(seed + i))
        for i, e in enumerate(problem.errors)
    ]
    limits = list(problem.limits.values())
    tables = [[c / t for c in table] for table, t in zip(problem.budgeted(), limits, strict=True)]
    units = [np.sum(costs, axis=0) for costs in zip(*tables, strict=True)]

    def expected(m: float) -> list[np.ndarray]:
        scores = [x.double().numpy() + m * c for x, c in zip(logits, units, strict=True)]
        return [softmax(x) for x in scores]

    def excess(m: float) -> float:
        q = expected(m)
        return max(sum(c @ x for c, x in zip(table, q, strict=True)) for table in tables) - 1

    steepest = 5 / max(c.max() for c in units)
    if excess(-steepest) > 0:
        m = -steepest
    else:
        m = steepest if excess(steepest) <= 0 else brentq(excess, -steepest, steepest)
    means = [float(c @ q) for c, q in zip(units, expected(m), strict=True)]

    argmax = tuple(int(x.argmax()) for x in logits)
    spends = max(sum(c[i] for c, i in zip(t, argmax, strict=True)) for t in tables) >= 0.9

    def total(indices: Sequence[int]) -> float:
        if spends:
            logarithms = [x.double().log_softmax(0) for x in logits]
            return -float(sum(x[i] for x, i in zip(logarithms, indices, strict=True)))
        near = zip(units, means, indices, strict=True)
        return float(sum(abs(c[i] - mean) for c, mean, i in near))

    every = list(itertools.product(*(range(len(e)) for e in problem.errors)))
    found = picked(problem, logits)
    assert problem.meets(found)
    assert total(found) == pytest.approx(min(map(total, filter(problem.meets, every))), abs=1e-4)
    free = picked(problem, logits, within=False)
    assert total(free) == pytest.approx(min(map(total, every)), abs=1e-4)
    if spends:
        assert free == argmax


def test_soft_logits_that_lean_to_the_cheapest_spend_the_budget() -> None:
    choices = tuple(map(Choice.parse, ["dense", *(f"svd:{r}" for r in range(8, 0, -1))]))
    costs = np.linspace(1, 0, 9)
    for fraction in (0.2, 0.5, 0.8):
        problem = Problem(
            choices={f"{i}": choices for i in range(6)},
            errors=(np.linspace(0, 1, 9),) * 6,
            costs={"macs": (costs,) * 6},
            remainder_cost={"macs": 0.0},
            budget={"macs": fraction},
        )
        chosen = picked(problem, [torch.linspace(0, 0.1, 9)] * 6)
        assert 6 * fraction - 6 / 8 < sum(costs[i] for i in chosen) <= 6 * fraction + 1e-9


# ------------------------------------------------------------------------------------- objective


def test_t_h5_expected_latency_and_its_gradient() -> None:
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    table = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    cost = expected_costs([logits.softmax(0)], [table], torch.zeros(1, dtype=torch.float64))
    assert cost.item() == 2.0
    (gradient,) = torch.autograd.grad(cost.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([-0.5, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("penalty", ["power", "log"])
def test_t_h5_costs_within_the_target_change_nothing(penalty: Any) -> None:
    ratios = torch.tensor([1.0, 0.3])
    assert penalised(torch.tensor(0.7), ratios, penalty).item() == pytest.approx(0.7)


def test_t_h5_twice_the_target() -> None:
    one, two = torch.tensor(1.0), torch.tensor([2.0])
    assert penalised(one, two).item() == pytest.approx(2.8284, abs=5e-5)
    both = penalised(one, torch.tensor([2.0, 3.0]))
    assert both.item() == pytest.approx(6**1.5)


def test_ars_penalty() -> None:
    def penalty(cost: float, target: float) -> float:
        return penalised(torch.tensor(0.0), torch.tensor([cost / target]), "log", 1.0).item()

    assert penalty(120, 100) == pytest.approx(math.log(1.2))
    assert penalty(80, 100) == 0


def test_ars_alignment() -> None:
    assert alignment(torch.tensor([1.0, 0, 1]), torch.tensor([3.0, 2, 1])).item() == 5


@settings(deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=8))
def test_only_truncations_are_aligned(mask: list[bool]) -> None:
    s = torch.arange(len(mask), 0, -1).double()
    truncation = mask == sorted(mask, reverse=True)
    assert (alignment(torch.tensor(mask).double(), s).item() == 0) == truncation


def test_gumbel_softmax_samples_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    g = generator()
    draws = torch.stack([gumbel_softmax(logits, 0.1, g) for _ in range(4000)])
    torch.testing.assert_close(draws.sum(1), torch.ones(4000))
    counts = functional.one_hot(draws.argmax(1), 3).float().mean(0)
    torch.testing.assert_close(counts, logits.softmax(0), rtol=0, atol=0.03)
    warm = gumbel_softmax(logits, 1e4, g)
    torch.testing.assert_close(warm, torch.full((3,), 1 / 3), rtol=0, atol=1e-2)


# ------------------------------------------------------------------------------------- super-net


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_product_of_a_chain_is_the_approximated_weight(operator: str, layer: str) -> None:
    shape, module = LAYERS[layer].shape(), LAYERS[layer].module()
    if OPERATORS[operator].refuses(shape) is not None:
        return
    ranks = [family[len(family) // 2] for family in OPERATORS[operator].families(shape)]
    factors = OPERATORS[operator].factorise(
        shape, Target(shape.fold(module.weight), ErrorNorm()), ranks
    )
    for rank in ranks:
        stages = OPERATORS[operator].stages(shape, rank)
        product = multiply(stages, factors.stage_weights(rank), shape.groups)
        torch.testing.assert_close(product.flatten(2), factors.weight(rank))
        chain = factors.truncate(rank, module.bias, torch.float64)
        weights = [child.weight for child in chain.children()]
        product = multiply(stages, weights, shape.groups)
        torch.testing.assert_close(product.flatten(2), factors.weight(rank))


def restricted(factorisation: Factorisation, most: int) -> SuperNet:
    keep = {
        n: layer.choices[:: max(1, len(layer) // most)]
        for n, layer in factorisation.space.layers.items()
    }
    return SuperNet(factorisation.model, factorisation.space.restrict(keep))


def float64(make: Callable[[], nn.Module], *size: int) -> tuple[Factorisation, Tensor]:
    model = seeded(make).double()
    x = torch.randn(6, *size, generator=generator(3), dtype=torch.float64)
    return factorise(model, compile_space(model, x[:1], min_weights=1)), x


def test_one_layer_outputs_the_weighted_sum_of_its_candidates_outputs() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 2))

    factorisation, x = float64(make, 8, 4, 4)
    net = restricted(factorisation, 5)
    factors = net.decompose()
    choices = net.space.layers["0"].choices
    assert len(choices) > 3
    p = torch.randn(len(choices), generator=generator()).double().softmax(0)
    weights = {
        name: torch.tensordot(torch.ones(len(t), dtype=t.dtype) / len(t), t, 1)
        for name, t in net.truncations(factors).items()
    }
    weights["0"] = torch.tensordot(p, net.truncations(factors)["0"], 1)
    _, maps = net.forward(x, weights)
    outputs = [
        (factors.layers["0"].module(c).double() if c != DENSE else factorisation.model[0])(x)
        for c in choices
    ]
    expected = sum(q * y for q, y in zip(p, outputs, strict=True))
    torch.testing.assert_close(maps["0"][0], expected)


def test_the_dense_candidates_are_the_original_network() -> None:
    factorisation, x = float64(images, 3, 6, 6)
    net = restricted(factorisation, 4)
    weights = {name: stack[0] for name, stack in net.truncations(net.decompose()).items()}
    _, maps = net.forward(x, weights)
    assert feature_distance(maps, net.original(x)).item() == 0
    zero = {name: torch.zeros_like(w) for name, w in weights.items()}
    _, maps = net.forward(x, {**weights, "0": zero["0"]})
    first = {"0": maps["0"]}
    assert feature_distance(first, {"0": net.original(x)["0"]}).item() == pytest.approx(1)


class Conv1D(nn.Module):
    """Like the linear layer of Hugging Face's GPT-2: the weight has its outputs last."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 24
        self.weight = nn.Parameter(torch.randn(16, 24))
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Tied(nn.Module):
    """Two layers that share one weight, a transposed one, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.c, self.head = Conv1D(), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.relu(self.b(torch.relu(self.a(x))))).relu())


def test_shared_and_transposed_weights() -> None:
    factorisation, x = float64(Tied, 16)
    assert "c" in factorisation.layers
    net = restricted(factorisation, 4)
    factors = net.decompose()
    allocation = Allocation.of({n: layer.choices[1] for n, layer in net.space.layers.items()})
    expected = factors.materialise(allocation).double()(x)
    weights = {
        name: FactoredWeight.of(found, allocation[name]).product()
        for name, found in factors.layers.items()
    }
    torch.testing.assert_close(net.forward(x, weights)[0], expected)
    net.absorb(weights)
    torch.testing.assert_close(net.network(x), expected)


def test_the_model_and_the_running_averages_are_left_alone() -> None:
    context = workbench()
    model = context.factorisation.model
    before = copy.deepcopy(model.state_dict())
    assert proposed(tiny(epochs=2, steps=2), context, problem_of(context, {"macs": 0.5}))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m.training or m._forward_hooks for m in model.modules())
    network = checkpoint()["network"]
    assert torch.equal(network["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(network["1.weight"], before["1.weight"])


# ------------------------------------------------------------------------------- limits of T-H6


def test_t_h6_a_single_candidate_is_plain_fine_tuning() -> None:
    factorisation, x = float64(images, 3, 6, 6)
    y = torch.randint(0, 4, (len(x),), generator=generator(5))
    allocation = Allocation.of(
        {n: layer.choices[len(layer) // 2] for n, layer in factorisation.space.layers.items()}
    )
    assert "tucker2" in {c.operator for c in allocation.values()}

    def train(parameters: list[Tensor], output: Callable[[], Tensor]) -> list[float]:
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        losses = []
        for _ in range(5):
            loss = functional.cross_entropy(output(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain = factorisation.materialise(allocation).double().eval().requires_grad_()
    plain[1].train()  # the batch norm
    expected = train(list(plain.parameters()), lambda: plain(x))

    space = factorisation.space.restrict({n: [c] for n, c in allocation.items()})
    net = SuperNet(factorisation.model, space)
    chosen = {
        name: FactoredWeight.of(found, allocation[name])
        for name, found in net.decompose().layers.items()
    }
    others = [p.requires_grad_() for p in net.others()]
    leaves = [w for factored in chosen.values() for w in factored.weights]
    losses = train(
        [*leaves, *others],
        lambda: net.forward(x, {n: w.product() for n, w in chosen.items()})[0],
    )
    assert losses == pytest.approx(expected, rel=1e-9)
    assert losses[-1] < losses[0]
    net.absorb({n: w.product().detach() for n, w in chosen.items()})
    plain[1].eval().track_running_stats = False
    plain[1].running_mean = plain[1].running_var = None
    torch.testing.assert_close(net.network(x), plain(x))


@pytest.mark.parametrize("penalty", ["power", "log"])
def test_t_h6_equal_latencies_move_the_logits_only_through_the_cross_entropy(penalty: Any) -> None:
    factorisation, x = float64(images, 3, 6, 6)
    y = torch.randint(0, 4, (len(x),), generator=generator(5))
    net = restricted(factorisation, 4)
    truncations = net.truncations(net.decompose())
    logits = [torch.zeros(len(t)).double().requires_grad_() for t in truncations.values()]
    p = [z.softmax(0) for z in logits]
    weights = {
        name: torch.tensordot(q, t, 1) for q, (name, t) in zip(p, truncations.items(), strict=True)
    }
    cross_entropy = functional.cross_entropy(net.forward(x, weights)[0], y)
    tables = [torch.full((1, len(z)), 0.7).double() for z in logits]
    ratios = expected_costs(p, tables, torch.zeros(1).double())
    factor = (0.7 * len(logits)) ** 1.5 if penalty == "power" else 1.0
    assert ratios.item() > 1
    alone = torch.autograd.grad(cross_entropy, logits, retain_graph=True)
    together = torch.autograd.grad(penalised(cross_entropy, ratios, penalty), logits)
    assert max(float(g.abs().max()) for g in alone) > 0
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(b, factor * a)


def test_t_h6_with_a_flat_cross_entropy_the_lowest_latency_wins() -> None:
    def flat() -> nn.Module:
        model = images()
        nn.init.zeros_(model[-1].weight)
        return model

    context = workbench(flat)
    problem = problem_of(context, {"latency": 0.5})
    least = [int(t.argmin()) for t in problem.costs["latency"]]
    problem = replace(problem, budget={"latency": problem.fractions(least)["latency"] * 1.2})
    strategy = tiny(steps=60, learning_rate=0.1)
    assert proposed(strategy, context, problem)
    layers = context.factorisation.space.layers
    shapes = {n: layer.shape for n, layer in layers.items()}
    reduced = coarse(problem, shapes, strategy.operators)
    logits = checkpoint()["logits"]
    assert [int(z.argmax()) for z in logits] == [int(t.argmin()) for t in reduced.costs["latency"]]


def test_without_pressure_on_the_cost_the_logits_learn_what_the_network_needs() -> None:
    """A layer that has to be nearly dense: its input is what the classes are read from."""
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16)))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))
        model[1].weight.copy_(8 * torch.eye(16))
        model[1].bias.zero_()
    y = torch.arange(16).repeat(8)
    x = functional.one_hot(y, 16).float()
    space = compile_space(model, x[:1], min_weights=1)
    factorisation = factorise(model, space)
    evaluator = evaluator_of(factorisation, x, y)
    splits = Splits(*[Samples.of((x, y))] * 4)
    context = SearchContext(factorisation, splits, evaluator, evaluator.task)
    problem = problem_of(context, {"macs": 1.0})
    (allocation,) = proposed(tiny(steps=60, batch_size=32, learning_rate=0.1), context, problem)
    assert allocation["0"] == DENSE


# ----------------------------------------------------------------------- interruption, failures


class Stopped(Exception):  # noqa: N818
    """As if the process had been killed."""


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_search_equals_an_uninterrupted_one(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = tiny(epochs=3, steps=2)
    problem = problem_of(BENCH, {"macs": 0.4})
    whole = proposed(strategy, BENCH, problem)
    expected = checkpoint()
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path))

    def stop(stage: str, done: int, total: int) -> None:
        assert (stage, total) == ("haloc", 12)
        if done == 4 * after + 3:  # in the middle of the next epoch
            raise Stopped

    with pytest.raises(Stopped):
        proposed(strategy, replace(BENCH, report=stop), problem)
    assert checkpoint()["epoch"] == after
    seen: list[int] = []
    resumed = replace(BENCH, report=lambda stage, done, total: seen.append(done))
    assert proposed(strategy, resumed, problem) == whole
    assert seen == list(range(4 * after + 1, 13))
    found = checkpoint()
    assert found["epoch"] == expected["epoch"] == 3
    for a, b in zip(found["logits"], expected["logits"], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(found["network"][k], v) for k, v in expected["network"].items())


def test_another_problem_or_configuration_starts_anew() -> None:
    for strategy, share in ((tiny(), 0.4), (tiny(), 0.5), (tiny(steps=2), 0.5)):
        proposed(strategy, BENCH, problem_of(BENCH, {"macs": share}))
    assert len(list((cache_folder() / "checkpoints").glob("*.pt"))) == 3


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "flipped", "another", "evil"])
def test_a_damaged_checkpoint_is_named_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    problem = problem_of(BENCH, {"macs": 0.5})
    expected = proposed(tiny(), BENCH, problem)
    logits = checkpoint()["logits"]
    (path,) = (cache_folder() / "checkpoints").glob("*.pt")
    content = path.read_bytes()
    at = content.index(logits[0].numpy().tobytes())
    bad = {
        "text": b"no checkpoint",
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "flipped": content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :],
        "evil": pickle.dumps({"identity": Evil(tmp_path / "ran")}),
    }
    if damage == "another":
        torch.save(checkpoint() | {"identity": "another version"}, path)
    else:
        path.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING):
        assert proposed(tiny(), BENCH, problem) == expected
    assert "starts anew" in caplog.text and str(path) in caplog.text
    again = checkpoint()["logits"]
    assert all(torch.equal(a, b) for a, b in zip(logits, again, strict=True))
    assert not (tmp_path / "ran").exists()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


class Spoilt(Dataset[Any]):
    """Good samples until told otherwise, then NaN."""

    def __init__(self) -> None:
        self.good, self.spoilt = samples(3, 6, 6), False

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.good[index]
        return (x * math.nan if self.spoilt else x), y


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint() -> None:
    data = Spoilt()

    def spoil(stage: str, done: int, total: int) -> None:
        data.spoilt = done >= 4

    context = workbench(training=data, report=spoil)
    problem = problem_of(context, {"macs": 0.5})
    strategy = tiny(epochs=3, steps=2)
    with pytest.raises(ObjectiveError, match="loss is not finite in epoch 2 of 3") as caught:
        proposed(strategy, context, problem)
    (path,) = (cache_folder() / "checkpoints").glob("*.pt")
    assert "in layer '0'" in str(caught.value)
    assert f"after epoch 1 is kept in {path}" in str(caught.value)
    good = checkpoint()
    assert good["epoch"] == 1
    assert all(v.isfinite().all() for v in good["network"].values())
    assert all(v.isfinite().all() for v in good["logits"])
    data.spoilt = False
    assert proposed(strategy, replace(context, report=lambda *_: None), problem)
    assert checkpoint()["epoch"] == 3


def test_the_layer_where_values_stop_being_finite_is_named() -> None:
    context = workbench()
    with torch.no_grad():
        context.factorisation.model[3].bias[0] = math.inf
    with pytest.raises(ObjectiveError, match="loss.*epoch 1 of 1, in layer '3'; there is no"):
        proposed(tiny(), context, problem_of(context, {"macs": 0.5}))


@pytest.mark.parametrize(
    ("rates", "what"),
    [({"learning_rate": 1e37, "steps": 3}, "a logit"), ({"weight_rate": 1e38}, "a weight")],
)
def test_what_diverges_is_named(rates: dict[str, Any], what: str) -> None:
    problem = problem_of(BENCH, {"macs": 0.5})
    with pytest.raises(ObjectiveError, match=f"{what} is not finite in epoch 1 of 1, in layer '"):
        proposed(tiny(**rates), BENCH, problem)
    assert not (cache_folder() / "checkpoints").exists()


# ---------------------------------------------------------------------------------- the strategy


def test_not_tied_to_images() -> None:
    context = workbench(features)
    (allocation,) = proposed(tiny(), context, problem_of(context, {"params": 0.5}))
    assert {c.operator for c in allocation.values()} == {"svd", "dense"} or all(
        c.operator == "svd" for c in allocation.values()
    )


def test_one_proposal_a_problem() -> None:
    problem = problem_of(BENCH, {"macs": 0.5})
    bound = tiny().bind_context(BENCH)
    rng = np.random.default_rng(0)
    (allocation,) = bound.propose(problem, History(), 4, rng)
    failed = Trial(0, allocation, "failed", budget_key=problem.budget_key)
    assert bound.propose(problem, History((failed,)), 4, rng) == []
    # the same allocation, asked for by another budget
    other = replace(failed, budget_key="macs<=0.9")
    assert bound.propose(problem, History((other,)), 4, rng) == []


def test_a_bound_strategy_pickles_and_equals_by_configuration() -> None:
    bound = tiny().bind_context(replace(BENCH, report=lambda *_: None))
    again = pickle.loads(pickle.dumps(bound))
    assert again == bound == tiny().bind_context(workbench()) != tiny(steps=2).bind_context(BENCH)
    assert (again.name, again.operators) == ("haloc", ("tucker2", "svd"))
    problem = problem_of(BENCH, {"macs": 0.5})
    rng = np.random.default_rng(0)
    assert again.propose(problem, History(), 1, rng) == bound.propose(problem, History(), 1, rng)


def test_a_whole_search(small_net: nn.Module, small_data: tuple[Any, Any]) -> None:
    study = rankNAS.search(
        small_net,
        small_data,
        budget=[{"macs": 0.5}, {"macs": 0.3}],
        strategy=Haloc(epochs=2, steps=2, batch_size=16),
        n_trials=3,
        settings=rankNAS.Settings(calibration=64, validation=50),
    )
    for problem in study.problems:
        assert len(study.history.candidates(problem)) <= 1
        assert study.history.feasible(problem)


def test_what_a_search_needs() -> None:
    good = Request({"macs": 0.5}, ["accuracy"], 128)
    Haloc().check(good)
    for request, message in (
        (replace(good, budget={}), "needs a budget.*macs=0.5"),
        (replace(good, training=127), "128 samples, but there are 127; lower `batch_size`"),
    ):
        with pytest.raises(UsageError, match=message):
            Haloc().check(request)
    with pytest.raises(UsageError, match="there are 60; lower"):
        Haloc().bind_context(BENCH)
    problem = problem_of(BENCH, {"macs": 0.5})
    with pytest.raises(UsageError, match="needs a budget"):
        proposed(tiny(), BENCH, replace(problem, budget={}))
    with pytest.raises(UsageError, match=r"no model and no training data.*bind"):
        Haloc().propose(problem, History(), 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("steps", 0),
        ("granularity", 0),
        ("batch_size", 1),
        ("strength", 0.0),
        ("learning_rate", math.nan),
        ("weight_rate", math.inf),
        ("features", -1.0),
        ("penalty", "square"),
    ],
)
def test_numbers_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"`{name}`"):
        Haloc(**{name: value})
