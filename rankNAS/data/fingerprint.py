"""Content keys of data sets, identical on all machines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from rankNAS.data.samples import Samples
from rankNAS.trees import tensors

__all__ = ["digest", "sampled_bytes"]


def digest(parts: Iterable[bytes]) -> str:
    """The SHA-256 hex digest of a sequence of byte strings, including their boundaries."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def sampled_bytes(samples: Samples) -> list[bytes]:
    """The number of samples and up to 64 evenly spaced ones, including the first and the last."""
    last = len(samples) - 1
    parts = [str(last).encode()]
    # Random transforms that use torch's generator must give the same items each time.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for row in sorted({i * last // 63 for i in range(64)}):
            for value in tensors(samples[row]):
                parts += [f"{value.dtype}{tuple(value.shape)}".encode(), _raw(value)]
    return parts


def _raw(value: Tensor) -> bytes:
    """The bytes of a tensor of any dtype (numpy has no bfloat16)."""
    raw: bytes = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return raw
