"""Items become tensors, and batches of equal structure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from records import Pair, Record
from torch import Tensor

from rankNAS.data.items import as_tensors, shapes_of, stacked
from rankNAS.exceptions import DataError
from rankNAS.trees import tensors


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, torch.tensor(3)),
        (0.5, torch.tensor(0.5)),
        (True, torch.tensor(True)),
        (np.float32(2), torch.tensor(2.0)),
        (np.arange(3), torch.arange(3)),
        ([1, 2], torch.tensor([1, 2])),
        ([[1.0, 2.0], [3.0, 4.0]], torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
    ],
)
def test_numbers_arrays_and_lists(value: Any, expected: Tensor) -> None:
    found = as_tensors({"x": value, "name": "text"}, "item 0")
    assert torch.equal(found["x"], expected)
    assert found["x"].dtype == expected.dtype
    assert found["name"] == "text"


EXTRAS = [
    "a",
    None,
    b"a",
    ["a"],
    [[1], [1, 2]],
    np.str_("a"),
    np.array(["a"]),
    np.array([None]),
    np.datetime64("2020"),
]


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_is_no_number_stays(extra: Any) -> None:
    found = as_tensors((torch.zeros(2), extra), "item 0")
    assert found[1] is extra or found[1] == extra
    assert len(tensors(found)) == 1
    if not isinstance(extra, list):
        assert len(stacked([found] * 3)[1]) == 3


@pytest.mark.parametrize("value", ["a", None, (), {"a": "b"}, ("a", [])])
def test_an_item_without_tensors(value: Any) -> None:
    with pytest.raises(DataError) as error:
        as_tensors(value, "item 3 of the train split")
    assert str(error.value).startswith("item 3 of the train split is a ")
    assert "\n" not in str(error.value)


def test_stacked_keeps_the_structure() -> None:
    x = torch.arange(3.0)
    items = [
        {"a": x + i, "b": (x, Pair(x * i, "n")), "c": Record(torch.tensor(i)), "d": [x]}
        for i in range(4)
    ]
    found = stacked(items)
    assert torch.equal(found["a"], torch.stack([x + i for i in range(4)]))
    assert isinstance(found["b"][1], Pair)
    assert found["b"][1].x.shape == (4, 3)
    assert found["b"][1].y == ["n"] * 4
    assert found["c"].x.tolist() == [0, 1, 2, 3]
    assert found["d"][0].shape == (4, 3)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([torch.zeros(2), (torch.zeros(2),)], "differ in type: Tensor, tuple"),
        ([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], "differ in their keys"),
        ([(torch.zeros(1),), (torch.zeros(1), 1)], "number of parts"),
    ],
)
def test_items_of_unequal_structure(items: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        stacked(items)


def test_shapes() -> None:
    first, second = (torch.zeros(2), torch.zeros(3)), (torch.zeros(2), torch.zeros(4))
    assert shapes_of(first) == shapes_of((torch.ones(2), torch.ones(3)))
    assert shapes_of(first) != shapes_of(second)
    assert shapes_of(torch.zeros(2)) != shapes_of(torch.zeros(2).long())
