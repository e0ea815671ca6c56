"""A systolic array in closed form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.hw_models.systolic import Systolic
from rankNAS.testing import HardwareContract


class TestSystolic(HardwareContract):
    hardware = Systolic()


def linear(M: int, N: int, K: int, itemsize: int = 4) -> LayerShape:
    return LayerShape(K, N, calls=((M,),), itemsize=itemsize)


@pytest.mark.parametrize(
    ("dataflow", "expected"),
    [
        # 2 R + C + T - 2 cycles a pass: passes x (2 * 8 + 4 + T - 2)
        ("output", 2 * 3 * (18 + 20)),  # 16 / 8 positions, 12 / 4 outputs, 20 summands
        ("weight", 3 * 3 * (18 + 16)),  # 20 / 8 summands, 12 / 4 outputs, 16 positions
        ("input", 3 * 4 * (18 + 12)),  # 20 / 8 summands, 16 / 4 positions, 12 outputs
    ],
)
def test_cycles_by_hand(dataflow: str, expected: int) -> None:
    model = Systolic(rows=8, columns=4, dataflow=dataflow)
    assert model.cycles(linear(16, 12, 20)) == expected


def test_one_value_through_one_element() -> None:
    assert Systolic(rows=1, columns=1).cycles(linear(1, 1, 7)) == 2 + 1 + 7 - 2


def test_traffic_without_and_with_room() -> None:
    shape = linear(64, 32, 100)
    once = 4 * (64 * 100 + 32 * 100 + 64 * 32)
    assert Systolic().traffic(shape) == once
    # Outputs stay: inputs again for each 8 outputs, weights again for each 16 positions.
    tight = Systolic(rows=16, columns=8, input_buffer=1, weight_buffer=1, output_buffer=1)
    assert tight.traffic(shape) == 4 * (4 * 6400 + 4 * 3200 + 64 * 32)


def test_memory_or_work_whichever_is_longer() -> None:
    shape = linear(64, 32, 100)
    slow_memory = Systolic(bandwidth=1.0)
    assert slow_memory.stage(shape) == (slow_memory.traffic(shape), 0.0)
    slow_work = Systolic(frequency=1.0)
    assert slow_work.stage(shape) == (slow_work.cycles(shape), 0.0)


def test_convolutions_and_groups() -> None:
    conv = LayerShape(6, 8, (3, 3), (1, 1), (1, 1), (1, 1), calls=((2, 5, 5),))
    assert Systolic().cycles(conv) == Systolic().cycles(linear(50, 8, 54))
    grouped = LayerShape(6, 8, (3, 3), (1, 1), (1, 1), (1, 1), groups=2, calls=((2, 5, 5),))
    assert Systolic().cycles(grouped) == 2 * Systolic().cycles(linear(50, 4, 27))


def test_energy_grows_with_the_numbers_size() -> None:
    found = [Systolic().stage_energy(linear(8, 8, 8, size)) for size in (1, 2, 4)]
    energies = [joules for joules in found if joules is not None]
    assert len(energies) == 3 and energies == sorted(energies)
    assert Systolic().stage_energy(linear(8, 8, 8, 8)) is None


@given(
    M=st.integers(1, 200),
    N=st.integers(1, 200),
    K=st.integers(1, 200),
    dataflow=st.sampled_from(["output", "weight", "input"]),
)
def test_never_faster_than_its_elements(M: int, N: int, K: int, dataflow: str) -> None:
    model = Systolic(dataflow=dataflow)
    assert model.cycles(linear(M, N, K)) >= M * N * K / (model.rows * model.columns)


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"frequency": -1.0}, {"dataflow": "row"}, {"bandwidth": float("inf")}]
)
def test_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Systolic(**wrong)
