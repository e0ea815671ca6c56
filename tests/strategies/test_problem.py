"""A search in numbers: dense comes first, and every table fits the choices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rankNAS.allocation import DENSE, Choice
from rankNAS.exceptions import UsageError
from rankNAS.strategies.problem import DENSE_INDEX, Problem

CHOICES = (DENSE, Choice("svd", (4,)), Choice("svd", (1,)))
PROBLEM = Problem(
    {"a": CHOICES, "b": CHOICES[:2]},
    (np.array([0, 0.1, 0.5]), np.array([0, 0.2])),
    {"macs": (np.array([10.0, 6, 2]), np.array([8.0, 3]))},
    {"macs": 1.0},
    {"macs": 0.5},
)


def test_dense_is_the_first_choice_of_every_layer() -> None:
    assert PROBLEM.all_dense == PROBLEM.alone(0, DENSE_INDEX) == (DENSE_INDEX, DENSE_INDEX)
    assert set(PROBLEM.allocation(PROBLEM.all_dense).values()) == {DENSE}
    assert PROBLEM.fractions(PROBLEM.all_dense) == {"macs": 1.0}
    assert PROBLEM.dense == {"macs": 19.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": {"a": CHOICES[::-1], "b": CHOICES[:2]}}, "'a' must be dense"),
        ({"choices": {"a": CHOICES, "b": (DENSE, DENSE)}}, "'b' has the choice dense more than"),
        ({"errors": (PROBLEM.errors[0], np.array([0.1, 0.2]))}, "'b' left dense must be 0"),
        ({"errors": (PROBLEM.errors[0], np.zeros(3))}, "table of errors does not fit"),
        ({"errors": PROBLEM.errors[:1]}, "table of errors does not fit"),
        ({"costs": {"macs": PROBLEM.errors[:1]}}, "table of macs does not fit"),
        ({"choices": {"a": (), "b": CHOICES[:2]}}, "does not fit"),
    ],
)
def test_tables_that_break_the_order_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(PROBLEM, **changes)


def test_a_restricted_problem_keeps_dense_first() -> None:
    assert PROBLEM.restricted([[0, 2], [0]]).choices == {"a": (DENSE, CHOICES[2]), "b": (DENSE,)}
    for operators in (None, ("svd",), ("tucker2",)):
        for choices in PROBLEM.within(operators).choices.values():
            assert choices[DENSE_INDEX] == DENSE
    with pytest.raises(UsageError, match="'a' must be dense"):
        PROBLEM.restricted([[1, 2], [0]])
