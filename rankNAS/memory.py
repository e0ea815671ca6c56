"""Memory that the C library keeps for itself after it was freed."""

from __future__ import annotations

import contextlib
import ctypes

__all__ = ["give_back"]


def give_back() -> None:
    """Return free memory to the system, where the C library is glibc; elsewhere nothing happens.

    Activations that are kept between large temporary tensors would otherwise let a process grow
    by what lies free between them. It takes some milliseconds.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
