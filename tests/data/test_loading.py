"""Sources by name, data sets and functions of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import Labelled, tensors
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from rankNAS.data.base import Data
from rankNAS.data.loading import load_data
from rankNAS.exceptions import DataError, UnknownNameError, UsageError


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


@pytest.mark.parametrize("source", ["digit", "digits:", "parquet", "csv:/tmp", "", "a.py"])
def test_unknown_source(source: str) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown data source .* Known: cifar10:DIR, digits"
    ):
        load_data(source)


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_bad_image_size(size: Any) -> None:
    with pytest.raises(DataError, match=f"the image size is {size}; give a positive integer"):
        load_data("digits", image_size=size)


def test_a_pair_of_datasets() -> None:
    data = load_data((tensors(10), tensors(4, seed=1, targets=torch.tensor([1, 0, 6, 2]))))
    assert (data.input_shape, data.num_classes) == ((3, 4, 4), 7)
    assert (data.normalize, data.flip) == (None, False)


def test_data_passes_through(digits: Data) -> None:
    assert load_data(digits) is digits


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield 1


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ([tensors(), tensors()], "item 0 of the train split is a TensorDataset without a tensor"),
        ((tensors(),), "datasets: got tuple; give a Data, a tuple of two data sets"),
        (None, "datasets: got NoneType; give a Data, a tuple of two data sets"),
        (3, "the train data is a int; give a map-style data set"),
        ((tensors(), Stream()), "the tensor with 0 axes in the test split"),
        ((tensors(0), tensors()), "the train split has no items"),
        (
            (tensors(), Labelled([0])),
            r"items have \[0\] with 3 axes, \[1\] with 0 axes in the train .* \[0\] with 2 axes",
        ),
        ((TensorDataset(torch.ones(2)), tensors()), r"items have \[0\] with 0 axes in the train"),
        (([(1, 2)], tensors()), r"items have \[0\] with 0 axes, \[1\] with 0 axes in the train"),
        ((tensors(), [5]), "the tensor with 0 axes in the test split"),
        ((["cat"], ["dog"]), "item 0 of the train split is a str without a tensor"),
        (
            (Labelled(["cat"]), Labelled([0])),
            r"\[0\] with 2 axes in the train split, but",
        ),
        (([(Image.new("RGB", (4, 4)), 0)], tensors()), "contains a Image; convert it"),
    ],
)
def test_unusable_pairs(pair: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(pair)


@pytest.mark.parametrize("options", [{"normalize": "0.5,0.5"}, {"image_size": 8}])
def test_options_that_have_no_effect_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="a given dataset prepares its inputs itself"):
        load_data((tensors(), tensors()), **options)
    with pytest.raises(DataError, match="x.py:make prepares its inputs itself"):
        load_data("x.py:make", **options)


FACTORY = """
import torch
from torch.utils.data import TensorDataset
from rankNAS.data import load_data

def pair():
    return tuple(TensorDataset(torch.ones(n, 2), torch.arange(n)) for n in (6, 3))
def data():
    return load_data(pair())
def nothing():
    return None
def failing():
    raise RuntimeError("no network")
def wrong():
    return load_data("parquet:/not/there")
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FACTORY)
    return path


@pytest.mark.parametrize("name", ["pair", "data"])
def test_factory(factory: Path, name: str) -> None:
    data = load_data(f"{factory}:{name}")
    assert data.name == f"{factory}:{name}"
    assert (data.input_shape, data.num_classes, len(data.train)) == ((2,), 6, 6)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", DataError, r"mine\.py:nothing: got NoneType; give a Data"),
        ("failing", DataError, r"mine\.py:failing raised RuntimeError: no network"),
        ("wrong", DataError, "there is no folder '/not/there'"),
        ("pare", UnknownNameError, "unknown data factory 'pare'. Did you mean 'pair'"),
    ],
)
def test_factory_errors(factory: Path, name: str, error: type[UsageError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_data(f"{factory}:{name}")
