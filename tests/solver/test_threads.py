"""Fewer threads for a while, and as many as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from rankNAS.solver.threads import limited_threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def pools() -> list[int]:
    np.eye(2) @ np.eye(2)
    return [pool["num_threads"] for pool in threadpool_info()]


def test_threads_are_limited_and_restored(two_threads: None) -> None:
    before = pools()
    with limited_threads():
        assert torch.get_num_threads() == 1
        assert set(pools()) == {1}
    assert torch.get_num_threads() == 2 and pools() == before


def test_threads_are_restored_after_an_error(two_threads: None) -> None:
    before = pools()
    with pytest.raises(ZeroDivisionError), limited_threads():
        _ = 1 / 0
    assert torch.get_num_threads() == 2 and pools() == before
