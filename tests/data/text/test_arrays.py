from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankNAS.data.text.arrays import read_arrays
from rankNAS.exceptions import DataError


def save(folder: Path, **arrays: Any) -> str:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return str(folder)


WINDOWS = np.arange(12, dtype=np.uint16).reshape(3, 4)


def test_arrays_stay_on_disk(tmp_path: Path) -> None:
    found = read_arrays(save(tmp_path, train=WINDOWS, test=WINDOWS[:1]))
    assert [*found] == ["train", "test"]
    assert isinstance(found["train"], np.memmap) and found["test"].shape == (1, 4)
    found = read_arrays(save(tmp_path, validation=WINDOWS))
    assert [*found] == ["train", "test", "valid"]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"train": WINDOWS}, r"there is no file '.*test\.npy'; tokens:DIR needs train\.npy"),
        ({"train": WINDOWS.astype("float32")}, r"train\.npy holds float32, but token ids are int"),
        ({"train": WINDOWS[0]}, r"has the shape \(4,\); save the tokens as windows x length"),
        ({"train": WINDOWS[:0]}, r"has the shape \(0, 4\); give at least one window of two"),
        ({"train": WINDOWS[:, :1]}, r"has the shape \(3, 1\); give at least one window of two"),
        ({"train": WINDOWS, "test": WINDOWS[:, :2]}, "differ in length: train 4, test 2;"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        read_arrays(save(tmp_path, **arrays))
    assert "\n" not in str(error.value)


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        read_arrays(str(tmp_path / "nothing"))
    stored = io.BytesIO()
    np.savez(stored, a=WINDOWS)
    for content in (b"", b"text", stored.getvalue()):
        (tmp_path / "train.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"train\.npy"):
            read_arrays(str(tmp_path))
