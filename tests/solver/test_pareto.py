"""Pareto fronts, their volume and the pruning of choices, against the definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rankNAS.solver.pareto import hypervolume, non_dominated, pareto_filter

points = arrays(
    float, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(0, 3).map(float)
)


@given(points)
def test_the_definition(values: np.ndarray) -> None:
    expected = [
        not any(all(q >= p) and any(q > p) for q in values)  # q dominates p
        for p in values
    ]
    assert non_dominated(values).tolist() == expected


@given(points)
def test_someone_is_always_on_the_front(values: np.ndarray) -> None:
    assert non_dominated(values).any()


@given(points, st.randoms())
def test_order_does_not_matter(values: np.ndarray, random: object) -> None:
    order = np.arange(len(values))
    random.shuffle(order)
    assert non_dominated(values[order]).tolist() == non_dominated(values)[order].tolist()


def test_one_objective_keeps_all_of_the_best() -> None:
    assert non_dominated([[1.0], [3.0], [3.0], [2.0]]).tolist() == [False, True, True, False]


def test_equal_points_stay_together() -> None:
    assert non_dominated([[1.0, 2.0], [1.0, 2.0], [0.0, 2.0]]).tolist() == [True, True, False]


# ------------------------------------------------------------------------------- hypervolume


@st.composite
def scattered(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """At most six points in two or three objectives, some below the reference, and the latter."""
    M = draw(st.integers(2, 3))
    shape = draw(st.integers(0, 6)), M
    coordinates = st.one_of(st.integers(-2, 3).map(float), st.floats(-2, 3, width=32))
    reference = draw(arrays(float, M, elements=st.integers(-1, 1).map(float)))
    return draw(arrays(float, shape, elements=coordinates)), reference


def inclusion_exclusion(points: np.ndarray, reference: np.ndarray) -> float:
    """The union of the boxes from the reference to each point, by their intersections."""
    return sum(
        (-1) ** (size + 1) * float(np.prod(np.clip(np.min(some, 0) - reference, 0, None)))
        for size in range(1, len(points) + 1)
        for some in itertools.combinations(points, size)
    )


@settings(max_examples=150, deadline=None)
@given(scattered())
def test_the_hypervolume_is_that_of_the_union_of_boxes(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    values, reference = case
    expected = inclusion_exclusion(values, reference)
    assert hypervolume(values, reference) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(case=scattered(), data=st.data())
def test_a_further_point_never_shrinks_the_hypervolume(
    case: tuple[np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    values, reference = case
    point = data.draw(arrays(float, len(reference), elements=st.floats(-2, 3, width=32)))
    before = hypervolume(values, reference)
    after = hypervolume([*values, point], reference)
    assert after >= before - 1e-9
    if any((q >= point).all() for q in values) or (point <= reference).any():
        assert after == pytest.approx(before)


def test_the_hypervolume_of_one_point_is_a_box() -> None:
    assert hypervolume([[3.0, 5.0]], [1.0, 1.0]) == pytest.approx(8)
    assert hypervolume([[3.0, 5.0, 2.0]], [1.0, 1.0, 0.5]) == pytest.approx(12)
    assert hypervolume([], [0.0, 0.0]) == 0
    assert hypervolume([[1.0, 0.0]], [0.0, 0.0]) == 0


# ------------------------------------------------------------------------ choices of a layer

choices = st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=20)


@given(choices)
def test_worthwhile_keeps_exactly_one_of_each_point_that_nothing_beats(
    rows: list[tuple[int, int, int]],
) -> None:
    kept = pareto_filter([r[0] for r in rows], [[r[1] for r in rows], [r[2] for r in rows]], 99)
    unbeaten = {
        p
        for p in rows
        if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in rows)
    }
    assert {rows[i] for i in kept} == unbeaten and len(kept) == len(unbeaten)
    assert [rows[i][1] for i in kept] == sorted(rows[i][1] for i in kept)


def test_thinning_keeps_both_ends() -> None:
    errors = list(np.linspace(1, 0, 50))
    kept = pareto_filter(errors, [list(range(50))], 7)
    assert len(kept) == 7 and kept[0] == 0 and kept[-1] == 49
