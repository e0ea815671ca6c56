"""Plug-ins: callables from user files, ``path/to/file.py:name``.

Data factories, objectives, models and hardware models can be given in this form. A file imports
other files of its folder by their names, as a script does, or relatively; in a package, also by
the name of the package. The files of one folder share them; other folders, libraries and the rest
of the program never find them: in `sys.modules`, all files of a folder belong to a package of
their own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from rankNAS.exceptions import UnknownNameError, UsageError

__all__ = [
    "MODULE_PREFIX",
    "import_files",
    "imported_files",
    "is_plugin",
    "load_callable",
    "neighbours_of",
]

MODULE_PREFIX = "rankNAS_plugin_"  # of the packages of folders, and so of all modules from files
INSTALLED = {"site-packages", "dist-packages"}
_folders: dict[str, Path] = {}  # by name of the package
_files: dict[str, Path] = {}  # by name of the module, those that were asked for
_neighbours: dict[Path, dict[str, ModuleType]] = {}  # by folder: its modules, by their own names
_open: list[Path] = []  # folders whose files can import each other now


def is_plugin(spec: str) -> bool:
    """Whether ``spec`` has the form ``path/to/file.py:name``."""
    path, _, name = spec.rpartition(":")
    return path.endswith(".py") and name.isidentifier()


def load_callable(spec: str, kind: str = "plug-in") -> Callable[..., Any]:
    """The callable that ``spec`` names, from its file.

    An unchanged file is imported once per process, so its classes keep their identity. So are the
    modules beside it that it imports, which are not imported again if they change.

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


def imported_files(pickled: bytes) -> list[Path]:
    """The files that objects of a pickle need, for `import_files` in another process.

    These are the files of `load_callable` whose folder has a module that the pickle names.
    """
    return [
        path
        for name, path in _files.items()
        if name.rpartition(".")[0].encode() in pickled and path.is_file()
    ]


def import_files(files: Sequence[Path]) -> None:
    """Import files, so that objects of their modules can be unpickled."""
    for path in files:
        _import_file(path, "plug-in")


@contextmanager
def neighbours_of(function: Callable[..., Any]) -> Iterator[None]:
    """Context for a call of a callable from a file, which may import neighbours as it runs.

    Args:
        function: From `load_callable`; the context does nothing for any other.
    """
    package = str(getattr(function, "__module__", None)).partition(".")[0]
    folder = _folders.get(package)
    if folder is None:
        yield
    else:
        with _importing_from(folder):
            yield


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
    # The name contains a key of the content: an edited file is a new module.
    key, stem = hashlib.sha256(content).hexdigest()[:16], re.sub(r"\W", "_", path.stem)
    name = f"{_package(path.resolve().parent)}.{stem}_{key}"
    return sys.modules[name] if name in sys.modules else _execute(name, path, kind)


def _package(folder: Path) -> str:
    """The name of the package of a folder's files; no other folder has it."""
    name = f"{MODULE_PREFIX}{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = importlib.util.module_from_spec(spec)
        _folders[name] = folder
    return name


def _execute(name: str, path: Path, kind: str) -> ModuleType:
    """Run the file as the module ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"cannot import {path} for the {kind}; give a Python source file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module during execution
    try:
        with _importing_from(path.resolve().parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(
            f"{path} raised {type(error).__name__}: {error} while it was imported for the {kind}; "
            f"the file must import without an error (try: python {path})."
        ) from error
    _files[name] = path.absolute()  # the name has the stem of a link, not of its target
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


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Context in which the files of a folder import each other by name."""
    if folder in _open:
        yield
        return
    own, finder = _neighbours.setdefault(folder, {}), _Finder(folder)
    others = _others(folder)
    for name in others:
        del sys.modules[name]
    sys.modules.update(own)
    sys.meta_path.insert(0, finder)
    _open.append(folder)
    try:
        yield
    finally:
        _open.remove(folder)
        sys.meta_path.remove(finder)
        roots = finder.found | {name.partition(".")[0] for name in own}
        for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
            module = sys.modules.pop(name)
            if name not in own:
                own[name] = module
                _rename(module, name, folder)
        sys.modules.update(others)


class _Finder(MetaPathFinder):
    """Finds the files of a folder, for imports in files of that folder alone.

    Libraries that are imported meanwhile do not find them, whatever their names are, and no file
    takes the place of a module of Python itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._top = folder, _top_package(folder)
        self.found: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The file of a module without a package, if a file of the folder imports it."""
        if path is not None or name in sys.stdlib_module_names or not self._is_asked():
            return None
        spec = PathFinder.find_spec(name, [str(self.folder)])
        if spec is None and name == self._top.name:
            spec = PathFinder.find_spec(name, [str(self._top.parent)])
        # A folder without __init__.py is a package only if there is no other of this name.
        if spec is None or (spec.origin is None and PathFinder.find_spec(name) is not None):
            return None
        self.found.add(name)
        return spec

    def _is_asked(self) -> bool:
        """Whether the import statement is in a file of the folder, or of its package."""
        frame = sys._getframe(2)
        machinery = ("<frozen importlib", os.path.dirname(importlib.__file__ or "importlib"))
        while frame.f_back is not None and frame.f_code.co_filename.startswith(machinery):
            frame = frame.f_back
        return _is_inside(frame.f_globals.get("__file__"), self._top)


def _top_package(folder: Path) -> Path:
    """The folder of the outermost package that a folder belongs to; the folder itself if none."""
    while (folder / "__init__.py").is_file() and (folder.parent / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _others(folder: Path) -> dict[str, ModuleType]:
    """Imported modules of other folders that have the name of a file of this one."""
    try:
        here = {name.removesuffix(".py") for name in os.listdir(folder)}
    except OSError:  # readable files in a folder that cannot be listed
        return {}
    here -= {__name__.partition(".")[0], "__main__", *sys.stdlib_module_names}
    taken = set()
    for name in here & sys.modules.keys():
        module = sys.modules[name]
        file = getattr(module, "__file__", None) or next(
            iter(getattr(module, "__path__", ())), None
        )
        if file and not _is_inside(file, folder) and INSTALLED.isdisjoint(Path(file).parts):
            taken.add(name)
    return {n: module for n, module in sys.modules.items() if n.partition(".")[0] in taken}


def _is_inside(file: str | None, folder: Path) -> bool:
    """Whether a file belongs to a folder, and not to a library installed below it."""
    if not file:
        return False
    path = Path(file).resolve()
    return path.is_relative_to(folder) and INSTALLED.isdisjoint(path.relative_to(folder).parts)


def _rename(module: ModuleType, name: str, folder: Path) -> None:
    """Move a neighbour into the package of its folder; its objects pickle under the new name."""
    new = f"{_package(folder)}.{name}"
    sys.modules[new] = module
    module.__name__ = new
    if module.__spec__ is not None:
        module.__spec__.name = new
        module.__package__ = module.__spec__.parent
    _rename_objects(module, name, new)


def _rename_objects(owner: ModuleType | type, old: str, new: str) -> None:
    """Replace the module's name in its classes and functions."""
    for value in list(vars(owner).values()):
        if isinstance(value, type | FunctionType) and value.__module__ == old:
            value.__module__ = new
            if isinstance(value, type):
                _rename_objects(value, old, new)
