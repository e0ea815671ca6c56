from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import numbered

from rankNAS.data.base import Data
from rankNAS.data.images.dataset import Images
from rankNAS.data.loading import load_data
from rankNAS.data.samples import Samples
from rankNAS.data.splits import split
from rankNAS.exceptions import DataError


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def ids(source: Samples) -> set[int]:
    return {int(value) for x, _ in source.batches(64) for value in x.flatten()}


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(5, 400),
    calibration=st.integers(1, 300),
    validation=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_splits_are_disjoint_and_bounded(
    count: int, calibration: int, validation: int, seed: int
) -> None:
    data = numbered(count)
    parts = split(data, calibration=calibration, validation=validation, seed=seed)
    assert len(parts.validation) == min(validation, count // 5)
    assert len(parts.calibration) == min(calibration, count * 2 // 5)
    held_out, calibrating, training = map(
        ids, (parts.validation, parts.calibration, parts.training)
    )
    assert len(held_out) == len(parts.validation) > 0
    assert len(calibrating) == len(parts.calibration) > 0
    assert not held_out & calibrating and not held_out & training
    assert calibrating <= training
    assert held_out | training == set(range(count))
    assert len(parts.training) == len(training)
    assert parts.test is data.test
    for inputs, targets in (parts.validation.batch(), parts.calibration.batch()):
        assert torch.equal(inputs[:, 0].long(), targets)


def test_split_depends_on_the_seed_only() -> None:
    parts = [split(numbered(100), calibration=10, validation=10, seed=s) for s in (0, 0, 1)]
    calibrating = [part.calibration.batch()[0] for part in parts]
    assert torch.equal(calibrating[0], calibrating[1])
    assert not torch.equal(calibrating[0], calibrating[2])
    # Results of studies depend on these items: the choice must not change between versions.
    assert parts[0].validation.batch()[1].tolist() == [44, 19, 93, 90, 71, 69, 37, 95, 53, 91]


def test_split_of_images(digits: Data) -> None:
    parts = split(digits, calibration=100, validation=50)
    inputs, targets = parts.calibration.batch()
    assert inputs.shape == (100, 3, 32, 32) and targets.shape == (100,)
    assert parts.calibration.in_memory and parts.validation.in_memory
    assert isinstance(parts.training.source, Images) and len(parts.training) == 1388


def test_split_errors() -> None:
    with pytest.raises(DataError, match="numbered has 4 training items; at least 5"):
        split(numbered(4))
    with pytest.raises(DataError, match="0 calibration and 1024 validation items were asked for"):
        split(numbered(10), calibration=0)
    with pytest.raises(DataError, match="1024 calibration and -1 validation"):
        split(numbered(10), validation=-1)
