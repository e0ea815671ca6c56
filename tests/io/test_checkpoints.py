"""Checkpoints whose damage is noticed, in files that PyTorch can read by itself."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rankNAS.exceptions import WeightsError
from rankNAS.io.checkpoints import check_archive, read_checkpoint, write_checkpoint

CONTENT: dict[str, Any] = {
    "step": 7,
    "model": {"weight": torch.tensor([1.0, -2.0, 3.0]), "count": torch.tensor(4)},
    "optimizer": {"state": {0: {"momentum": torch.full((3,), 0.5)}}, "groups": [{"lr": 0.1}]},
    "identity": {"epochs": 3, "shapes": {"weight": [3]}},
}


def written(folder: Path) -> Path:
    path = folder / "run.pt"
    write_checkpoint(path, CONTENT)
    return path


def essence(value: Any) -> Any:
    """Tensors as what can be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: essence(item) for key, item in value.items()}
    return [essence(item) for item in value] if isinstance(value, list) else value


def read(path: Path) -> Any:
    return essence(read_checkpoint(path, CONTENT["identity"]))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert read(path) == essence(CONTENT) == essence(torch.load(path, weights_only=True))
    check_archive(path)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_found_or_does_not_matter(tmp_path: Path, mask: int) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    found = 0
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ mask]) + content[i + 1 :])
        try:
            assert read(path) == essence(CONTENT)
        except WeightsError as error:
            assert str(path) in str(error)
            found += 1
    assert found > 200


def test_pytorch_alone_does_not_notice(tmp_path: Path) -> None:
    """Why the archive is read twice; when this fails, once is enough."""
    path = written(tmp_path)
    content = path.read_bytes()
    at = content.index(torch.tensor([1.0, -2.0, 3.0]).numpy().tobytes())
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    changed = torch.load(path, weights_only=True)["model"]["weight"]
    assert not torch.equal(changed, CONTENT["model"]["weight"])
    with pytest.raises(WeightsError, match="checksum or the mark of its part .*data/"):
        read(path)


@pytest.mark.parametrize("seed", range(5))
def test_truncated_and_random_content(tmp_path: Path, seed: int) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    for length in [0, 1, 4, 30, *random.Random(seed).sample(range(31, len(content)), 10)]:
        for bad in (content[:length], random.Random(seed).randbytes(length)):
            path.write_bytes(bad)
            with pytest.raises(WeightsError, match=r"run\.pt is no readable .*delete it"):
                read(path)


def test_of_another_training(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"run\.pt was written by a training with another"):
        read_checkpoint(written(tmp_path), {"epochs": 4})
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="another"):
        read_checkpoint(tmp_path / "list.pt", None)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"identity": None}))
    for name in ("old.pt", "plain.pt", "none.pt"):
        with pytest.raises(WeightsError, match=f"{name} is no readable"):
            read(tmp_path / name)
