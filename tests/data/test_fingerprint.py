from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import Labelled, fill_folder, pixels, tensors, write_parquet
from PIL import Image
from torch.utils.data import TensorDataset

from rankNAS.data.base import Data
from rankNAS.data.loading import load_data


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train.parquet", pixels(20), [i % 4 for i in range(20)])
    write_parquet(tmp_path / "test.parquet", pixels(6, seed=1), [i % 3 for i in range(6)])
    return tmp_path


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def test_fingerprint_does_not_depend_on_the_folder(parquet: Path) -> None:
    here = load_data(f"parquet:{parquet}").fingerprint
    moved = parquet.rename(parquet.parent / f"{parquet.name}-moved")
    assert load_data(f"parquet:{moved}").fingerprint == here
    assert len(here) == 16 and int(here, 16) >= 0


def test_fingerprint_of_digits_is_fixed(digits: Data) -> None:
    # Caches and studies are keyed by it, on any machine: it may only change with the data.
    assert digits.fingerprint == "2143a9aab137d43b"


def test_fingerprint_tells_preprocessing_and_content_apart(parquet: Path) -> None:
    source = f"parquet:{parquet}"
    keys = [
        load_data(source).fingerprint,
        load_data(source, normalize="cifar10").fingerprint,
        load_data(source, image_size=6).fingerprint,
    ]
    write_parquet(parquet / "test.parquet", pixels(6, seed=1), [i % 2 for i in range(6)])
    keys.append(load_data(source).fingerprint)
    write_parquet(parquet / "test.parquet", pixels(6, seed=2), [i % 2 for i in range(6)])
    keys.append(load_data(source).fingerprint)
    assert len(set(keys)) == 5
    assert load_data(source, normalize="imagenet", image_size=8).fingerprint == keys[-1]


def test_fingerprint_of_image_folders(tmp_path: Path) -> None:
    for name in ("train", "test"):
        fill_folder(tmp_path / name, "ab")
    source = f"imagefolder:{tmp_path}"
    keys = [load_data(source).fingerprint, load_data(source).fingerprint]
    (tmp_path / "test" / "b" / "1.png").rename(tmp_path / "test" / "a" / "7.png")
    keys.append(load_data(source).fingerprint)
    fresh = np.zeros((30, 40, 3), dtype=np.uint8)
    Image.fromarray(fresh).save(tmp_path / "train" / "b" / "1.png")
    keys.append(load_data(source).fingerprint)
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_fingerprint_of_pairs() -> None:
    def key(train: Any, test: Any) -> str:
        return load_data((train, test)).fingerprint

    base = key(tensors(200), tensors(5))
    assert base == key(tensors(200), tensors(5))
    changed = tensors(200)
    changed.tensors[0][199, 0, 0, 0] += 1  # the last item is always looked at
    others = [
        key(changed, tensors(5)),
        key(tensors(199), tensors(5)),
        key(tensors(200), tensors(5, seed=1)),
        key(tensors(200), tensors(5, targets=torch.zeros(5, dtype=torch.int64))),
        key(tensors(5), tensors(200)),
    ]
    assert len({base, *others}) == 6


def test_fingerprint_does_not_depend_on_random_transforms() -> None:
    class Noisy(Labelled):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
            return torch.rand(2, 3), self.values[index]

    made = [load_data((Noisy([0, 1], [0, 1]), Labelled([0]))).fingerprint for _ in range(2)]
    assert made[0] == made[1]


def test_fingerprint_of_bfloat16_inputs() -> None:
    pair = [TensorDataset(torch.ones(3, 2, dtype=torch.bfloat16), torch.arange(3))] * 2
    assert load_data((pair[0], pair[1])).fingerprint
