"""Cycles on in-memory-computing arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.allocation import DENSE, Choice
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.hw_models.imc import Crossbar, ImcArray, Mapping, cycles, low_rank_cycles
from rankNAS.search_spaces.base import Layer
from rankNAS.search_spaces.policies import RankPolicy, candidate_choices
from rankNAS.testing import HardwareContract

# Input side, kernel, channels in and out of convolutions without padding, then cycles by im2col,
# SDK and VW-SDK on 512 x 512, as the authors of VW-SDK publish them.
PUBLISHED = [
    (224, 3, 3, 64, 49284, 12321, 6216),
    (224, 3, 64, 64, 98568, 24642, 24642),
    (112, 3, 64, 128, 24200, 6050, 6050),
    (112, 3, 128, 128, 36300, 36300, 12100),
    (56, 3, 128, 256, 8748, 8748, 5832),
    (56, 3, 256, 256, 14580, 14580, 10206),
    (112, 7, 3, 64, 11236, 2809, 1431),
    (56, 3, 64, 64, 5832, 1458, 1458),
    (28, 3, 128, 128, 2028, 2028, 676),
    (14, 3, 256, 256, 720, 720, 504),
]
RESNET20 = [
    *[(32, 16, 16)] * 6,
    (16, 16, 32),
    *[(16, 32, 32)] * 5,
    (8, 32, 64),
    *[(8, 64, 64)] * 5,
]
WRN16_4 = [
    (32, 16, 64),
    *[(32, 64, 64)] * 3,
    (16, 64, 128),
    *[(16, 128, 128)] * 3,
    (8, 128, 256),
    *[(8, 256, 256)] * 3,
]
# Dense by im2col and VW-SDK, an eighth of the rank by im2col with 1 and 4 groups, and by SDK.
DERIVED = [
    (RESNET20, 32, 56192, 50048, 58304, 82176, 19328, 29824),
    (RESNET20, 64, 28800, 14336, 36864, 48256, 8208, 13152),
    (RESNET20, 128, 18432, 5728, 26496, 41600, 3652, 5760),
    (WRN16_4, 32, 378880, 378880, 123136, 143104, 78592, 119552),
    (WRN16_4, 64, 95232, 95232, 62080, 75776, 29696, 45824),
    (WRN16_4, 128, 33664, 28032, 35264, 50176, 11840, 18560),
]
SMALL = Crossbar(64, 64)


class TestImcArray(HardwareContract):
    hardware = ImcArray(64, 64)


@pytest.mark.parametrize(("side", "k", "inputs", "outputs", "im2col", "sdk", "vw_sdk"), PUBLISHED)
def test_the_published_counts(
    side: int, k: int, inputs: int, outputs: int, im2col: int, sdk: int, vw_sdk: int
) -> None:
    at = (side - k + 1, side - k + 1)
    expected: dict[Mapping, int] = {"im2col": im2col, "sdk": sdk, "vw_sdk": vw_sdk}
    for mapping, count in expected.items():
        found = cycles(at, (k, k), inputs, outputs, array=Crossbar(512, 512), mapping=mapping)
        assert found == count


@pytest.mark.parametrize(
    ("layers", "size", "im2col", "vw", "low1", "low4", "sdk1", "sdk4"), DERIVED
)
def test_low_rank_networks(
    layers: list[tuple[int, int, int]],
    size: int,
    im2col: int,
    vw: int,
    low1: int,
    low4: int,
    sdk1: int,
    sdk4: int,
) -> None:
    def dense(mapping: Mapping) -> int:
        return sum(
            cycles((o, o), (3, 3), i, n, array=Crossbar(size, size), mapping=mapping)
            for o, i, n in layers
        )

    def low(mapping: Mapping, groups: int) -> int:
        array = Crossbar(size, size)
        return sum(
            low_rank_cycles(
                (o, o), (3, 3), i, n, n // 8, array=array, mapping=mapping, groups=groups
            )
            for o, i, n in layers
        )

    assert (dense("im2col"), dense("vw_sdk")) == (im2col, vw)
    assert (low("im2col", 1), low("im2col", 4)) == (low1, low4)
    assert (low("vw_sdk", 1), low("vw_sdk", 4)) == (sdk1, sdk4)


def test_the_worked_example() -> None:
    assert cycles((8, 8), (3, 3), 64, 64, array=SMALL, mapping="im2col") == 576
    low = {m: low_rank_cycles((8, 8), (3, 3), 64, 64, 8, array=SMALL, mapping=m) for m in MAPPINGS}
    assert low["im2col"] == 640  # slower than dense
    assert low["vw_sdk"] == 256
    assert low_rank_cycles((8, 8), (3, 3), 64, 64, 8, array=SMALL, groups=4) == 384
    # One window of 2 x 2 positions: 64 x 16 rows and 4 x 8 columns, then 32 rows and 256 columns.
    assert low_rank_cycles((2, 2), (3, 3), 64, 64, 8, array=SMALL, mapping="sdk") == 16 + 4


MAPPINGS: tuple[Mapping, ...] = ("im2col", "sdk", "vw_sdk")


@settings(max_examples=40, deadline=None)
@given(
    side=st.integers(1, 12),
    k=st.sampled_from([1, 3, 5]),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    rank=st.integers(1, 16),
    rows=st.sampled_from([32, 64, 128]),
)
def test_larger_arrays_and_better_mappings_take_no_more_cycles(
    side: int, k: int, inputs: int, outputs: int, rank: int, rows: int
) -> None:
    for array, larger in (
        (Crossbar(rows, 64), Crossbar(2 * rows, 64)),
        (Crossbar(64, rows), Crossbar(64, 2 * rows)),
    ):
        at, kernel = (side, side), (k, k)
        im2col = cycles(at, kernel, inputs, outputs, array=array, mapping="im2col")
        assert cycles(at, kernel, inputs, outputs, array=array) <= im2col
        assert cycles(at, kernel, inputs, outputs, array=larger) <= cycles(
            at, kernel, inputs, outputs, array=array
        )
        low = [
            low_rank_cycles(at, kernel, inputs, outputs, rank, array=a, mapping=m)
            for m, a in (("im2col", array), ("sdk", array), ("vw_sdk", array), ("vw_sdk", larger))
        ]
        assert low == sorted(low, reverse=True)
        skipped = low_rank_cycles(at, kernel, inputs, outputs, rank, array=array, block_skip=True)
        assert skipped <= low[2]


@pytest.mark.parametrize("stride", [1, 2])
def test_shifted_copies_of_a_product_are_a_block_diagonal_times_shifted_copies(
    stride: int,
) -> None:
    """SDK(L R) = (I (x) L) SDK(R), what low rank on these arrays rests on; and SDK convolves."""
    rng = np.random.default_rng(0)
    K, c, k, m, a, b = 3, 4, 5, 6, 2, 3
    height, width = (a - 1) * stride + K, (b - 1) * stride + K
    L, R = rng.standard_normal((m, k)), rng.standard_normal((k, c, K, K))

    def sdk(weight: np.ndarray) -> np.ndarray:
        blocks = []
        for i in range(a):
            for j in range(b):
                placed = np.zeros((len(weight), c, height, width))
                rows = slice(i * stride, i * stride + K)
                placed[:, :, rows, j * stride : j * stride + K] = weight
                blocks.append(placed.reshape(len(weight), -1))
        return np.concatenate(blocks)

    product = np.einsum("mk,kcij->mcij", L, R)
    both = np.kron(np.eye(a * b), L) @ sdk(R)
    np.testing.assert_allclose(sdk(product), both, atol=1e-12)
    x = rng.standard_normal((c, height, width))
    convolved = [
        (product * x[:, i * stride : i * stride + K, j * stride : j * stride + K]).sum((1, 2, 3))
        for i in range(a)
        for j in range(b)
    ]
    np.testing.assert_allclose(sdk(product) @ x.ravel(), np.concatenate(convolved), atol=1e-12)


def layer_of(shape: LayerShape) -> Layer:
    choices, costs = candidate_choices(shape, RankPolicy(candidates=400))
    return Layer("conv", (), shape, choices, costs)


def test_choices_are_mapped_as_their_stages_run() -> None:
    shape = LayerShape(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), calls=((2, 8, 8),))
    layer, model = layer_of(shape), ImcArray(64, 64, cycle=1e-6, cycle_energy=1e-9)
    array = Crossbar(64, 64)
    assert model.cycles(layer, DENSE) == 2 * cycles((8, 8), (3, 3), 64, 64, array=array)
    svd = Choice("svd", (8,))
    assert model.cycles(layer, svd) == 2 * 256
    assert model.latency(layer, svd) == (pytest.approx(512e-6), 0.0)
    assert model.energy(layer, svd) == pytest.approx(512e-9)
    assert ImcArray().energy(layer, svd) is None
    grouped = Choice("group_svd", (4, 8))
    assert model.cycles(layer, grouped) == 2 * 384
    vertical = Choice("spatial_svd", (16,))
    halves = (
        cycles((8, 8), (3, 1), 64, 16, array=array),
        cycles((8, 8), (1, 3), 16, 64, array=array),
    )
    assert model.cycles(layer, vertical) == 2 * sum(halves)


def test_linear_layers_and_groups() -> None:
    shape = LayerShape(128, 64, calls=((10,),))
    assert ImcArray(64, 64).cycles(layer_of(shape), DENSE) == 10 * 2
    grouped = LayerShape(128, 64, (3,), (1,), (1,), (1,), groups=2, calls=((3, 16),))
    one = cycles((1, 16), (1, 3), 64, 32, array=SMALL)
    assert ImcArray(64, 64).cycles(layer_of(grouped), DENSE) == 3 * 2 * one


@pytest.mark.parametrize(
    "wrong",
    [{"rows": 0}, {"columns": -1}, {"cycle": 0.0}, {"cycle_energy": -1.0}, {"mapping": "x"}],
)
def test_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ImcArray(**wrong)
