"""Modules of a network by path: found, and replaced by others."""

from __future__ import annotations

from torch import nn

__all__ = ["find", "put"]


def find(network: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None if there is none."""
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None


def put(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module at all of its paths."""
    modules = network.named_modules(remove_duplicate=False)
    for path in [path for path, module in modules if module is old]:
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, new)
