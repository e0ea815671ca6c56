"""What is imported on first use, and what the catalogues say of it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from rankNAS import hw_models, objectives, search_spaces, strategies
from rankNAS.decompositions.shapes import LAYER_COSTS
from rankNAS.exceptions import UsageError
from rankNAS.hw_models import HW_MODELS
from rankNAS.lazy import Catalogue, exports, load
from rankNAS.objectives import DIRECTIONS, OBJECTIVES
from rankNAS.search_spaces.zoo import CATALOGUE, SPACES, family
from rankNAS.strategies import STRATEGIES
from rankNAS.tasks import METRICS

PACKAGES = (hw_models, objectives, search_spaces, strategies)


@pytest.mark.parametrize("package", [hw_models, objectives, strategies])
def test_a_line_is_the_first_of_the_docstring(package: Any) -> None:
    for name, (home, line) in package.CATALOGUE.items():
        if name not in METRICS and name not in LAYER_COSTS:  # classes of several names
            assert line == load(home).__doc__.strip().splitlines()[0], name


def test_the_catalogue_of_spaces() -> None:
    for name, entry in SPACES.items():
        assert (entry.name, entry.description, entry.family) == (
            name,
            CATALOGUE[name][1],
            family(name),
        )


def test_directions_are_those_of_the_objectives() -> None:
    assert {name: o.direction for name, o in OBJECTIVES.items()} == DIRECTIONS
    assert all(o.name == name for name, o in OBJECTIVES.items())


@pytest.mark.parametrize("mapping", [HW_MODELS, OBJECTIVES, SPACES, STRATEGIES])
def test_values_are_the_same_each_time(mapping: Mapping[str, Any]) -> None:
    assert all(mapping[name] is mapping[name] for name in mapping)
    assert len(mapping) == len(list(mapping)) and "nothing" not in mapping
    with pytest.raises(KeyError):
        _ = mapping["nothing"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_exported_name_exists(package: Any) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing
    with pytest.raises(ImportError):
        importlib.import_module(f"{package.__name__}.nothing")


def test_a_catalogue_and_exports() -> None:
    found = Catalogue({"a": ("rankNAS.exceptions:UsageError", "An error.")}, lambda n, c: (n, c))
    assert dict(found) == {"a": ("a", UsageError)}
    assert exports("here", {"UsageError": "rankNAS.exceptions"})("UsageError") is UsageError


def imported(code: str, *names: str) -> set[str]:
    """Which modules a new interpreter has imported after running some code."""
    script = f"import sys; {code}; print(*({{*sys.modules}} & {{*{names}}}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_listings_import_no_torch() -> None:
    code = "from rankNAS.cli import app\n"
    for command in ("strategies", "spaces", "objectives", "hardware"):
        code += f"app([{command!r}], standalone_mode=False)\n"
    code = f"exec({code!r})"
    assert imported(code, "torch", "optuna", "scipy", "pandas") == set()


def test_the_engine_imports_no_torchvision() -> None:
    names = ("torchvision", "botorch", "gpytorch", "ray", "matplotlib", "torch._dynamo")
    assert imported("import rankNAS.engine", "torch", *names) == {"torch"}


def test_the_package_does_not_look_for_its_version() -> None:
    assert imported("import rankNAS", "importlib.metadata") == set()
    assert imported("import rankNAS; rankNAS.__version__", "importlib.metadata") != set()
