"""``ranknas spaces | strategies | tasks | objectives | hardware``: lists from the catalogues."""

from __future__ import annotations

from collections.abc import Sequence

from rankNAS.cli.options.common import JsonOptions
from rankNAS.cli.output import print_json, print_table
from rankNAS.hw_models import CATALOGUE as HARDWARE
from rankNAS.hw_models.devices import device_names, read_device
from rankNAS.objectives import CATALOGUE as OBJECTIVES
from rankNAS.objectives import DIRECTIONS
from rankNAS.search_spaces.zoo import CATALOGUE as SPACES
from rankNAS.search_spaces.zoo import family
from rankNAS.strategies import CATALOGUE as STRATEGIES
from rankNAS.tasks import TASKS

__all__ = [
    "run_hardware",
    "run_objectives",
    "run_spaces",
    "run_strategies",
    "run_tasks",
]


def run_spaces(options: JsonOptions) -> None:
    """List the built-in spaces and the general forms."""
    rows: list[tuple[str, str, str]] = [
        (name, family(name), description) for name, (_, description) in SPACES.items()
    ]
    rows += [
        ("torchvision:NAME", "torchvision", "any torchvision model"),
        ("timm:NAME", "timm", "any timm model (extra `hf`)"),
        ("hf:FOLDER", "transformers", "a folder for transformers, with weights (extra `hf`)"),
        ("path/to/file.py:factory", "yours", "a function that returns a module"),
    ]
    _print("Search spaces", ("name", "family", "description"), rows, options)


def run_strategies(options: JsonOptions) -> None:
    """List the strategies."""
    rows = [(name, description) for name, (_, description) in STRATEGIES.items()]
    _print("Strategies", ("name", "description"), rows, options)


def run_tasks(options: JsonOptions) -> None:
    """List the tasks."""
    rows = [(name, description) for name, (_, description) in TASKS.items()]
    rows.append(("path/to/file.py:function", "a function that returns a rankNAS.tasks.Task"))
    _print("Tasks", ("name", "description"), rows, options)


def run_objectives(options: JsonOptions) -> None:
    """List the objectives."""
    rows: list[tuple[str, str, str]] = [
        (name, DIRECTIONS[name], description) for name, (_, description) in OBJECTIVES.items()
    ]
    rows.append(("path/to/file.py:function", "=maximize", "a function of network and data"))
    _print("Objectives", ("name", "direction", "description"), rows, options)


def run_hardware(options: JsonOptions) -> None:
    """List the hardware models and the devices."""
    rows: list[tuple[str, str, str]] = [
        (name, "measured" if name == "host" else "analytical", description)
        for name, (_, description) in HARDWARE.items()
    ]
    for name in device_names():
        _, content = read_device(name)
        rows.append((name, "roofline", f"{content['name']}: {', '.join(content['peak'])}"))
    rows += [
        ("path/to/device.toml", "yours", "figures of a device, with its kind of model"),
        ("path/to/table.csv", "yours", "layer, choice, seconds"),
        ("path/to/file.py:function", "yours", "a function of layer and choice that gives seconds"),
    ]
    _print("Hardware models", ("name", "kind", "description"), rows, options)


def _print(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], options: JsonOptions
) -> None:
    if options.json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(title, columns, rows, left=len(columns))
