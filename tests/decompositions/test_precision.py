"""Single precision and the repair of covariances, on layers and statistics that are hard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rankNAS.decompositions import OPERATORS, ErrorNorm, Factors, Rank, Statistics, Target
from rankNAS.decompositions.norms import make_norm
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.testing import definition_of_error

SHAPES = {
    "conv": LayerShape(24, 20, (3, 3), calls=((1, 6, 6),)),
    "linear": LayerShape(96, 64),
    "grouped": LayerShape(24, 24, (3, 3), groups=2, calls=((1, 6, 6),)),
}
CASES = (
    "decay",
    "steep",
    "few",
    "dead",
    "repeated inputs",
    "repeated outputs",
    "half",
    "bfloat16",
)


def mixed(size: int, power: float, generator: torch.Generator) -> Tensor:
    """A matrix whose singular values decay as a power of their number."""
    scale = torch.arange(1, size + 1.0) ** -power
    return torch.randn(size, size, generator=generator) / size**0.5 * scale


def layer(shape: LayerShape, case: str) -> tuple[Tensor, Statistics]:
    """The weight and the statistics of a layer."""
    generator = torch.Generator().manual_seed(0)
    n, o, g = shape.width, shape.outputs // shape.groups, shape.groups
    samples = 10 if case == "few" else 800
    x = torch.randn(g, samples, n, generator=generator)
    x = x @ mixed(n, 4.0 if case == "steep" else 0.7, generator)
    W = torch.randn(g, o, n, generator=generator) @ mixed(n, 0.3, generator)
    if case == "dead":
        x[..., ::2] = 0
    if case == "repeated inputs":
        x[..., 1::2] = x[..., ::2]
    if case == "repeated outputs":
        W[:, 1::2] = W[:, ::2]
    if case == "mean":
        x = x / 3000 + 10 * torch.randn(g, 1, n, generator=generator)
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    y = torch.randn(g, 300, o, generator=generator) @ mixed(o, 0.7, generator)
    C = (x.mT @ x / samples).double()
    if case == "mean":  # rounded in the same way on every machine, but for a positive trace
        exact = x.double().mT @ x.double() / samples
        C = exact.float().double()
        C.diagonal(dim1=-2, dim2=-1).copy_(exact.diagonal(dim1=-2, dim2=-1))
    moments = (C, x.double().mean(1), (y.mT @ y / 300).double())
    kernel = shape.kernel or (1, 1)
    return W.to(dtype).reshape(g, o, shape.inputs // g, *kernel), Statistics(*moments)


def factors(
    shape: LayerShape, weight: Tensor, norm: ErrorNorm
) -> dict[str, tuple[list[Rank], Factors]]:
    """Every operator at some of its ranks."""
    target, found = Target(weight, norm), {}
    for name, operator in OPERATORS.items():
        if operator.refuses(shape) is None:
            families = operator.families(shape)
            ranks = [family[len(family) * part // 8 - 1] for family in families for part in (3, 8)]
            found[name] = ranks, operator.factorise(shape, target, ranks)
    return found


@pytest.mark.parametrize("name", ["input", "fisher"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", SHAPES)
def test_errors_of_single_precision_are_those_of_double(
    kind: str, case: str, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPES[kind]
    weight, statistics = layer(shape, case)
    norm = make_norm(name, statistics)
    reference = factors(shape, weight, norm)
    monkeypatch.setattr("rankNAS.decompositions.norms.WIDE", 1)
    for operator, (ranks, found) in factors(shape, weight, norm).items():
        for rank in ranks:
            error = found.error(rank)
            assert error == pytest.approx(reference[operator][1].error(rank), abs=1e-3)
            direct = definition_of_error(norm, weight.double().flatten(2), found.weight(rank))
            assert error == pytest.approx(direct, abs=1e-3)


@pytest.mark.parametrize("wide", [1, 10**9])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_covariance_that_is_small_against_the_mean_is_repaired(
    kind: str, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankNAS.decompositions.norms.WIDE", wide)
    shape = SHAPES[kind]
    weight, statistics = layer(shape, "mean")
    norm = make_norm("input", statistics, centred=True)
    assert norm.C is not None and torch.linalg.eigvalsh(norm.C).min() < 0
    repaired = Target(weight, norm).repaired.norm
    assert repaired.C is not None and torch.linalg.eigvalsh(repaired.C).min() > 0
    for ranks, found in factors(shape, weight, repaired).values():
        for rank in ranks:
            direct = definition_of_error(repaired, weight.double().flatten(2), found.weight(rank))
            assert found.error(rank) == pytest.approx(direct, abs=1e-3)
    for ranks, found in factors(shape, weight, norm).values():
        assert all(0 <= found.error(rank) <= 1 for rank in ranks)
        assert all(found.weight(rank).isfinite().all() for rank in ranks)
