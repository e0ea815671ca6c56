"""Contracts as test classes, for authors of extensions. Needs pytest.

Subclass one in a test file and say what is tested::

    class TestMyOperator(OperatorContract):
        operator = MyOperator()

    class TestMyStrategy(StrategyContract):
        strategy = MyStrategy()

    class TestMyHardware(HardwareContract):
        hardware = MyHardware()

    class TestMyObjective(ObjectiveContract):
        objective = MyObjective()

RankNAS holds its own to the same classes.
"""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.decompositions import (
    NORMS,
    ErrorNorm,
    LayerShape,
    NormName,
    Operator,
    Rank,
    Statistics,
    Target,
    make_norm,
)
from rankNAS.hw_models.base import HardwareModel
from rankNAS.objectives.base import Direction, EvaluationResult, ObjectiveBase
from rankNAS.search_spaces.base import Layer
from rankNAS.search_spaces.policies import RankPolicy, candidate_choices
from rankNAS.strategies.base import Array, History, Problem, Strategy, Trial

__all__ = [
    "LAYERS",
    "HardwareContract",
    "ObjectiveContract",
    "OperatorContract",
    "StrategyContract",
    "LayerCase",
    "definition_of_error",
    "random_problem",
    "random_statistics",
    "random_trial",
]

T = TypeVar("T")


# ---------------------------------------------------------------------------------- operators


@dataclass(frozen=True)
class LayerCase:
    """A layer and the size of an input for it.

    Args:
        make: Makes the layer with random weights.
        input_shape: Batch included.
    """

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]

    def module(self, seed: int = 0) -> nn.Module:
        """The layer in float64, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().double().requires_grad_(False)

    def shape(self) -> LayerShape:
        """Its shape, called once on an input of `input_shape`."""
        module = self.module()
        linear = not isinstance(module, nn.Conv1d | nn.Conv2d)
        size = self.input_shape
        call = (math.prod(size[:-1]),) if linear else (size[0], *size[2:])
        return LayerShape.of(module, (call,))

    def input(self) -> Tensor:
        """A random input."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.input_shape, generator=generator, dtype=torch.float64)


LAYERS: dict[str, LayerCase] = {
    "linear": LayerCase(lambda: nn.Linear(12, 7), (3, 12)),
    "linear_tall": LayerCase(lambda: nn.Linear(6, 11, bias=False), (2, 4, 6)),
    "conv1d": LayerCase(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "conv2d": LayerCase(lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 6)),
    "conv2d_strided": LayerCase(
        lambda: nn.Conv2d(
            4, 9, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), bias=False
        ),
        (2, 4, 9, 8),
    ),
    "conv2d_grouped": LayerCase(
        lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2), (2, 8, 6, 7)
    ),
    "conv2d_same": LayerCase(
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(2, 1)), (2, 4, 7, 8)
    ),
    "conv2d_reflect": LayerCase(
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 6, 6)
    ),
    "conv2d_1x1": LayerCase(lambda: nn.Conv2d(8, 6, 1, stride=2, bias=False), (2, 8, 5, 5)),
    "conv2d_depthwise": LayerCase(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 5)),
}


def random_statistics(shape: LayerShape, *, samples: int | None = None) -> Statistics:
    """Statistics of correlated random inputs with a mean and of correlated random gradients.

    Args:
        shape: The layer's shape.
        samples: How many; fewer than a side gives a singular moment, 0 gives zeros.
    """
    generator = torch.Generator().manual_seed(2)

    def draw(size: int, offset: float) -> Tensor:  # (g, size, samples)
        count = 4 * size if samples is None else samples
        shapes = (shape.groups, size, size), (shape.groups, size, count)
        mix, z = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return mix @ z / math.sqrt(size) + offset

    def moment(X: Tensor) -> Tensor:
        return X @ X.mT / max(1, X.shape[-1])

    X, Y = draw(shape.width, 0.5), draw(shape.outputs // shape.groups, 0.0)
    return Statistics(moment(X), X.sum(-1) / max(1, X.shape[-1]), moment(Y))


def definition_of_error(norm: ErrorNorm, W: Tensor, approximation: Tensor) -> float:
    """||H (W - What) C^1/2||_F^2 / ||H W C^1/2||_F^2, written out."""
    g, o, n = W.shape
    eye = torch.eye
    H = eye(o, dtype=W.dtype).expand(g, o, o) if norm.H is None else norm.H
    C = eye(n, dtype=W.dtype).expand(g, n, n) if norm.C is None else norm.C

    def squared(X: Tensor) -> float:
        HX = H @ X
        return float(torch.einsum("goi,gij,goj->", HX, C, HX))

    return squared(W - approximation) / squared(W)


class OperatorContract:
    """What every operator promises, tried on every kind of layer and in every metric.

    Set `operator`. `layers` may be narrowed or extended; those that the operator refuses are left
    out.
    """

    operator: ClassVar[Operator]
    layers: ClassVar[dict[str, LayerCase]] = LAYERS

    def multiples(self, rank: Rank) -> Rank:
        """The entries of a rank that `multiple_of` applies to; override if not all of them."""
        return rank

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test that takes a layer runs on all that the operator does not refuse."""
        if "layer" in metafunc.fixturenames:
            usable = [
                n for n, x in self.layers.items() if self.operator.refuses(x.shape()) is None
            ]
            assert usable, "the operator refuses every layer"
            metafunc.parametrize("layer", usable, indirect=True)

    @pytest.fixture
    def layer(self, request: pytest.FixtureRequest) -> LayerCase:
        """A layer that the operator does not refuse."""
        return self.layers[request.param]

    @pytest.fixture(params=NORMS)
    def norm(self, request: pytest.FixtureRequest, layer: LayerCase) -> ErrorNorm:
        """Each metric, with statistics of random inputs."""
        return make_norm(cast(NormName, request.param), random_statistics(layer.shape()))

    def families(self, shape: LayerShape) -> list[list[Rank]]:
        """A few families, each thinned to a few ranks; first and last are kept."""
        return [_thinned(family, 4) for family in _thinned(self.operator.families(shape), 2)]

    def ranks(self, shape: LayerShape) -> list[Rank]:
        """All ranks of `families`."""
        return [rank for family in self.families(shape) for rank in family]

    def test_offers_distinct_ranks(self, layer: LayerCase) -> None:
        ranks = list(itertools.chain(*self.operator.families(layer.shape())))
        assert ranks
        assert len(set(ranks)) == len(ranks)
        assert all(isinstance(r, int) and r > 0 for rank in ranks for r in rank)

    @pytest.mark.parametrize("multiple_of", [2, 3, 4])
    def test_ranks_are_multiples(self, layer: LayerCase, multiple_of: int) -> None:
        for family in self.operator.families(layer.shape(), multiple_of):
            for rank in family:
                assert all(r % multiple_of == 0 for r in self.multiples(rank))

    def test_cost_increases_along_each_family(self, layer: LayerCase) -> None:
        shape = layer.shape()
        for family in self.operator.families(shape):
            costs = [self.operator.cost(shape, rank) for rank in family]
            for smaller, larger in itertools.pairwise(costs):
                assert smaller.macs <= larger.macs
                assert smaller.params < larger.params

    def test_cost_is_that_of_the_module(self, layer: LayerCase) -> None:
        shape = layer.shape()
        for rank in self.ranks(shape):
            module = self.operator.build(shape, rank).double()
            with FlopCounterMode(display=False) as counter:
                module(layer.input().to("meta"))
            cost = self.operator.cost(shape, rank)
            assert 2 * cost.macs == counter.get_total_flops()
            assert cost.params == sum(p.numel() for p in module.parameters())
            assert cost.weight_bytes == cost.params * shape.itemsize

    def test_truncating_fills_what_build_builds(self, layer: LayerCase) -> None:
        shape, module = layer.shape(), layer.module()
        ranks = self.ranks(shape)
        factors = self.operator.factorise(
            shape, Target(_folded(shape, module), ErrorNorm()), ranks
        )
        for rank in ranks:
            filled = factors.truncate(rank, _bias(module))
            empty = self.operator.build(shape, rank)
            assert all(p.is_meta for p in empty.parameters())
            assert repr(filled) == repr(empty)
            assert {k: v.shape for k, v in filled.state_dict().items()} == {
                k: v.shape for k, v in empty.state_dict().items()
            }

    def test_the_chain_computes_the_multiplied_out_weight(
        self, layer: LayerCase, norm: ErrorNorm
    ) -> None:
        shape, module, x = layer.shape(), layer.module(), layer.input()
        ranks = self.ranks(shape)
        factors = self.operator.factorise(shape, Target(_folded(shape, module), norm), ranks)
        for rank in ranks:
            reference = layer.module()
            reference.weight = nn.Parameter(
                shape.unfold(factors.weight(rank)), requires_grad=False
            )
            truncated = factors.truncate(rank, _bias(module)).requires_grad_(False)
            single = next(truncated.parameters()).dtype == torch.float32
            expected = reference(x)
            actual = truncated(x.float() if single else x).double()
            tolerance = (1e-4 if single else 1e-9) * float(expected.abs().max())
            torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)

    def test_error_is_its_definition(self, layer: LayerCase, norm: ErrorNorm) -> None:
        shape = layer.shape()
        weight = _folded(shape, layer.module())
        ranks = self.ranks(shape)
        factors = self.operator.factorise(shape, Target(weight, norm), ranks)
        for rank in ranks:
            direct = definition_of_error(norm, weight.flatten(2), factors.weight(rank))
            assert factors.error(rank) == pytest.approx(direct, rel=1e-6, abs=1e-9)

    def test_full_rank_is_exact(self, layer: LayerCase, norm: ErrorNorm) -> None:
        shape = layer.shape()
        weight = _folded(shape, layer.module())
        full = self.operator.families(shape)[-1][-1]
        factors = self.operator.factorise(shape, Target(weight, norm), [full])
        assert factors.error(full) == pytest.approx(0, abs=1e-9)
        torch.testing.assert_close(factors.weight(full), weight.flatten(2), rtol=0, atol=1e-6)

    def test_error_does_not_increase_along_a_family(
        self, layer: LayerCase, norm: ErrorNorm
    ) -> None:
        shape = layer.shape()
        families = self.operator.families(shape)
        ranks = [rank for family in families for rank in family]
        factors = self.operator.factorise(
            shape, Target(_folded(shape, layer.module()), norm), ranks
        )
        for family in families:
            errors = [factors.error(rank) for rank in family]
            assert all(0 <= e <= 1 for e in errors)
            assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))

    def test_the_ranks_asked_for_do_not_change_each_other(self, layer: LayerCase) -> None:
        shape = layer.shape()
        weight, ranks = _folded(shape, layer.module()), self.ranks(shape)
        norm = make_norm("fisher", random_statistics(shape))
        together = self.operator.factorise(shape, Target(weight, norm), ranks)
        for rank in ranks:
            alone = self.operator.factorise(shape, Target(weight, norm), [rank])
            assert alone.error(rank) == pytest.approx(together.error(rank), rel=1e-6, abs=1e-9)

    @pytest.mark.parametrize("samples", [0, 1, 3])
    @pytest.mark.parametrize("centred", [False, True])
    def test_singular_statistics_give_finite_factors(
        self, layer: LayerCase, samples: int, centred: bool
    ) -> None:
        shape = layer.shape()
        statistics = random_statistics(shape, samples=samples)
        norm = make_norm("fisher", statistics, centred=centred)
        weight = _folded(shape, layer.module())
        ranks = self.ranks(shape)
        factors = self.operator.factorise(shape, Target(weight, norm), ranks)
        for rank in ranks:
            approximation = factors.weight(rank)
            assert approximation.isfinite().all()
            assert all(w.isfinite().all() for w in factors.stage_weights(rank))
            direct = definition_of_error(norm, weight.flatten(2), approximation)
            assert factors.error(rank) == pytest.approx(direct, rel=1e-4, abs=1e-6)

    def test_a_zero_weight_gives_zero_factors(self, layer: LayerCase, norm: ErrorNorm) -> None:
        shape = layer.shape()
        ranks = self.ranks(shape)
        zero = torch.zeros_like(_folded(shape, layer.module()))
        factors = self.operator.factorise(shape, Target(zero, norm), ranks)
        for rank in ranks:
            assert factors.error(rank) == 0
            assert (factors.weight(rank) == 0).all()
            assert all(w.isfinite().all() for w in factors.stage_weights(rank))

    def test_is_stateless_and_pickles(self, layer: LayerCase) -> None:
        shape = layer.shape()
        weight, ranks = _folded(shape, layer.module()), self.ranks(shape)
        before = weight.clone()
        copy: Operator = pickle.loads(pickle.dumps(self.operator))
        results = [
            operator.factorise(shape, Target(weight, ErrorNorm()), ranks).weight(ranks[0])
            for operator in (self.operator, self.operator, copy)
        ]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert torch.equal(weight, before)


def _thinned(items: list[T], count: int) -> list[T]:
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _folded(shape: LayerShape, module: nn.Module) -> Tensor:
    return shape.fold(cast(Tensor, module.weight))


def _bias(module: nn.Module) -> Tensor | None:
    return cast("Tensor | None", module.bias)


# ---------------------------------------------------------------------- hardware and objectives


class HardwareContract:
    """What every hardware model promises, tried on every kind of layer.

    Set `hardware`. `layers` may be narrowed or extended.
    """

    hardware: ClassVar[HardwareModel]
    layers: ClassVar[dict[str, LayerCase]] = LAYERS

    def priced(self, repeats: int = 1) -> list[tuple[Layer, Choice]]:
        """Every layer with a few of its choices; it is called `repeats` times in a pass."""
        pairs = []
        for name, case in self.layers.items():
            shape = case.shape()
            shape = replace(shape, calls=shape.calls * repeats)
            choices, costs = candidate_choices(shape, RankPolicy(candidates=4))
            layer = Layer(name, (), shape, choices, costs)
            pairs += [(layer, choice) for choice in choices]
        return pairs

    def test_has_a_name(self) -> None:
        assert isinstance(self.hardware.name, str) and self.hardware.name

    def test_latencies_are_positive(self) -> None:
        for layer, choice in self.priced():
            seconds, sigma = self.hardware.latency(layer, choice)
            assert math.isfinite(seconds) and seconds > 0
            assert math.isfinite(sigma) and sigma >= 0

    def test_equal_arguments_give_equal_latencies(self) -> None:
        for layer, choice in self.priced():
            first = self.hardware.latency(layer, choice)
            assert self.hardware.latency(replace(layer), choice) == first

    def test_more_calls_take_longer(self) -> None:
        for once, thrice in zip(self.priced(), self.priced(3), strict=True):
            assert self.hardware.latency(*thrice)[0] > self.hardware.latency(*once)[0]


class ObjectiveContract:
    """What every objective promises, tried on a small classifier.

    Set `objective`, and `noise` if it measures something that varies: the largest relative
    difference between two measurements of one candidate. Override `candidate` for other tasks.
    """

    objective: ClassVar[ObjectiveBase]
    noise: ClassVar[float] = 0.0

    def candidate(self) -> EvaluationResult:
        """A candidate to measure, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dense, network = nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 4))
            inputs, targets = torch.randn(9, 6), torch.randint(4, (9,))
        with torch.no_grad():
            logits, dense_logits = network.eval()(inputs), dense(inputs)
        allocation = Allocation.of({"layer": Choice("svd", (2,))})
        costs = {"macs": 20.0, "params": 26.0, "weight_bytes": 104.0}
        return EvaluationResult(
            allocation, logits, dense_logits, targets, inputs, costs, lambda: network
        )

    def test_has_a_name_and_a_direction(self) -> None:
        assert isinstance(self.objective.name, str) and self.objective.name
        assert self.objective.direction in ("maximize", "minimize")

    def test_measures_a_finite_number(self) -> None:
        value = self.objective(self.candidate())
        assert type(value) is float and math.isfinite(value)

    def test_equal_candidates_give_equal_values(self) -> None:
        candidate = self.candidate()
        first = self.objective(candidate)
        for other in (candidate, self.candidate()):
            assert self.objective(other) == pytest.approx(first, rel=self.noise, abs=0)

    def test_the_candidate_is_left_alone(self) -> None:
        def tensors(candidate: EvaluationResult) -> list[Tensor]:
            own = [candidate.logits, candidate.dense_logits, candidate.targets, candidate.inputs]
            return [*own, *candidate.build().state_dict().values()]

        candidate, untouched = self.candidate(), self.candidate()
        self.objective(candidate)
        assert candidate.costs == untouched.costs
        assert candidate.allocation == untouched.allocation
        assert not candidate.build().training
        pairs = zip(tensors(candidate), tensors(untouched), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# --------------------------------------------------------------------------------- strategies

Budgets = Literal[0, 1, 2]


def random_problem(
    seed: int, *, layers: int = 5, choices: int = 8, budgets: Budgets = 1, objectives: int = 1
) -> Problem:
    """A random search whose budgets can be met.

    Args:
        seed: Equal seeds give equal problems.
        layers: How many.
        choices: Choices of each layer, dense included; some dominate others.
        budgets: On ``macs`` and, if 2, on ``params`` too.
        objectives: 1 for an accuracy, 2 for an accuracy against ``macs``.
    """
    rng = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(layers)]
    options = (DENSE, *(Choice("svd", (r,)) for r in range(choices - 1, 0, -1)))
    errors, macs, params = [], [], []
    for _ in names:
        size = rng.uniform(50, 1000)
        kept = np.sort(rng.uniform(0.03, 0.97, choices - 1))[::-1]
        wrong = rng.uniform(0.1, 1) * (1 - kept) ** rng.uniform(0.5, 4)
        wrong = wrong * rng.uniform(0.8, 1.2, choices - 1)
        errors.append(np.concatenate([[0.0], wrong.clip(1e-6, 1)]))
        macs.append(size * np.concatenate([[1.0], kept]))
        noise = rng.uniform(0.7, 1.0, choices - 1)
        params.append(rng.uniform(5, 50) * np.concatenate([[1.0], kept * noise]))
    costs = {"macs": tuple(macs), "params": tuple(params)}
    remainder_cost = {"macs": float(rng.uniform(0, 200)), "params": float(rng.uniform(0, 20))}
    problem = Problem(
        dict.fromkeys(names, options),
        tuple(errors),
        costs,
        remainder_cost,
        {},
        ("accuracy", "macs")[:objectives],
        cast("tuple[Direction, ...]", ("maximize", "minimize")[:objectives]),
    )
    met = problem.fractions([int(i) for i in rng.integers(0, choices, layers)])
    return replace(problem, budget={name: met[name] for name in ("macs", "params")[:budgets]})


def random_trial(problem: Problem, number: int, allocation: Allocation) -> Trial:
    """An evaluation of an allocation: accuracy falls with each layer's error, unequally."""
    indices = problem.indices(allocation)
    slopes = np.random.default_rng(0).uniform(0.1, 2, len(indices))
    harm = sum(s * e[i] for s, e, i in zip(slopes, problem.errors, indices, strict=True))
    values = (1 - float(harm), problem.fractions(indices)["macs"])
    return Trial(number, allocation, "complete", values[: len(problem.objectives)])


_STUDIES: dict[tuple[type, int], Study] = {}


@dataclass(frozen=True)
class Study:
    """What a strategy proposed as a study grew, and whether it kept its hands off the rest.

    Args:
        rounds: Each history with the proposals made for it.
        generators_kept: The global random generators and the number of threads did not change.
        tables_kept: The problem's tables did not change.
    """

    rounds: tuple[tuple[History, tuple[Allocation, ...]], ...]
    generators_kept: bool
    tables_kept: bool


class StrategyContract:
    """What every strategy promises.

    Set `strategy`. Every test looks at the same small study of each problem in `problems`:
    `rounds` rounds of `batch` proposals each, of which the first fails and the rest are evaluated.
    """

    strategy: ClassVar[Strategy]
    batch: ClassVar[int] = 3
    rounds: ClassVar[int] = 3
    problems: ClassVar[dict[str, Problem]] = {
        "one_budget": random_problem(1),
        "two_budgets": random_problem(2, budgets=2),
        "two_objectives": random_problem(3, objectives=2),
    }

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test that takes a problem or a study runs on all of `problems`."""
        if "problem" in metafunc.fixturenames:
            metafunc.parametrize("problem", self.problems, indirect=True)

    @pytest.fixture
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        """A search to make proposals for."""
        return self.problems[request.param]

    @pytest.fixture
    def study(self, problem: Problem) -> Study:
        """The study of the problem, the same for all tests."""
        key = type(self), id(problem)
        if key not in _STUDIES:
            _STUDIES[key] = _study(self.strategy, problem, self.rounds, self.batch)
        return _STUDIES[key]

    def test_proposals_are_allocations_of_the_space_within_the_budgets(
        self, problem: Problem, study: Study
    ) -> None:
        assert study.rounds[0][1], "proposes nothing at all"
        for _, proposals in study.rounds:
            assert len(proposals) <= self.batch
            for allocation in proposals:
                assert list(allocation) == list(problem.choices)
                assert problem.meets(problem.indices(allocation))

    def test_proposals_are_new_and_distinct(self, study: Study) -> None:
        for history, proposals in study.rounds:
            assert len(set(proposals)) == len(proposals)
            assert not history.proposed & set(proposals)

    def test_what_is_being_evaluated_is_not_proposed(self, problem: Problem, study: Study) -> None:
        for history, proposals in study.rounds[::2]:
            waiting = history.awaiting(proposals)
            again = self.strategy.propose(problem, waiting, self.batch, np.random.default_rng(0))
            assert not waiting.proposed & set(again)

    def test_equal_arguments_give_equal_proposals(self, problem: Problem, study: Study) -> None:
        history, proposals = study.rounds[-1]
        copy: Strategy = pickle.loads(pickle.dumps(self.strategy))
        assert copy == self.strategy
        torch.rand(3)  # the global generators play no part
        np.random.random()
        rng = np.random.default_rng(self.rounds - 1)
        assert tuple(copy.propose(problem, history, self.batch, rng)) == proposals

    def test_the_global_generators_are_left_alone(self, study: Study) -> None:
        assert study.generators_kept

    def test_the_tables_are_left_alone(self, study: Study) -> None:
        assert study.tables_kept


def _state(problem: Problem) -> tuple[list[Array], object]:
    tables = [*problem.errors, *itertools.chain(*problem.costs.values())]
    generators = (
        torch.random.get_rng_state().tolist(),
        pickle.dumps(np.random.get_state()),
        random.getstate(),
        torch.get_num_threads(),
    )
    return [t.copy() for t in tables], generators


def _probed(strategy: Strategy, problem: Problem, history: History) -> History:
    """With the probes that a strategy asks for, until it asks for no more."""
    while True:
        probes = dict.fromkeys(strategy.probes(problem, history))
        if not (wanted := [a for a in probes if a not in history.found]):
            return history
        for allocation in wanted:
            problem.indices(allocation)
            trial = random_trial(problem, len(history.trials), allocation)
            trial = replace(trial, probe=True, budget_key=problem.budget_key)
            history = History((*history.trials, trial))


def _study(strategy: Strategy, problem: Problem, rounds: int, batch: int) -> Study:
    tables, generators = _state(problem)
    history, done = History(), []
    for number in range(rounds):
        rng = np.random.default_rng(number)
        history = _probed(strategy, problem, history)
        proposals = tuple(strategy.propose(problem, history, batch, rng))
        done.append((history, proposals))
        trials = list(history.trials)
        for allocation in proposals:
            trial = random_trial(problem, len(trials), allocation)
            if number == 0 and allocation == proposals[0]:
                trial = replace(trial, state="failed", values=(), reason="on purpose")
            trials.append(replace(trial, budget_key=problem.budget_key))
        history = History(tuple(trials))
    tables_after, generators_after = _state(problem)
    same = all(np.array_equal(a, b) for a, b in zip(tables, tables_after, strict=True))
    return Study(tuple(done), generators == generators_after, same)
