"""Fewer threads within, and as many as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from rankNAS.threads import SMALL, limited_threads, one_thread


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pools() -> list[int]:
    """Threads of each BLAS and OpenMP that is loaded."""
    np.eye(2) @ np.eye(2)
    return [pool["num_threads"] for pool in threadpool_info()]


def test_small_matrices_have_one_thread_and_large_ones_keep_theirs() -> None:
    with limited_threads(SMALL):
        assert torch.get_num_threads() == 1
        with limited_threads(SMALL + 1):  # nested calls do not take the limit back
            assert torch.get_num_threads() == 1
        with limited_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with limited_threads(SMALL + 1):
        assert torch.get_num_threads() == 2


def test_one_thread_is_for_numpy_too() -> None:
    before = pools()
    with one_thread():
        assert torch.get_num_threads() == 1 and set(pools()) == {1}
    assert torch.get_num_threads() == 2 and pools() == before


@pytest.mark.parametrize("limited", [limited_threads(8), one_thread()], ids=["torch", "all"])
def test_the_threads_are_restored_after_an_error(limited: AbstractContextManager[None]) -> None:
    before = pools()
    with pytest.raises(ZeroDivisionError), limited:
        _ = 1 / 0
    assert torch.get_num_threads() == 2 and pools() == before
