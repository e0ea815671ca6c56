from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.decompositions.shapes import COSTS, Cost
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space


@cache
def space() -> SearchSpace:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.Linear(32, 5),
    )
    return compile_space(model, torch.randn(2, 3, 8, 8), min_weights=1)


@st.composite
def allocations(draw: st.DrawFn) -> Allocation:
    rng = random.Random(draw(st.integers(0, 10**6)))
    return Allocation.of({n: rng.choice(layer.choices) for n, layer in space().layers.items()})


@given(allocations())
def test_costs_add_up(allocation: Allocation) -> None:
    total = space().cost(allocation)
    for name in COSTS:
        layers = sum(space().layers[n][c][name] for n, c in allocation.items())
        assert total[name] == space().remainder_cost[name] + layers


@given(allocations(), st.sampled_from(["0", "1", "3"]))
def test_changing_one_layer_changes_the_cost_by_its_own(allocation: Allocation, name: str) -> None:
    changed = space().cost({**allocation, name: DENSE})
    before, own = space().cost(allocation), space().layers[name]
    assert changed.macs - before.macs == own[DENSE].macs - own[allocation[name]].macs
    assert changed.params - before.params == own[DENSE].params - own[allocation[name]].params


def test_dense() -> None:
    assert set(space().dense.values()) == {DENSE} and list(space().dense) == ["0", "1", "3"]
    assert space().dense_cost == space().cost(space().dense)
    weights = 16 * 27 + 16 * 144 + 256 * 32 + 32 * 5 + 16 + 16 + 32 + 5
    assert space().dense_cost.params == weights
    assert space().dense_cost.weight_bytes == 4 * weights


def test_a_layer_is_a_mapping_of_choices_to_costs() -> None:
    layer = space().layers["3"]
    assert len(layer) == len(layer.choices) == len(layer.costs)
    assert dict(layer) == dict(zip(layer.choices, layer.costs, strict=True))
    assert layer.paths == ("3",) and DENSE in layer and Choice("svd", (10**6,)) not in layer
    with pytest.raises(KeyError):
        layer[Choice("svd", (10**6,))]


def test_check_names_what_is_wrong() -> None:
    good = dict(space().dense)
    space().check(good)
    with pytest.raises(UsageError, match="the space has no layer 'other'"):
        space().check({**good, "other": DENSE})
    with pytest.raises(UsageError, match="no choice for layer '1'"):
        space().check({"0": DENSE, "3": DENSE})
    with pytest.raises(UsageError, match=r"'3' has no choice 'svd:999'; it has \d+, from dense"):
        space().cost({**good, "3": Choice("svd", (999,))})


def test_restrict_keeps_order_costs_and_dense() -> None:
    original = space()
    keep = {
        name: [layer.choices[-1], layer.choices[2], Choice("svd", (10**6,))]
        for name, layer in original.layers.items()
    }
    small = original.restrict(keep)
    for name, layer in small.layers.items():
        choices = original.layers[name].choices
        assert layer.choices == (DENSE, choices[2], choices[-1])
        assert all(layer[choice] == original.layers[name][choice] for choice in layer)
    assert (
        small.remainder_cost == original.remainder_cost and small.dense_cost == original.dense_cost
    )
    with pytest.raises(UsageError, match="has no choice"):
        small.check({**small.dense, "0": original.layers["0"].choices[1]})
    dense_only = original.restrict({name: () for name in original.layers})
    assert all(layer.choices == (DENSE,) for layer in dense_only.layers.values())


def test_costs_are_a_monoid() -> None:
    a, b = Cost(1, 2, 3), Cost(10, 20, 30)
    assert a + b == b + a == Cost(11, 22, 33) and a + Cost(0, 0, 0) == a
    assert [a[name] for name in COSTS] == [1, 2, 3]


@pytest.mark.parametrize("order", [[1, 0], [1], [0, 1, 0], []])
def test_the_first_choice_and_no_other_is_dense(order: list[int]) -> None:
    layer = space().layers["1"]
    choices = tuple(layer.choices[i] for i in order)
    with pytest.raises(UsageError, match="layer '1' has the choices .*must be dense"):
        replace(layer, choices=choices, costs=tuple(layer[choice] for choice in choices))
