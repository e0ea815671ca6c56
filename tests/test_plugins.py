"""Callables from files of the user."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.execution.sharing import sending
from rankNAS.plugins import MODULE_PREFIX, is_plugin, load_callable, neighbours_of


def write(folder: Path, content: str, name: str = "user.py") -> Path:
    path = folder / name
    path.write_text(content)
    return path


def test_loads_functions_and_classes(tmp_path: Path) -> None:
    path = write(tmp_path, "def seven():\n    return 7\nclass Thing:\n    size = 3\n")
    assert load_callable(f"{path}:seven")() == 7
    assert load_callable(f"{path}:Thing")().size == 3


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "def seven():\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    assert load_callable("user.py:seven")() == 7
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert load_callable("~/user.py:seven")() == 7


def test_an_unchanged_file_is_imported_once_and_its_objects_pickle(tmp_path: Path) -> None:
    path = write(tmp_path, "class Thing:\n    pass\n")
    first = load_callable(f"{path}:Thing")
    assert load_callable(f"{path}:Thing") is first
    assert type(pickle.loads(pickle.dumps(first()))) is first


def test_an_edited_file_is_imported_anew(tmp_path: Path) -> None:
    path = write(tmp_path, "def value():\n    return 1\n")
    assert load_callable(f"{path}:value")() == 1
    write(tmp_path, "def value():\n    return 1 + 1\n")
    assert load_callable(f"{path}:value")() == 2


def test_equal_file_names_do_not_clash(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name, f"def name():\n    return {name!r}\n"))
    assert [load_callable(f"{path}:name")() for path in paths] == ["a", "b"]


def test_dataclasses_in_the_file_work(tmp_path: Path) -> None:
    content = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int\n"
    )
    assert load_callable(f"{write(tmp_path, content)}:Point")(4).x == 4


@pytest.mark.parametrize("spec", ["user.py", "user:name", "user.py:", "user.py:a b", "", ":f"])
def test_malformed(spec: str) -> None:
    assert not is_plugin(spec)
    with pytest.raises(UsageError, match=r"the objective .* form path/to/file\.py:name"):
        load_callable(spec, "objective")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none\.py for the model \(No such file"):
        load_callable(f"{tmp_path}/none.py:f", "model")


def test_missing_name_suggests_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "from math import sqrt\ndef make_data(): ...\ndef _make_dat(): ...\n")
    with pytest.raises(
        UnknownNameError,
        match=r"unknown data factory 'make_dat'\. Did you mean 'make_data'\? Known: make_data\. ",
    ):
        load_callable(f"{path}:make_dat", "data factory")


def test_not_callable(tmp_path: Path) -> None:
    path = write(tmp_path, "data = 3\n")
    with pytest.raises(
        UsageError, match=r"'data' in .*user\.py is a int, but a data factory must"
    ):
        load_callable(f"{path}:data", "data factory")


@pytest.mark.parametrize(
    ("content", "raised"),
    [
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: "),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_an_exception_in_the_file_is_named_each_time(
    tmp_path: Path, content: str, raised: str
) -> None:
    path = write(tmp_path, content)
    for _ in range(2):  # a module that failed must not stay half-imported
        with pytest.raises(UsageError, match=rf"user\.py raised {raised}"):
            load_callable(f"{path}:f")


# --------------------------------------------------------------------------------- neighbours


def write_project(folder: Path, value: int) -> str:
    """A file that imports neighbours: files, packages, and one as it runs."""
    (folder / "nets" / "inner").mkdir(parents=True)
    write(folder, f"VALUE = {value}\nclass Block:\n    value = VALUE\n", "blocks.py")
    write(
        folder / "nets", "from .inner.deep import deep\nfrom blocks import VALUE\n", "__init__.py"
    )
    write(folder / "nets", "LATE = 5\n", "late.py")
    write(
        folder / "nets" / "inner",
        "def deep():\n    from ..late import LATE\n    return LATE\n",
        "deep.py",
    )
    write(folder, "def later():\n    return 'later'\n", "later.py")
    content = (
        "import json\nimport blocks\nimport nets.inner.deep as d\nfrom blocks import Block\n"
        "from nets import VALUE, deep\n"
        "def net():\n    import later\n"
        "    return Block(), blocks.VALUE, VALUE, deep() + d.deep(), later.later()\n"
    )
    return f"{write(folder, content, 'models.py')}:net"


def test_neighbours_are_imported_and_folders_do_not_mix(tmp_path: Path) -> None:
    made = []
    for value, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        factory = load_callable(write_project(tmp_path / name, value))
        before = dict(sys.modules)
        with neighbours_of(factory):
            block, *values = factory()
        assert values == [value, value, 10, "later"] and block.value == value
        assert {n for n in sys.modules if n not in before} <= {
            n for n in sys.modules if n.startswith(MODULE_PREFIX)
        }
        made.append(block)
    assert not {"blocks", "nets", "nets.inner", "later", "models"} & sys.modules.keys()
    for block in made:
        again = pickle.loads(pickle.dumps(block))
        assert type(again) is type(block) and again.value == block.value


def test_relative_imports(tmp_path: Path) -> None:
    write(tmp_path, "import other\nclass Block:\n    value = other.VALUE\n", "blocks.py")
    write(tmp_path, "VALUE = 4\n", "other.py")
    path = write(
        tmp_path,
        "from .blocks import Block\ndef net():\n    from . import other\n"
        "    return Block(), other.VALUE\n",
        "my.model.py",
    )
    block, value = load_callable(f"{path}:net")()
    assert block.value == value == 4
    assert type(pickle.loads(pickle.dumps(block))) is type(block)
    assert not {"blocks", "other"} & sys.modules.keys()


def test_a_file_of_a_package_imports_it_by_name(tmp_path: Path) -> None:
    inner = tmp_path / "plugin_test_package" / "nets"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        write(folder, "", "__init__.py")
    write(inner.parent, "VALUE = 5\n", "consts.py")
    content = "from plugin_test_package.consts import VALUE\nclass Block:\n    value = VALUE\n"
    write(inner, content, "blocks.py")
    content = (
        "from plugin_test_package.nets.blocks import Block\n"
        "from plugin_test_package import consts\n"
        "def net():\n    return Block(), consts.VALUE\n"
    )
    block, value = load_callable(f"{write(inner, content, 'models.py')}:net")()
    assert block.value == value == 5
    assert type(pickle.loads(pickle.dumps(block))) is type(block)
    assert "plugin_test_package" not in sys.modules


def test_files_of_one_folder_share_their_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "class Block:\n    pass\n", "blocks.py")
    paths = [write(tmp_path, "from blocks import Block\n", f"{name}.py") for name in "ab"]
    first, second = (load_callable(f"{path}:Block") for path in paths)
    assert first is second


def test_neighbours_shadow_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of Python stay, and a library finds its own, whatever is in the user's folder."""
    library, user = tmp_path / "site-packages", tmp_path / "user"
    library.mkdir()
    user.mkdir()
    write(
        library,
        "import plugin_test_helper\nNAME = plugin_test_helper.NAME\n",
        "plugin_test_lib.py",
    )
    write(library, "NAME = 'of the library'\n", "plugin_test_helper.py")
    monkeypatch.syspath_prepend(str(library))
    for name in ("plugin_test_helper", "tabnanny", "math"):
        write(user, "NAME = 'of the user'\n", f"{name}.py")
    write(
        user,
        "import math, tabnanny, plugin_test_lib\n"
        "def names():\n    return plugin_test_lib.NAME, hasattr(tabnanny, 'check'), math.pi\n",
        "mine.py",
    )
    assert load_callable(f"{user}/mine.py:names")() == ("of the library", True, math.pi)
    other = write(
        user, "from plugin_test_helper import NAME\ndef name():\n    return NAME\n", "other.py"
    )
    monkeypatch.delitem(sys.modules, "plugin_test_helper")
    assert load_callable(f"{other}:name")() == "of the user"
    import plugin_test_helper  # type: ignore[import-not-found]

    assert plugin_test_helper.NAME == "of the library"


def test_a_module_of_another_folder_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("script", "plugin"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, f"NAME = {name!r}\n", "plugin_test_blocks.py")
    monkeypatch.syspath_prepend(str(tmp_path / "script"))
    import plugin_test_blocks  # type: ignore[import-not-found]

    path = write(
        tmp_path / "plugin", "from plugin_test_blocks import NAME\ndef name():\n    return NAME\n"
    )
    assert load_callable(f"{path}:name")() == "plugin"
    assert sys.modules["plugin_test_blocks"] is plugin_test_blocks
    assert plugin_test_blocks.NAME == "script"


def test_networks_with_neighbours_go_to_workers(tmp_path: Path) -> None:
    """By value: a worker has neither the files nor the names."""
    ray = pytest.importorskip("ray")
    write(tmp_path, "class Block:\n    size = 3\ndef two():\n    return 2\n", "blocks.py")
    path = write(
        tmp_path,
        "import blocks\nclass Net(blocks.Block):\n"
        "    def run(self):\n        return self.size + blocks.two()\n",
    )
    network = load_callable(f"{path}:Net")()
    with sending():
        content = ray.cloudpickle.dumps(network)
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).run())"
    done = subprocess.run(
        [sys.executable, "-c", code], input=content, capture_output=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == b"5"
