"""Batches of samples: they equal the items, in every form of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import Labelled, numbered, pixels, tensors, write_parquet
from torch.utils.data import Subset

from rankNAS.data.base import Data
from rankNAS.data.images.dataset import Images
from rankNAS.data.loading import load_data
from rankNAS.data.samples import Samples
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
    images = data.train.source
    some = data.train.take(torch.tensor([4, 2, 19]))
    nested = Samples.of(Subset(Subset(images, [5, 4, 2, 19]), [1, 2, 3]))
    for samples, order in ((data.train, range(20)), (some, [4, 2, 19]), (nested, [4, 2, 19])):
        made = list(samples.batches(8))
        x, y = (torch.cat(part) for part in zip(*made, strict=True))
        for i, row in enumerate(order):
            assert torch.equal(x[i], samples[i][0]) and torch.equal(x[i], images[row][0])
            assert torch.equal(y[i], samples[i][1]) and torch.equal(y[i], images[row][1])
        assert len(samples) == len(x) == len(order)
    assert torch.equal(next(some.batches(3))[0], next(nested.batches(3))[0])


def test_resized_batches_equal_item_by_item(digits: Data) -> None:
    x, y = next(digits.train.batches(16))
    torch.testing.assert_close(x, torch.stack([digits.train[i][0] for i in range(16)]))
    assert y.tolist() == [int(digits.train[i][1]) for i in range(16)]


def test_batches_of_images_normalise_a_batch_at_once(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Images, "__getitem__", lambda *_: pytest.fail("read item by item"))
    for samples in (digits.train, Samples.of(Subset(digits.train.source, range(100)))):
        assert len(next(samples.batches(10))[0]) == 10


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
    made = list(Samples.of(source).batches(3))
    assert [len(x) for x, _ in made] == [3, 3, 1] == [len(y) for _, y in made]
    wanted = tensors(9)[:7] if isinstance(source, Subset) else tensors(7)[:]
    assert torch.equal(torch.cat([x for x, _ in made]), wanted[0])
    assert torch.equal(torch.cat([y for _, y in made]), wanted[1])


def test_batches_of_plain_numbers_have_tensor_targets() -> None:
    x, y = next(Samples.of(Labelled([4, 5])).batches(2))
    assert x.shape == (2, 2, 3) and y.tolist() == [4, 5] and y.dtype == torch.int64


def test_shuffled_batches() -> None:
    samples = numbered(50).train
    orders = [
        [int(y) for _, part in samples.batches(8, shuffle_seed=seed) for y in part]
        for seed in (None, 0, 0, 1)
    ]
    assert orders[0] == list(range(50)) == sorted(orders[1])
    assert orders[1] == orders[2] and orders[1] not in (orders[0], orders[3])
    assert all(torch.equal(x[:, 0].long(), y) for x, y in samples.batches(8, shuffle_seed=0))


def test_batches_are_moved_to_the_device(digits: Data) -> None:
    for source in (digits.train, tensors(4), tensors(4).tensors, Labelled([0, 1])):
        x, y = next(Samples.of(source).batches(2, device="meta"))
        assert x.device.type == y.device.type == "meta"


def test_batches_errors() -> None:
    with pytest.raises(DataError, match="the batch size is 0"):
        Samples.of(tensors()).batches(0)
    with pytest.raises(DataError, match=r"axis 0: \[0\] has 3, \[1\] has 2; return batches"):
        Samples.of((torch.ones(3), torch.ones(2)))


def test_images_are_indexed_like_a_sequence(digits: Data) -> None:
    images = digits.train.source
    some = images.subset(torch.tensor([3, 1]))
    assert torch.equal(some[-1][0], images[1][0])
    assert torch.equal(Samples.of(some)[-1][0], images[1][0])
    with pytest.raises(IndexError):
        some[2]
    with pytest.raises(IndexError):
        Samples.of(some)[2]
    assert len(list(some)) == len(list(Samples.of(some))) == 2
