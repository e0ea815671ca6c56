"""Small generated data sets: images in files, and tensors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from rankNAS.data.base import Data


def pixels(count: int, seed: int = 0, height: int = 8, width: int = 8) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3))
    return values.astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path, images: Any, labels: list[Any], *, image: str = "image", label: str = "label"
) -> None:
    encoded = [{"bytes": png(one), "path": None} for one in images]
    pd.DataFrame({image: encoded, label: labels}).to_parquet(path)


def fill_folder(
    folder: Path, classes: str, count: int = 2, size: tuple[int, int] = (40, 30)
) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = np.full((size[1], size[0], 3), 50 * number + index, dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{index}.png")


class Labelled(Dataset[tuple[torch.Tensor, Any]]):
    """Items with the given targets; counts how often inputs are read."""

    def __init__(self, targets: list[Any], attribute: list[Any] | None = None) -> None:
        self.values = targets
        self.reads = 0
        if attribute is not None:
            self.targets = attribute

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        self.reads += 1
        return torch.full((2, 3), float(index)), self.values[index]


def tensors(count: int = 10, seed: int = 0, targets: torch.Tensor | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 4, 4, generator=generator)
    return TensorDataset(x, torch.arange(count) % 5 if targets is None else targets)


def numbered(count: int, test: int = 3) -> Data:
    """Inputs that tell which item they are; the test items are negative."""
    train = TensorDataset(torch.arange(count).float()[:, None], torch.arange(count))
    held = TensorDataset(-1 - torch.arange(test).float()[:, None], torch.arange(test))
    return Data("numbered", train, held, (1,), count, "0")
