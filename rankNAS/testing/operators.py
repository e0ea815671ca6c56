"""Contract tests of operators, as a test class. Needs pytest."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankNAS.decompositions import (
    NORMS,
    ErrorNorm,
    Factors,
    LayerShape,
    NormName,
    Operator,
    Rank,
    Statistics,
    Target,
    make_norm,
)

__all__ = ["LAYERS", "LayerCase", "OperatorContract", "definition_of_error", "random_statistics"]

T = TypeVar("T")
FEW = 3  # layers per norm, except `MAIN`, which uses all
MAIN: NormName = "fisher"  # weights inputs and outputs; each other norm is a special case
SINGULAR = [(samples, centred) for samples in (0, 1, 3) for centred in (False, True)]
_FACTORS: dict[tuple[object, ...], Factors] = {}  # read-only, so tests share them


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of its input.

    Args:
        make: Creates the layer with random weights.
        input_shape: Shape of the input, including the batch.
    """

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]

    def module(self, seed: int = 0) -> nn.Module:
        """The layer in float64, determined by the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().double().requires_grad_(False)

    def shape(self) -> LayerShape:
        """The layer's shape, for one call on an input of `input_shape`."""
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
    """Statistics of correlated random inputs with non-zero mean and of correlated gradients.

    Args:
        shape: The layer's shape.
        samples: Number of samples; fewer than a side gives a singular moment, 0 gives zeros.
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
    """||H (W - What) C^1/2||_F^2 / ||H W C^1/2||_F^2, computed from its definition."""
    g, o, n = W.shape
    eye = torch.eye
    H = eye(o, dtype=W.dtype).expand(g, o, o) if norm.H is None else norm.H
    C = eye(n, dtype=W.dtype).expand(g, n, n) if norm.C is None else norm.C

    def squared(X: Tensor) -> float:
        HX = H @ X
        return float(torch.einsum("goi,gij,goj->", HX, C, HX))

    return squared(W - approximation) / squared(W)


class OperatorContract:
    """Contract of an operator, tested on every kind of layer and every norm.

    Set `operator`. `layers` may be reduced or extended; layers that the operator refuses are
    skipped. The norm `fisher` is tested on all layers, each other norm on a few of them.
    """

    operator: ClassVar[Operator]
    layers: ClassVar[dict[str, LayerCase]] = LAYERS
    norm_free: ClassVar[set[str]] = {
        "test_the_chain_computes_the_multiplied_out_weight",
        "test_a_zero_weight_gives_zero_factors",
    }  # holds for any norm if it holds for one; tried in `weight` too, which has no matrices

    def multiples(self, rank: Rank) -> Rank:
        """The entries of a rank that `multiple_of` applies to; override it if not all."""
        return rank

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise every test that takes a layer over all layers that are not refused."""
        if "layer" not in metafunc.fixturenames:
            return
        usable = [n for n, x in self.layers.items() if self.operator.refuses(x.shape()) is None]
        assert usable, "the operator refuses every layer"
        few = _thinned(usable, FEW)
        if "norm" in metafunc.fixturenames:
            free = metafunc.function.__name__ in self.norm_free
            cases = [(n, MAIN) for n in usable]
            cases += [(n, x) for x in (("weight",) if free else NORMS) if x != MAIN for n in few]
            metafunc.parametrize(("layer", "norm"), cases, indirect=True)
        elif "samples" in metafunc.fixturenames:
            # One centred sample is all zeros.
            rows = {n: SINGULAR if n in few else [(1, True), (3, False)] for n in usable}
            singular = [(n, *row) for n in usable for row in rows[n]]
            metafunc.parametrize(("layer", "samples", "centred"), singular, indirect=["layer"])
        else:
            metafunc.parametrize("layer", usable, indirect=True)

    @pytest.fixture
    def layer(self, request: pytest.FixtureRequest) -> LayerCase:
        """A layer that the operator does not refuse."""
        return self.layers[request.param]

    @pytest.fixture
    def norm(self, request: pytest.FixtureRequest, layer: LayerCase) -> ErrorNorm:
        """A norm, with statistics of random inputs."""
        return make_norm(cast(NormName, request.param), random_statistics(layer.shape()))

    @pytest.fixture
    def factors(
        self, request: pytest.FixtureRequest, layer: LayerCase, norm: ErrorNorm
    ) -> Factors:
        """The factors of the layer in the norm at all `ranks`, shared by all tests."""
        parameters = request.node.callspec.params
        key = type(self), parameters["layer"], parameters["norm"]
        if key not in _FACTORS:
            shape = layer.shape()
            target = Target(_folded(shape, layer.module()), norm)
            _FACTORS[key] = self.operator.factorise(shape, target, self.ranks(shape))
        return _FACTORS[key]

    def families(self, shape: LayerShape) -> list[list[Rank]]:
        """A few families, each reduced to a few ranks including the first and the last."""
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
        self, layer: LayerCase, norm: ErrorNorm, factors: Factors
    ) -> None:
        shape, module, x = layer.shape(), layer.module(), layer.input()
        for rank in self.ranks(shape):
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

    def test_error_is_its_definition(
        self, layer: LayerCase, norm: ErrorNorm, factors: Factors
    ) -> None:
        shape = layer.shape()
        weight = _folded(shape, layer.module())
        for rank in self.ranks(shape):
            direct = definition_of_error(norm, weight.flatten(2), factors.weight(rank))
            assert factors.error(rank) == pytest.approx(direct, rel=1e-6, abs=1e-9)

    def test_full_rank_is_exact(self, layer: LayerCase, norm: ErrorNorm, factors: Factors) -> None:
        shape = layer.shape()
        weight = _folded(shape, layer.module())
        full = self.operator.families(shape)[-1][-1]
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
