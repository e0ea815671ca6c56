"""The environment of a result: versions of libraries, and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["machine", "versions"]

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "optuna", "botorch", "gpytorch")


def versions() -> dict[str, str]:
    """Versions, by name, of RankNAS, Python and the libraries that affect results.

    >>> list(versions())[:3]
    ['rankNAS', 'python', 'torch']
    """
    found = {"rankNAS": _version("ranknas"), "python": platform.python_version()}
    return found | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a build from source may have another name
        return "unknown"


def machine() -> dict[str, str | int]:
    """The system, the architecture, the number of processors and PyTorch's threads.

    >>> sorted(machine())
    ['architecture', 'processors', 'system', 'threads']
    """
    import torch

    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processors": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
