"""Content keys of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["content_of", "fingerprint"]


def fingerprint(tensors: Mapping[str, Tensor], salt: str = "") -> str:
    """A key (32 hex digits) of names, shapes, dtypes and contents, identical on all machines."""
    digest = hashlib.sha256(salt.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(content_of(tensor))
    return digest.hexdigest()[:32]


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where they lie so in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
