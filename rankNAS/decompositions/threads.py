"""Threads of small dense linear algebra.

A factorisation of a small matrix gains little from a second thread, and waits long for it if
another process holds a core.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["SMALL", "limited_threads"]

# The side of the largest matrix that one thread factorises. On two busy cores, two threads took
# five times as long as one for a matrix of side 512.
SMALL = 640


@contextmanager
def limited_threads(size: int) -> Iterator[None]:
    """Within, PyTorch uses one thread if the matrices are small.

    The number of threads is restored afterwards, also after an error. Calls may be nested.

    Args:
        size: The side of the largest square matrix that is factorised or solved.

    >>> before = torch.get_num_threads()
    >>> with limited_threads(64):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    before = torch.get_num_threads()
    if size > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
