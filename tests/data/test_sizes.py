from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from rankNAS.data.base import Data
from rankNAS.data.samples import Samples
from rankNAS.data.sizes import affordable_samples, tokens_of
from rankNAS.settings import Settings

IDS = torch.zeros(6, 512, dtype=torch.int64)
FORMS: list[tuple[Any, int]] = [
    ([{"input_ids": x} for x in IDS], 512),
    ([{"input_ids": x, "attention_mask": x, "labels": 1} for x in IDS], 512),
    (IDS, 512),
    (TensorDataset(IDS[:, :-1], IDS[:, 1:]), 511),
    (TensorDataset(IDS, IDS[:, 0]), 1),
    (TensorDataset(IDS.float(), IDS), 1),
    (TensorDataset(torch.zeros(6, 3, 8, 8), IDS[:, 0]), 1),
    ([{"x": x} for x in IDS], 1),
]


@pytest.mark.parametrize(("source", "tokens"), FORMS)
def test_the_tokens_of_a_sample(source: Any, tokens: int) -> None:
    samples = Samples.of(source)
    assert tokens_of(samples) == tokens
    assert affordable_samples(128, samples) == (128 if tokens == 1 else 4)
    assert affordable_samples(2, samples) == 2


def data(samples: Any) -> Data:
    return Data("here", Samples.of(samples), None, None, None, "")


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (1024, (32, 16, 8, 2)),
        (64, (512, 256, 128, 32)),
        (16, (1024, 1024, 512, 128)),
        (100_000, (1, 1, 1, 1)),
    ],
)
def test_numbers_of_samples_by_tokens(length: int, sizes: tuple[int, ...]) -> None:
    found = data(torch.zeros(3, length, dtype=torch.int64))
    assert Settings().sizes(found) == sizes
    assert Settings(calibration=7, batch_size=3).sizes(found) == (7, *sizes[1:3], 3)
    stated = Settings(norm="input").sized(found)
    assert (stated.calibration, stated.batch_size, stated.norm) == (sizes[0], sizes[3], "input")


def test_images_have_the_numbers_that_they_always_had() -> None:
    found = data(torch.zeros(3, 3, 8, 8))
    assert Settings().sizes(found) == (1024, 1024, 512, 256)
    assert Settings().sized(found) == Settings(
        calibration=1024, validation=1024, screening=512, batch_size=256
    )
