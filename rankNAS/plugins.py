"""Plug-ins: callables from user files, ``path/to/file.py:name``.

Data factories, objectives, models and hardware models can be given in this form.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rankNAS.exceptions import UnknownNameError, UsageError

__all__ = ["MODULE_PREFIX", "is_plugin", "load_callable"]

MODULE_PREFIX = "rankNAS_plugin_"  # prefix of modules imported from files


def is_plugin(spec: str) -> bool:
    """Whether ``spec`` has the form ``path/to/file.py:name``."""
    path, _, name = spec.rpartition(":")
    return path.endswith(".py") and name.isidentifier()


def load_callable(spec: str, kind: str = "plug-in") -> Callable[..., Any]:
    """The callable that ``spec`` names, from its file.

    An unchanged file is imported once per process, so its classes keep their identity.

    Args:
        spec: ``path/to/file.py:name``; ``~`` is the home folder.
        kind: The purpose of the callable, for error messages.

    Raises:
        UsageError: ``spec`` is malformed, the file is missing or raises an error on import, or
            the name is missing (the message suggests the nearest one) or not callable.
    """
    if not is_plugin(spec):
        raise UsageError(
            f"the {kind} {spec!r} does not have the form path/to/file.py:name; "
            "give a Python file, a colon and the name of a callable in it."
        )
    path, _, name = spec.rpartition(":")
    module = _import_file(Path(os.path.expanduser(path)), kind)
    if not hasattr(module, name):
        hint = f"The names are those that {path} defines."
        raise UnknownNameError(kind, name, _own_callables(module), hint)
    found = getattr(module, name)
    if not callable(found):
        raise UsageError(
            f"{name!r} in {path} is a {type(found).__name__}, but a {kind} must be callable; "
            "name a function or a class."
        )
    return found  # type: ignore[no-any-return]  # callable() narrows Any to nothing more


def _import_file(path: Path, kind: str) -> ModuleType:
    """The module in ``path``, imported again only if its content has changed."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"cannot read {path} for the {kind} ({reason}); "
            "give the path of an existing Python file before the colon."
        ) from error
    key = hashlib.sha256(str(path.resolve()).encode() + b"\0" + content).hexdigest()[:16]
    # The name contains a key of the content: an edited file is a new module.
    name = f"{MODULE_PREFIX}{path.stem}_{key}"
    return sys.modules[name] if name in sys.modules else _execute(name, path, kind)


def _execute(name: str, path: Path, kind: str) -> ModuleType:
    """Run the file as the module ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"cannot import {path} for the {kind}; give a Python source file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module during execution
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(
            f"{path} raised {type(error).__name__}: {error} while it was imported for the {kind}; "
            f"the file must import without an error (try: python {path})."
        ) from error
    return module


def _own_callables(module: ModuleType) -> list[str]:
    """Public callables defined in the file itself, for suggestions."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    ]
