"""Budgets as written on the command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankNAS.budget import BUDGET_COSTS, check_budget, parse_budget
from rankNAS.decompositions.shapes import EXACT_COSTS
from rankNAS.exceptions import BudgetError, UnknownNameError

fractions = st.floats(0, 1, exclude_min=True)


@given(st.dictionaries(st.sampled_from(BUDGET_COSTS), fractions))
def test_written_budgets_are_read_back(budget: dict[str, float]) -> None:
    assert parse_budget([f"{name}={fraction!r}" for name, fraction in budget.items()]) == budget
    assert check_budget(budget) == budget


def test_every_cost_that_is_counted_may_be_bounded() -> None:
    assert BUDGET_COSTS == (*EXACT_COSTS, "latency")
    assert parse_budget(["layer_params=0.8"]) == {"layer_params": 0.8}
    assert parse_budget(["0.8"], "layer_macs") == {"layer_macs": 0.8}


def test_a_bare_fraction_bounds_the_default_cost() -> None:
    assert parse_budget(["0.3"]) == {"macs": 0.3}
    assert parse_budget(["0.3"], "latency") == {"latency": 0.3}
    assert parse_budget(["0.5", "params=0.25"]) == {"macs": 0.5, "params": 0.25}
    assert parse_budget([]) == {}


@pytest.mark.parametrize("item", ["0", "-0.1", "1.0001", "nan", "inf", "30"])
def test_fractions_outside_zero_to_one(item: str) -> None:
    with pytest.raises(BudgetError, match=r"'macs' must be in \(0, 1\]"):
        parse_budget([item])


@pytest.mark.parametrize("item", ["", "half", "macs=", "macs=30%", "0,3"])
def test_not_a_number(item: str) -> None:
    with pytest.raises(BudgetError, match="must be a fraction such as 0.3"):
        parse_budget([item])


def test_twice_the_same_cost() -> None:
    with pytest.raises(BudgetError, match="'macs' is given twice"):
        parse_budget(["0.3", "macs=0.4"])


def test_unknown_cost_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'params'"):
        parse_budget(["parms=0.3"])
    with pytest.raises(UnknownNameError, match="'joules'"):
        check_budget({"joules": 0.3})


def test_the_result_is_a_copy_of_plain_floats() -> None:
    given_ = {"macs": 1}
    result = check_budget(given_)
    assert result is not given_
    assert type(result["macs"]) is float
