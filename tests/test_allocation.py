"""Allocations and choices as values and as text."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.exceptions import UsageError

choices = st.builds(
    Choice,
    st.text("abcxyz_019", min_size=1, max_size=10),
    st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
)
allocations = st.dictionaries(st.text('abc.0é"', max_size=8), choices, max_size=5).map(
    Allocation.of
)


@given(choices)
def test_a_choice_survives_text(choice: Choice) -> None:
    assert Choice.parse(str(choice)) == choice


def test_choices_as_text() -> None:
    assert str(DENSE) == "dense"
    assert str(Choice("svd", (16,))) == "svd:16"
    assert str(Choice("group_svd", (4, 8))) == "group_svd:4x8"
    assert sorted([Choice("svd", (10,)), Choice("svd", (9,)), DENSE]) == [
        DENSE,
        Choice("svd", (9,)),
        Choice("svd", (10,)),
    ]


@pytest.mark.parametrize("text", ["svd:a", "svd:1x", "svd:1,2", "svd:1.5", "svd:x2"])
def test_malformed_choices(text: str) -> None:
    with pytest.raises(UsageError, match="must look like 'svd:16'"):
        Choice.parse(text)


@given(allocations)
def test_an_allocation_survives_json(allocation: Allocation) -> None:
    again = Allocation.from_json(allocation.to_json())
    assert again == allocation
    assert hash(again) == hash(allocation)
    assert list(again) == list(allocation)


@given(allocations)
def test_an_allocation_survives_pickle(allocation: Allocation) -> None:
    assert pickle.loads(pickle.dumps(allocation)) == allocation


@given(allocations)
def test_an_allocation_is_a_mapping(allocation: Allocation) -> None:
    assert len(allocation) == len(list(allocation))
    assert dict(allocation) == {name: allocation[name] for name in allocation}
    assert Allocation.of(dict(allocation)) == allocation
    assert allocation.labels() == {name: str(choice) for name, choice in allocation.items()}


def test_order_does_not_matter_for_equality() -> None:
    a = Allocation.of({"x": DENSE, "y": Choice("svd", (1,))})
    b = Allocation.of({"y": Choice("svd", (1,)), "x": DENSE})
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b}) == 1
    assert a != Allocation.of({"x": DENSE})
    assert a != dict(a)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON object"),
        ("[1]", "got list"),
        ('{"a": 3.5, "b": "svd:q"}', "must look like"),
    ],
)
def test_malformed_allocations(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Allocation.from_json(text)


def test_a_missing_layer_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Allocation.of({"a": DENSE})["b"]
