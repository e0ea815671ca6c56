"""Containers of tensors: kinds are kept, places are named, samples are counted and chosen."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from records import Pair, Record
from torch import Tensor, nn

from rankNAS.exceptions import DataError
from rankNAS.trees import (
    Inputs,
    channels_last,
    count_bytes,
    device_of,
    named_tensors,
    rows,
    size_of,
    tensors,
    to_device,
    tree_map,
    with_size,
)

A, B = torch.arange(4.0), torch.arange(8.0).reshape(4, 2)
TREES = [
    A,
    (A, B),
    [A, "text", None],
    {"a": A, "b": (B, 3)},
    OrderedDict(a=A, b=B),
    UserDict({"a": A, "b": B}),
    defaultdict(list, a=A),
    Pair(A, (B, "text")),
    Record(A),
    {"a": Record((A, B))},
]


@pytest.mark.parametrize("tree", TREES)
def test_containers_keep_their_kind(tree: Any) -> None:
    found = tree_map(lambda x: x + 1, tree)
    assert type(found) is type(tree) or isinstance(tree, defaultdict)
    names = [name for name, _ in named_tensors(tree)]
    assert [name for name, _ in named_tensors(found)] == names
    for before, after in zip(tensors(tree), tensors(found), strict=True):
        assert torch.equal(before + 1, after)
    assert count_bytes(found) == count_bytes(tree) > 0
    assert [x.device.type for x in tensors(to_device(tree, "meta"))] == ["meta"] * len(names)
    assert size_of(tree) == 4


def test_places_are_named() -> None:
    tree = {"a": A, "b": [B, {"c": A}], "d": Record((A,))}
    assert [name for name, _ in named_tensors(tree)] == ["a", "b[0]", "b[1].c", "d.x[0]"]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("wanted", [torch.tensor([3, 1]), slice(1, 3), torch.tensor(2)])
def test_rows(tree: Any, wanted: Any) -> None:
    found = rows(tree, wanted, 4)
    for before, after in zip(tensors(tree), tensors(found), strict=True):
        assert torch.equal(before[wanted], after)


def test_rows_of_lists_and_of_shared_tensors() -> None:
    batch = ([A, B, A, B], ["a", "b", "c", "d"], torch.zeros(7), torch.tensor(3))
    found = rows(batch, torch.tensor([3, 0]), 4)
    assert found[0][0] is B
    assert found[0][1] is A
    assert found[1] == ["d", "a"]
    assert len(found[2]) == 7
    assert found[3].dim() == 0
    assert rows(batch, torch.tensor(1), 4)[1] == "b"
    assert rows(batch, slice(0, 1), 4)[1] == ["a"]


def test_sizes_of_lists_below_the_top() -> None:
    images = [torch.rand(3, 4 + i, 5) for i in range(6)]
    assert size_of((images, [{"boxes": torch.zeros(i, 4)} for i in range(6)])) == 6
    assert size_of((images[:3], ["a"] * 3)) == 3
    assert size_of([torch.zeros(2, 5), torch.zeros(2)]) == 2


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x": A, "y": torch.zeros(3)}, "x has 4, y has 3"),
        ((A, torch.zeros(5)), "[0] has 4, [1] has 5"),
        (3, "a batch is a int without tensors"),
        ({"x": torch.tensor(1.0)}, "a batch is a dict without tensors"),
        ((A, ["a", "b"]), "[0] has 4, [1] has 2"),
    ],
)
def test_sizes_of_no_use(batch: Any, said: str) -> None:
    with pytest.raises(DataError) as error:
        size_of(batch)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_with_size(size: int) -> None:
    found = with_size({"a": A, "b": B}, size)
    assert size_of(found) == size
    assert found["a"].tolist() == [float(i % 4) for i in range(size)]


def test_channels_last() -> None:
    tree = channels_last((torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5).long(), A))
    assert tree[0].is_contiguous(memory_format=torch.channels_last)
    assert tree[1].is_contiguous()
    assert tree[2] is A


def test_inputs() -> None:
    class Net(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    for given in ((A, A + 1), [A, A + 1], {"b": A + 1, "a": A}, Inputs((A,), {"b": A + 1})):
        inputs = Inputs.of(given)
        assert inputs.run(Net()).tolist() == [-1.0] * 4
        assert isinstance(inputs.first, Tensor)
        assert torch.equal(rows(inputs, slice(0, 2), 4).run(Net()), -torch.ones(2))
    assert Inputs.of(A).first is A
    assert Inputs.of(()).first is None


def test_device_of() -> None:
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(2, affine=False)).type == "cpu"
    assert device_of(nn.ReLU()).type == "cpu"


def test_models_of_transformers_keep_no_cache_in_a_pass() -> None:
    class Model(nn.Module):
        def __init__(self, use_cache: object) -> None:
            super().__init__()
            self.config = SimpleNamespace(use_cache=use_cache)

        def forward(self, x: Tensor) -> object:
            if x.sum() > 0:
                raise ValueError
            return self.config.use_cache

    model = Model(True)
    assert Inputs.of(torch.zeros(1)).run(model) is False and model.config.use_cache is True
    with pytest.raises(ValueError):
        Inputs.of(torch.ones(1)).run(model)
    assert model.config.use_cache is True
    for kept in (False, None, "later"):
        assert Inputs.of(torch.zeros(1)).run(Model(kept)) is kept
