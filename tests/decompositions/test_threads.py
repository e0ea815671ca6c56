from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rankNAS.decompositions.threads import SMALL, limited_threads


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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


def test_the_threads_are_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), limited_threads(8):
        _ = 1 / 0
    assert torch.get_num_threads() == 2
