"""The repository's layout: packages listed, imports pointing down, public names complete."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rankNAS

ROOT = Path(__file__).parents[1]
LEVELS = [
    {
        *("exceptions", "allocation", "budget", "copies", "deadline", "lazy", "phases"),
        *("memory", "plugins", "renamed", "threads", "trees"),
    },
    {"io", "data", "decompositions", "solver"},
    {"tasks"},
    {"search_spaces"},
    {"compression", "recovery", "objectives"},
    {"hw_models", "models", "evaluation"},
    {"strategies"},
    {
        *("storage", "study", "testing", "settings", "fallback", "pipeline", "reporting"),
        "model_data",
    },
    {"execution"},
    {"engine"},
    {"comparison", "comparison_plan", "comparison_seed", "compressor"},
    {"cli", "__main__"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def modules() -> list[str]:
    return sorted(
        m.name for m in pkgutil.walk_packages(rankNAS.__path__, "rankNAS.") if m.name[8] != "_"
    )


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not in a checkout")
def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in (
            "rankNAS",
            "rankNAS/search_spaces",
            "rankNAS/objectives",
            "rankNAS/hw_models",
        )
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(listed)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rankNAS."):
            found.add(str(node.module).split(".")[1])
    return found


def test_imports_point_down() -> None:
    folder = Path(rankNAS.__path__[0])
    for name in modules():
        part = name.split(".")[1]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        for other in imported(Path(spec.origin)):
            assert LEVEL[other] <= LEVEL[part], f"{name} imports rankNAS.{other}"
    assert folder.is_dir()


def test_the_public_names_exist_and_are_all() -> None:
    for name in rankNAS.__all__:
        assert getattr(rankNAS, name) is not None
    assert sorted(rankNAS.__all__) == sorted(rankNAS._HOMES) == sorted(dir(rankNAS))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rankNAS.nothing


def test_every_public_name_has_an_example() -> None:
    """`DENSE` is a value, shown in the examples of `Allocation`."""
    for name in set(rankNAS.__all__) - {"DENSE"}:
        assert ">>>" in (getattr(rankNAS, name).__doc__ or ""), name


@pytest.mark.parametrize("name", [n for n in modules() if not n.startswith("rankNAS.cli")])
def test_docstring_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_help_loads_no_torch() -> None:
    code = "import sys, rankNAS.cli; sys.exit('torch' in sys.modules or 'optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
