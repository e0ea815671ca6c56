"""Safetensors with a checksum: any byte that is not as it was is an error, or changes nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankNAS.exceptions import WeightsError
from rankNAS.io.tensors import CHECKSUM, TYPES, encoded, read_tensors, write_tensors

TENSORS = {
    "b": torch.tensor([[1.0, -2.0], [3.5, 0.0]]),
    "a": torch.tensor([7], dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(True),
}
METADATA = {"allocation": '{"0": "svd:8"}', "é": "ü"}


def written(folder: Path) -> Path:
    path = folder / "a.safetensors"
    write_tensors(path, TENSORS, METADATA)
    return path


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
        for name in first
    )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    tensors, metadata = read_tensors(written(tmp_path))
    assert same(tensors, TENSORS)
    assert metadata.pop(CHECKSUM) and metadata == METADATA
    assert same(load_file(tmp_path / "a.safetensors"), TENSORS)  # for other programs too


def wide(tensor: Tensor) -> Tensor:
    """A tensor in a type whose values can be compared."""
    return tensor if tensor.is_complex() else tensor.double()


def test_every_type_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    kinds = [*TYPES, torch.float8_e4m3fn]
    tensors = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds}
    write_tensors(tmp_path / "a", tensors, METADATA)
    (tmp_path / "b").write_bytes(encoded(tensors, METADATA))
    for name in ("a", "b"):
        found = load_file(tmp_path / name)
        assert {n: t.dtype for n, t in found.items()} == {str(k): k for k in kinds}
        assert all((wide(tensor) == 1).all() for tensor in found.values())
    assert read_tensors(tmp_path / "a")[1] == read_tensors(tmp_path / "b")[1]


def test_the_checksum_is_of_contents_in_any_order(tmp_path: Path) -> None:
    def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        write_tensors(tmp_path / "a", tensors, metadata)
        return read_tensors(tmp_path / "a")[1][CHECKSUM]

    first = checksum(TENSORS, METADATA)
    reordered = dict(reversed(TENSORS.items())), dict(reversed(METADATA.items()))
    assert checksum(*reordered) == first
    assert checksum(TENSORS, METADATA | {"é": "u"}) != first
    assert checksum(TENSORS | {"scalar": torch.tensor(False)}, METADATA) != first


def test_files_of_other_programs_have_no_checksum(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", {"made": "elsewhere"})
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    assert same(tensors, TENSORS) and metadata == {"made": "elsewhere"}


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_every_flipped_byte_is_found_or_does_not_matter(tmp_path: Path, mask: int) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    payload = sum(t.numel() * t.element_size() for t in TENSORS.values())
    unnoticed = []
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ mask]) + content[i + 1 :])
        try:
            tensors, metadata = read_tensors(path)
        except WeightsError as error:
            assert str(path) in str(error)
            continue
        unnoticed.append(i)
        # Space within the JSON of the header, or the name of the entry of the checksum itself.
        assert same(tensors, TENSORS)
        assert METADATA.items() <= metadata.items()
    assert not [i for i in unnoticed if i >= len(content) - payload]


@pytest.mark.parametrize("seed", range(5))
def test_truncated_and_random_content(tmp_path: Path, seed: int) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *random.Random(seed).sample(range(10, len(content)), 10)]:
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=r"a\.safetensors is truncated"):
            read_tensors(path)
        path.write_bytes(random.Random(seed).randbytes(length))
        with pytest.raises(WeightsError, match=r"a\.safetensors is truncated"):
            read_tensors(path)


def test_a_checksum_that_was_kept_beside_other_tensors(tmp_path: Path) -> None:
    path = written(tmp_path)
    tensors, metadata = read_tensors(path)
    save_file({**tensors, "a": tensors["a"] + 1}, path, metadata)
    with pytest.raises(WeightsError, match="does not match its checksum.*make or fetch"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["none.safetensors", "x" * 300, "a\0b"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError):
        read_tensors(tmp_path / name)
