"""Decoded images on disk: reused, rebuilt, bounded."""

from __future__ import annotations

import errno
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from image_sets import fill_folder, pixels, write_parquet

from rankNAS.data.base import Data
from rankNAS.data.images import cache, readers
from rankNAS.data.loading import load_data
from rankNAS.exceptions import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(cache.LIMIT, raising=False)
    data = tmp_path / "data"
    data.mkdir()
    write_parquet(data / "train.parquet", pixels(20), [i % 4 for i in range(20)])
    write_parquet(data / "test.parquet", pixels(6, seed=1), [i % 3 for i in range(6)])
    return data


def entries(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "images").glob("*"))


def assert_equal(one: Data, other: Data) -> None:
    assert one.fingerprint == other.fingerprint and one.test is not None
    assert other.test is not None
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert all(torch.equal(x, y) for x, y in zip(a.batch(), b.batch(), strict=True))


def test_the_second_time_nothing_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_data(f"parquet:{folder}")

    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(readers, "_parquet_columns", refuse)
    assert_equal(first, load_data(f"parquet:{folder}", normalize=first.normalize))
    assert len(entries(folder)) == 1


def test_changed_files_and_options_are_other_entries(folder: Path) -> None:
    first = load_data(f"parquet:{folder}")
    assert load_data(f"parquet:{folder}", image_size=4).input_shape == (3, 4, 4)
    write_parquet(folder / "test.parquet", pixels(6, seed=2), [i % 3 for i in range(6)])
    changed = load_data(f"parquet:{folder}")
    assert len(entries(folder)) == 3 and changed.fingerprint != first.fingerprint
    os.utime(folder / "train.parquet", ns=(0, 0))
    assert_equal(changed, load_data(f"parquet:{folder}"))
    assert len(entries(folder)) == 4


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:-1] + b"?", lambda c: b"x"])
def test_damaged_entries_are_made_again(
    folder: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_data(f"parquet:{folder}")
    (path,) = entries(folder)
    content = path.read_bytes()
    path.write_bytes(damage(content))  # type: ignore[operator]
    assert_equal(first, load_data(f"parquet:{folder}"))
    assert "unreadable and are made again" in caplog.text
    assert cache.read(path) is not None


def test_a_folder_that_cannot_be_made_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = folder.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("RANKNAS_CACHE", str(blocked))
    assert len(load_data(f"parquet:{folder}").train) == 20
    assert "could not be kept" in caplog.text


def test_the_least_recently_used_entries_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_data(f"parquet:{folder}")
    (first,) = entries(folder)
    size = first.stat().st_size
    load_data(f"parquet:{folder}", image_size=7)
    (second,) = set(entries(folder)) - {first}
    os.utime(second, ns=(10, 10))
    os.utime(first, ns=(5, 5))
    load_data(f"parquet:{folder}")  # used again
    monkeypatch.setenv(cache.LIMIT, str(2.2 * size / 1e9))
    load_data(f"parquet:{folder}", image_size=6)
    assert first in entries(folder) and second not in entries(folder)
    assert len(entries(folder)) == 2


def test_no_entries_with_a_bound_of_zero(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.LIMIT, "0")
    assert len(load_data(f"parquet:{folder}").train) == 20 and not entries(folder)
    monkeypatch.setenv(cache.LIMIT, "much")
    with pytest.raises(DataError, match="RANKNAS_IMAGE_CACHE_GB is 'much'; give gigabytes"):
        load_data(f"parquet:{folder}")


def image_folder(folder: Path) -> Path:
    root = folder.parent / "folder"
    for split in ("train", "test"):
        fill_folder(root / split, "abc", 3)
    return root


def test_image_folders_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(folder)
    monkeypatch.setenv(cache.LIMIT, "0")
    on_access = load_data(f"imagefolder:{root}", image_size=8)
    monkeypatch.delenv(cache.LIMIT)
    first = load_data(f"imagefolder:{root}", image_size=8)
    assert_equal(first, on_access)
    assert len(entries(folder)) == 1
    monkeypatch.setattr(readers, "ImageDecoder", None)
    assert_equal(first, load_data(f"imagefolder:{root}", image_size=8, normalize=first.normalize))


def test_image_folders_that_do_not_fit_are_decoded_on_access(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "EAGER_BYTES", 10)
    found = load_data(f"imagefolder:{image_folder(folder)}", image_size=8)
    assert not entries(folder) and found.train.batch()[0].shape == (9, 3, 8, 8)


def _load(folder: Path) -> str:
    return load_data(f"parquet:{folder}").fingerprint


def test_processes_may_write_at_once(folder: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = set(pool.map(_load, [folder] * 8))
    assert found == {_load(folder)}
    assert [path.suffix for path in entries(folder)] == [".safetensors"]


def test_temporary_files_of_killed_processes_go_after_a_day(folder: Path) -> None:
    kept = folder.parent / "cache" / "images"
    kept.mkdir(parents=True)
    for name in ("old.tmp", "new.tmp"):
        (kept / name).write_bytes(b"part")
    os.utime(kept / "old.tmp", ns=(0, 0))
    load_data(f"parquet:{folder}")
    assert not (kept / "old.tmp").exists() and (kept / "new.tmp").exists()


def test_a_full_disk_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("rankNAS.io.tensors._parts", full)
    assert len(load_data(f"parquet:{folder}").train) == 20
    assert "could not be kept" in caplog.text and not entries(folder)
