"""Asynchronous successive halving."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankNAS.allocation import DENSE, Allocation
from rankNAS.exceptions import UsageError
from rankNAS.execution.early_stopping import SuccessiveHalving, steps
from rankNAS.strategies.history import History, Trial

values = st.lists(st.integers(0, 20), min_size=1, max_size=60)


@given(values, st.integers(2, 4))
def test_a_trial_goes_on_if_few_are_better(accuracies: list[int], reduction: int) -> None:
    pruner = SuccessiveHalving(["accuracy"], ["maximize"], reduction)
    for i, accuracy in enumerate(accuracies):
        better = sum(a > accuracy for a in accuracies[:i])
        assert pruner("t", 10, {"accuracy": accuracy}) == (better * reduction < i + 1)


@given(values)
def test_directions_are_mirrored(found: list[int]) -> None:
    up = SuccessiveHalving(["accuracy"], ["maximize"])
    down = SuccessiveHalving(["loss"], ["minimize"])
    for value in found:
        assert up("t", 1, {"accuracy": value}) == down("t", 1, {"loss": -value})


def test_budgets_and_steps_are_apart() -> None:
    pruner = SuccessiveHalving(["accuracy"], ["maximize"])
    assert pruner("a", 10, {"accuracy": 0.9})
    assert not pruner("a", 10, {"accuracy": 0.1})
    assert pruner("b", 10, {"accuracy": 0.1})
    assert pruner("a", 20, {"accuracy": 0.1})


def test_with_several_objectives_only_what_is_worse_in_all_is_behind() -> None:
    pruner = SuccessiveHalving(["accuracy", "macs"], ["maximize", "minimize"])
    assert pruner("t", 1, {"accuracy": 0.9, "macs": 100})
    assert pruner("t", 1, {"accuracy": 0.1, "macs": 50})
    assert not pruner("t", 1, {"accuracy": 0.05, "macs": 60})


def test_an_earlier_session_is_learned_from_its_record() -> None:
    allocation = Allocation.of({"a": DENSE})
    metrics = {"accuracy@10": 0.9, "accuracy@20": 0.8, "accuracy": 0.7}
    pruner = SuccessiveHalving(["accuracy"], ["maximize"])
    pruner.learn(History((Trial(0, allocation, "complete", (0.7,), metrics, budget_key="t"),)))
    assert not pruner("t", 10, {"accuracy": 0.89})
    assert not pruner("t", 20, {"accuracy": 0.79})
    assert steps(metrics) == {10: {"accuracy": 0.9}, 20: {"accuracy": 0.8}}


def test_objectives_that_are_measured_at_the_end_alone_are_refused() -> None:
    with pytest.raises(UsageError, match="early stopping .* latency"):
        SuccessiveHalving(["latency"], ["minimize"])
    with pytest.raises(UsageError, match="at least 2"):
        SuccessiveHalving(["loss"], ["minimize"], reduction=1)


def test_the_divergence_takes_the_place_of_the_first_objective() -> None:
    names, directions = ["accuracy", "macs"], ["maximize", "minimize"]
    pruner = SuccessiveHalving(names, directions, reduction=2, divergence="kl_divergence")
    steps_ = [(0.5, 0.2), (0.9, 0.4), (0.1, 0.1)]  # accuracy and divergence disagree
    found = [
        pruner("macs<=0.5", 256, {"accuracy": a, "kl_divergence": d, "macs": 1.0 + d})
        for a, d in steps_
    ]
    assert found == [True, False, True]
