"""One thread for loops of small dense linear algebra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["limited_threads"]


@contextmanager
def limited_threads(count: int = 1) -> Iterator[None]:
    """Limit the threads of PyTorch, and of the BLAS of NumPy and SciPy; restored afterwards.

    Matrices of a few hundred rows gain nothing from more threads, and where another process uses
    a core, threads that wait for each other take ten times as long as one.
    """
    from threadpoolctl import threadpool_limits  # not at the top: few need it

    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(threads)
