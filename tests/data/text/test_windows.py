from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.data.samples import Samples
from rankNAS.data.text.windows import Tokens, Windows, overlapping, packed, padded


def tokens(count: int, *ends: int) -> Tokens:
    return Tokens(np.arange(count, dtype=np.int32), np.array([*ends] or [count], dtype=np.int64))


def counted(windows: Windows) -> list[int]:
    """The tokens that are predicted and count, in order."""
    batch = windows.batch(torch.arange(len(windows)))
    labels = batch.get("labels", batch["input_ids"])[:, 1:]
    return labels[labels != -100].tolist()


@settings(max_examples=80, deadline=None)
@given(count=st.integers(4, 200), length=st.integers(2, 20), data=st.data())
def test_overlapping_windows_count_every_token_once(
    count: int, length: int, data: st.DataObject
) -> None:
    length = min(length, count)
    stride = data.draw(st.integers(1, length - 1))
    found = overlapping(tokens(count), length, stride)
    assert counted(found) == list(range(1, count))
    assert found[0]["input_ids"].shape == (length,)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(2, 200), length=st.integers(2, 20))
def test_packed_windows_count_all_but_the_first_of_each(count: int, length: int) -> None:
    found = packed(tokens(count), min(length, count))
    n = len(found) * found.length
    assert n > count - found.length
    assert counted(found) == [i for i in range(n) if i % found.length]
    assert [*found[0]] == ["input_ids"]
    assert [*packed(tokens(count), 2, labelled=True)[0]] == ["input_ids", "labels"]


def test_a_stride_of_the_whole_context_does_not_overlap() -> None:
    assert counted(overlapping(tokens(12), 4, 4)) == counted(packed(tokens(12), 4))


def test_documents_are_padded_and_long_ones_continue() -> None:
    found = padded(tokens(13, 3, 4, 13), 4, 99)
    batch = found.batch(torch.arange(len(found)))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 99], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_padding_after_the_last_token() -> None:
    found = padded(tokens(5, 2, 5), 4, 7)
    assert found[1]["input_ids"].tolist() == [2, 3, 4, 7]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "uint64"])
def test_samples_gather_windows_of_any_integers(dtype: str) -> None:
    ids = np.arange(40).astype(dtype)
    samples = Samples.of(Windows(ids, np.arange(0, 40, 4), 4))
    assert samples.uniform and len(samples) == 10
    batch = next(samples.batches(3, shuffle_seed=1))
    assert batch["input_ids"].shape == (3, 4) and batch["input_ids"].dtype == torch.int64
    assert torch.equal(samples.kept()[2]["input_ids"], samples[2]["input_ids"])
    assert samples[2]["input_ids"].tolist() == [8, 9, 10, 11]
