"""Contracts as test classes, for authors of operators and strategies. Needs pytest.

Subclass one in a test file and say what is tested::

    class TestMyOperator(OperatorContract):
        operator = MyOperator()

    class TestMyStrategy(StrategyContract):
        strategy = MyStrategy()

RankNAS holds its own operators and strategies to the same classes.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.decompositions import (
    METRICS,
    LayerShape,
    Metric,
    MetricName,
    Operator,
    Rank,
    Statistics,
    make_metric,
)
from rankNAS.objectives.base import Direction
from rankNAS.strategies.base import Array, History, Problem, Strategy, Trial

__all__ = [
    "LAYERS",
    "OperatorContract",
    "StrategyContract",
    "TestedLayer",
    "definition_of_error",
    "random_problem",
    "random_statistics",
    "random_trial",
]

T = TypeVar("T")


# ---------------------------------------------------------------------------------- operators


@dataclass(frozen=True)
class TestedLayer:
    """A layer and the size of an input for it.

    Args:
        make: Makes the layer with random weights.
        input_shape: Batch included.
    """

    __test__ = False  # not a test class, whatever its name
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


LAYERS: dict[str, TestedLayer] = {
    "linear": TestedLayer(lambda: nn.Linear(12, 7), (3, 12)),
    "linear_tall": TestedLayer(lambda: nn.Linear(6, 11, bias=False), (2, 4, 6)),
    "conv1d": TestedLayer(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "conv2d": TestedLayer(lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 6)),
    "conv2d_strided": TestedLayer(
        lambda: nn.Conv2d(
            4, 9, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), bias=False
        ),
        (2, 4, 9, 8),
    ),
    "conv2d_grouped": TestedLayer(
        lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2), (2, 8, 6, 7)
    ),
    "conv2d_same": TestedLayer(
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(2, 1)), (2, 4, 7, 8)
    ),
    "conv2d_reflect": TestedLayer(
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 6, 6)
    ),
    "conv2d_1x1": TestedLayer(lambda: nn.Conv2d(8, 6, 1, stride=2, bias=False), (2, 8, 5, 5)),
    "conv2d_depthwise": TestedLayer(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 5)),
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


def definition_of_error(metric: Metric, W: Tensor, approximation: Tensor) -> float:
    """||H (W - What) C^1/2||_F^2 / ||H W C^1/2||_F^2, written out."""
    g, o, n = W.shape
    eye = torch.eye
    H = eye(o, dtype=W.dtype).expand(g, o, o) if metric.H is None else metric.H
    C = eye(n, dtype=W.dtype).expand(g, n, n) if metric.C is None else metric.C

    def squared(X: Tensor) -> float:
        HX = H @ X
        return float(torch.einsum("goi,gij,goj->", HX, C, HX))

    return squared(W - approximation) / squared(W)


class OperatorContract:
    """What every operator promises, tried on every kind of layer and in every metric.

    Set `operator`. `layers` may be narrowed or extended; layers that the operator refuses are
    skipped.
    """

    operator: ClassVar[Operator]
    layers: ClassVar[dict[str, TestedLayer]] = LAYERS

    def multiples(self, rank: Rank) -> Rank:
        """The entries of a rank that `multiple_of` applies to; override if not all of them."""
        return rank

    @pytest.fixture(params=list(LAYERS))
    def layer(self, request: pytest.FixtureRequest) -> TestedLayer:
        """A layer that the operator does not refuse."""
        if request.param not in self.layers:
            pytest.skip("not among `layers`")
        layer = self.layers[request.param]
        if reason := self.operator.refuses(layer.shape()):
            pytest.skip(f"the operator refuses: {reason}")
        return layer

    @pytest.fixture(params=METRICS)
    def metric(self, request: pytest.FixtureRequest, layer: TestedLayer) -> Metric:
        """Each metric, with statistics of random inputs."""
        return make_metric(cast(MetricName, request.param), random_statistics(layer.shape()))

    def families(self, shape: LayerShape) -> list[list[Rank]]:
        """A few families, each thinned to a few ranks; first and last are kept."""
        return [_thinned(family, 5) for family in _thinned(self.operator.families(shape), 3)]

    def ranks(self, shape: LayerShape) -> list[Rank]:
        """All ranks of `families`."""
        return [rank for family in self.families(shape) for rank in family]

    def test_offers_distinct_ranks(self, layer: TestedLayer) -> None:
        ranks = list(itertools.chain(*self.operator.families(layer.shape())))
        assert ranks
        assert len(set(ranks)) == len(ranks)
        assert all(isinstance(r, int) and r > 0 for rank in ranks for r in rank)

    @pytest.mark.parametrize("multiple_of", [2, 3, 4])
    def test_ranks_are_multiples(self, layer: TestedLayer, multiple_of: int) -> None:
        for family in self.operator.families(layer.shape(), multiple_of):
            for rank in family:
                assert all(r % multiple_of == 0 for r in self.multiples(rank))

    def test_cost_increases_along_each_family(self, layer: TestedLayer) -> None:
        shape = layer.shape()
        for family in self.operator.families(shape):
            costs = [self.operator.cost(shape, rank) for rank in family]
            for smaller, larger in itertools.pairwise(costs):
                assert smaller.macs <= larger.macs
                assert smaller.params < larger.params

    def test_cost_is_that_of_the_module(self, layer: TestedLayer) -> None:
        shape = layer.shape()
        for rank in self.ranks(shape):
            module = self.operator.build(shape, rank).double()
            with FlopCounterMode(display=False) as counter:
                module(layer.input().to("meta"))
            cost = self.operator.cost(shape, rank)
            assert 2 * cost.macs == counter.get_total_flops()
            assert cost.params == sum(p.numel() for p in module.parameters())
            assert cost.weight_bytes == cost.params * shape.itemsize

    def test_truncating_fills_what_build_builds(self, layer: TestedLayer) -> None:
        shape, module = layer.shape(), layer.module()
        ranks = self.ranks(shape)
        factors = self.operator.factorise(shape, _folded(shape, module), Metric(), ranks)
        for rank in ranks:
            filled = factors.truncate(rank, _bias(module))
            empty = self.operator.build(shape, rank)
            assert all(p.is_meta for p in empty.parameters())
            assert repr(filled) == repr(empty)
            assert {k: v.shape for k, v in filled.state_dict().items()} == {
                k: v.shape for k, v in empty.state_dict().items()
            }

    def test_the_chain_computes_the_multiplied_out_weight(
        self, layer: TestedLayer, metric: Metric
    ) -> None:
        shape, module, x = layer.shape(), layer.module(), layer.input()
        ranks = self.ranks(shape)
        factors = self.operator.factorise(shape, _folded(shape, module), metric, ranks)
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

    def test_error_is_its_definition(self, layer: TestedLayer, metric: Metric) -> None:
        shape = layer.shape()
        weight = _folded(shape, layer.module())
        ranks = self.ranks(shape)
        factors = self.operator.factorise(shape, weight, metric, ranks)
        for rank in ranks:
            direct = definition_of_error(metric, weight.flatten(2), factors.weight(rank))
            assert factors.error(rank) == pytest.approx(direct, rel=1e-6, abs=1e-9)

    def test_full_rank_is_exact(self, layer: TestedLayer, metric: Metric) -> None:
        shape = layer.shape()
        weight = _folded(shape, layer.module())
        full = self.operator.families(shape)[-1][-1]
        factors = self.operator.factorise(shape, weight, metric, [full])
        assert factors.error(full) == pytest.approx(0, abs=1e-9)
        torch.testing.assert_close(factors.weight(full), weight.flatten(2), rtol=0, atol=1e-6)

    def test_error_does_not_increase_along_a_family(
        self, layer: TestedLayer, metric: Metric
    ) -> None:
        shape = layer.shape()
        families = self.operator.families(shape)
        ranks = [rank for family in families for rank in family]
        factors = self.operator.factorise(shape, _folded(shape, layer.module()), metric, ranks)
        for family in families:
            errors = [factors.error(rank) for rank in family]
            assert all(0 <= e <= 1 for e in errors)
            assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))

    def test_the_ranks_asked_for_do_not_change_each_other(self, layer: TestedLayer) -> None:
        shape = layer.shape()
        weight, ranks = _folded(shape, layer.module()), self.ranks(shape)
        metric = make_metric("fisher", random_statistics(shape))
        together = self.operator.factorise(shape, weight, metric, ranks)
        for rank in ranks:
            alone = self.operator.factorise(shape, weight, metric, [rank])
            assert alone.error(rank) == pytest.approx(together.error(rank), rel=1e-9, abs=1e-9)

    @pytest.mark.parametrize("samples", [0, 1, 3])
    @pytest.mark.parametrize("centred", [False, True])
    def test_singular_statistics_give_finite_factors(
        self, layer: TestedLayer, samples: int, centred: bool
    ) -> None:
        shape = layer.shape()
        statistics = random_statistics(shape, samples=samples)
        metric = make_metric("fisher", statistics, centred=centred)
        weight = _folded(shape, layer.module())
        ranks = self.ranks(shape)
        factors = self.operator.factorise(shape, weight, metric, ranks)
        for rank in ranks:
            approximation = factors.weight(rank)
            assert approximation.isfinite().all()
            assert all(w.isfinite().all() for w in factors.stage_weights(rank))
            direct = definition_of_error(metric, weight.flatten(2), approximation)
            assert factors.error(rank) == pytest.approx(direct, rel=1e-4, abs=1e-6)

    def test_a_zero_weight_gives_zero_factors(self, layer: TestedLayer, metric: Metric) -> None:
        shape = layer.shape()
        ranks = self.ranks(shape)
        zero = torch.zeros_like(_folded(shape, layer.module()))
        factors = self.operator.factorise(shape, zero, metric, ranks)
        for rank in ranks:
            assert factors.error(rank) == 0
            assert (factors.weight(rank) == 0).all()
            assert all(w.isfinite().all() for w in factors.stage_weights(rank))

    def test_is_stateless_and_pickles(self, layer: TestedLayer) -> None:
        shape = layer.shape()
        weight, ranks = _folded(shape, layer.module()), self.ranks(shape)
        before = weight.clone()
        copy: Operator = pickle.loads(pickle.dumps(self.operator))
        results = [
            operator.factorise(shape, weight, Metric(), ranks).weight(ranks[0])
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
    rest = {"macs": float(rng.uniform(0, 200)), "params": float(rng.uniform(0, 20))}
    problem = Problem(
        dict.fromkeys(names, options),
        tuple(errors),
        costs,
        rest,
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


class StrategyContract:
    """What every strategy promises.

    Set `strategy`. Each test starts from the `history` that a study of a few trials leaves.
    """

    strategy: ClassVar[Strategy]
    batch: ClassVar[int] = 3
    rounds: ClassVar[int] = 3
    problems: ClassVar[dict[str, Problem]] = {
        "one_budget": random_problem(1),
        "two_budgets": random_problem(2, budgets=2),
        "two_objectives": random_problem(3, objectives=2),
    }

    @pytest.fixture(params=list(problems))
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        """A search to make proposals for."""
        return self.problems[request.param]

    def study(self, problem: Problem) -> Iterator[tuple[History, list[Allocation]]]:
        """Histories of a growing study, each with what the strategy proposes for it."""
        history = History()
        for round_ in range(self.rounds):
            rng = np.random.default_rng(round_)
            proposals = self.strategy.propose(problem, history, self.batch, rng)
            yield history, proposals
            done = history.trials
            if proposals and round_ == 0:  # the first allocation cannot be evaluated
                done += (Trial(0, proposals[0], "failed", reason="test"),)
                proposals = proposals[1:]
            for allocation in proposals:
                done += (random_trial(problem, len(done), allocation),)
            history = History(done)

    def test_proposals_are_allocations_of_the_space_within_the_budgets(
        self, problem: Problem
    ) -> None:
        for _, proposals in self.study(problem):
            assert len(proposals) <= self.batch
            for allocation in proposals:
                assert list(allocation) == list(problem.choices)
                assert problem.meets(problem.indices(allocation))

    def test_proposals_are_new_and_distinct(self, problem: Problem) -> None:
        for history, proposals in self.study(problem):
            assert len(set(proposals)) == len(proposals)
            assert not history.proposed & set(proposals)

    def test_what_is_being_evaluated_is_not_proposed(self, problem: Problem) -> None:
        first = self.strategy.propose(problem, History(), self.batch, np.random.default_rng(0))
        history = History((), tuple(first))
        again = self.strategy.propose(problem, history, self.batch, np.random.default_rng(0))
        assert not set(first) & set(again)

    def test_equal_arguments_give_equal_proposals(self, problem: Problem) -> None:
        *_, (history, proposals) = self.study(problem)
        copy: Strategy = pickle.loads(pickle.dumps(self.strategy))
        rng = np.random.default_rng(self.rounds - 1)
        torch.rand(3)  # the global generators play no part
        np.random.random()
        assert copy == self.strategy
        assert copy.propose(problem, history, self.batch, rng) == proposals

    def test_the_global_generators_are_left_alone(self, problem: Problem) -> None:
        before = torch.random.get_rng_state()
        threads = torch.get_num_threads()
        np.random.seed(0)
        expected = np.random.random()
        np.random.seed(0)
        for _ in self.study(problem):
            pass
        assert torch.equal(torch.random.get_rng_state(), before)
        assert np.random.random() == expected
        assert torch.get_num_threads() == threads

    def test_the_tables_are_left_alone(self, problem: Problem) -> None:
        def tables(problem: Problem) -> list[Array]:
            return [*problem.errors, *itertools.chain(*problem.costs.values())]

        before = [t.copy() for t in tables(problem)]
        for _ in self.study(problem):
            pass
        assert all((a == b).all() for a, b in zip(before, tables(problem), strict=True))
