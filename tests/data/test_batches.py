from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import Labelled, numbered, pixels, tensors, write_parquet
from torch.utils.data import Subset

from rankNAS.data.base import Data
from rankNAS.data.batches import batches, subset
from rankNAS.data.images.dataset import Images
from rankNAS.data.loading import load_data
from rankNAS.exceptions import DataError


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train.parquet", pixels(20), [i % 4 for i in range(20)])
    write_parquet(tmp_path / "test.parquet", pixels(6, seed=1), [i % 3 for i in range(6)])
    return tmp_path


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def test_batches_of_images_equal_item_by_item(parquet: Path) -> None:
    data = load_data(f"parquet:{parquet}")
    some = subset(data.train, torch.tensor([4, 2, 19]))
    nested = Subset(Subset(data.train, [5, 4, 2, 19]), [1, 2, 3])
    for dataset, size in ((data.train, 20), (some, 3), (nested, 3)):
        made = list(batches(dataset, 8))
        x, y = (torch.cat(part) for part in zip(*made, strict=True))
        assert torch.equal(x, torch.stack([dataset[i][0] for i in range(size)]))
        assert torch.equal(y, torch.stack([dataset[i][1] for i in range(size)]))
    assert torch.equal(next(batches(some, 3))[0], next(batches(nested, 3))[0])


def test_resized_batches_equal_item_by_item(digits: Data) -> None:
    x, y = next(batches(digits.train, 16))
    torch.testing.assert_close(x, torch.stack([digits.train[i][0] for i in range(16)]))
    assert y.tolist() == [int(digits.train[i][1]) for i in range(16)]


def test_batches_of_images_normalise_a_batch_at_once(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Images, "__getitem__", lambda *_: pytest.fail("read item by item"))
    for dataset in (digits.train, Subset(digits.train, range(100))):
        assert len(next(batches(dataset, 10))[0]) == 10


@pytest.mark.parametrize(
    "source",
    [
        tensors(7),
        tensors(7).tensors,
        Subset(tensors(9), list(range(7))),
        [tensors(7)[i] for i in range(7)],
    ],
)
def test_batches_of_any_form(source: Any) -> None:
    made = list(batches(source, 3))
    assert [len(x) for x, _ in made] == [3, 3, 1] == [len(y) for _, y in made]
    wanted = tensors(9)[:7] if isinstance(source, Subset) else tensors(7)[:]
    assert torch.equal(torch.cat([x for x, _ in made]), wanted[0])
    assert torch.equal(torch.cat([y for _, y in made]), wanted[1])


def test_batches_of_plain_numbers_have_tensor_targets() -> None:
    x, y = next(batches(Labelled([4, 5]), 2))
    assert x.shape == (2, 2, 3) and y.tolist() == [4, 5] and y.dtype == torch.int64


def test_shuffled_batches() -> None:
    source = numbered(50).train
    orders = [
        [int(y) for _, part in batches(source, 8, shuffle_seed=seed) for y in part]
        for seed in (None, 0, 0, 1)
    ]
    assert orders[0] == list(range(50)) == sorted(orders[1])
    assert orders[1] == orders[2] and orders[1] not in (orders[0], orders[3])
    assert all(torch.equal(x[:, 0].long(), y) for x, y in batches(source, 8, shuffle_seed=0))


def test_batches_are_moved_to_the_device(digits: Data) -> None:
    for source in (digits.train, tensors(4), tensors(4).tensors, Labelled([0, 1])):
        x, y = next(batches(source, 2, device="meta"))
        assert x.device.type == y.device.type == "meta"


def test_batches_errors() -> None:
    with pytest.raises(DataError, match="the batch size is 0"):
        batches(tensors(), 0)
    with pytest.raises(DataError, match="3 inputs have 2 targets"):
        batches((torch.ones(3), torch.ones(2)), 1)


def test_images_are_indexed_like_a_sequence(digits: Data) -> None:
    some = digits.train.subset(torch.tensor([3, 1]))
    assert torch.equal(some[-1][0], digits.train[1][0])
    with pytest.raises(IndexError):
        some[2]
    assert len(list(some)) == 2
