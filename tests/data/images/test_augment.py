from __future__ import annotations

import pytest
import torch

from rankNAS.data.base import Data
from rankNAS.data.images.augment import Augmentation
from rankNAS.data.loading import load_data


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def coordinates(count: int, height: int, width: int) -> torch.Tensor:
    """Images whose two channels hold row and column, from 1; padding is 0."""
    rows, columns = torch.meshgrid(
        torch.arange(1.0, height + 1), torch.arange(1.0, width + 1), indexing="ij"
    )
    return torch.stack([rows, columns]).expand(count, 2, height, width)


@pytest.mark.parametrize("flip", [True, False])
def test_augment_shifts_and_mirrors(flip: bool) -> None:
    x = coordinates(200, 16, 24)
    made = Augmentation(flip)(x, torch.Generator().manual_seed(0))
    assert made.shape == x.shape
    shifts, mirrored = set(), 0
    for image in made:
        row, column = int(image[0, 8, 12]) - 9, int(image[1, 8, 12])
        step = int(image[1, 8, 13]) - column
        mirrored += step == -1
        offset = column - (13 if step == 1 else 12)
        shifts.add((row, offset))
        inside = image[0] > 0
        assert abs(step) == 1 and torch.equal(inside, image[1] > 0)
        assert inside.sum() == (16 - abs(row)) * (24 - abs(offset))
    assert {row for row, _ in shifts} == set(range(-2, 3))
    assert {column for _, column in shifts} == set(range(-3, 4))
    assert 60 < mirrored < 140 if flip else mirrored == 0


def test_augment_is_reproducible_and_leaves_its_input(digits: Data) -> None:
    x, _ = next(digits.train.batches(8))
    before = x.clone()
    first, second = (
        Augmentation(flip=True)(x, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second) and torch.equal(x, before)
    assert not torch.equal(first, x)


def test_augment_of_what_is_no_image() -> None:
    x = torch.ones(4, 7)
    assert Augmentation(flip=True)(x, torch.Generator()) is x


def test_augment_of_tiny_images_only_mirrors() -> None:
    x = coordinates(20, 4, 4)
    made = Augmentation(flip=True)(x, torch.Generator().manual_seed(0))
    assert all(
        torch.equal(new, old) or torch.equal(new, old.flip(-1))
        for new, old in zip(made, x, strict=True)
    )
