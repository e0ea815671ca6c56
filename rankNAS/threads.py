"""Thread limits for small dense linear algebra.

A small matrix gains little from a second thread. Where another process uses a core, threads that
wait for each other take up to ten times as long as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["SMALL", "limited_threads", "one_thread"]

# The side of the largest matrix that one thread factorises. On two busy cores, two threads took
# five times as long as one for a matrix of side 512.
SMALL = 640


@contextmanager
def limited_threads(size: int) -> Iterator[None]:
    """Limit PyTorch to one thread if the matrices are small; restored afterwards.

    Cheap enough for inner loops. Calls may be nested.

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch and the BLAS of NumPy and SciPy to one thread; restored afterwards.

    It takes some milliseconds to enter, so it belongs around a whole fit.
    """
    from threadpoolctl import threadpool_limits  # not at the top: few need it

    with limited_threads(1), threadpool_limits(1):
        yield
