"""``ranknas compile | spaces | strategies | objectives | hardware``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import typer

from rankNAS.cli.loading import rank_policy
from rankNAS.cli.output import number, print_json, print_table
from rankNAS.exceptions import UsageError
from rankNAS.hw_models.devices import device_names, read_device
from rankNAS.objectives import OBJECTIVES
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import SPACES, build_model
from rankNAS.strategies import STRATEGIES

__all__ = [
    "run_compile",
    "run_hardware",
    "run_objectives",
    "run_spaces",
    "run_strategies",
    "side_of",
]


def run_spaces(as_json: bool) -> None:
    """List the built-in spaces and the general forms."""
    rows: list[tuple[str, str, str]] = [
        (entry.name, entry.family, entry.description) for entry in SPACES.values()
    ]
    rows += [
        ("torchvision:NAME", "torchvision", "any torchvision model"),
        ("timm:NAME", "timm", "any timm model (extra `hf`)"),
        ("path/to/file.py:factory", "yours", "a function that returns a module"),
    ]
    _print("Search spaces", ("name", "family", "description"), rows, as_json)


def run_strategies(as_json: bool) -> None:
    """List the strategies."""
    rows = [(name, _summary(strategy)) for name, strategy in STRATEGIES.items()]
    _print("Strategies", ("name", "description"), rows, as_json)


def run_objectives(as_json: bool) -> None:
    """List the objectives."""
    rows: list[tuple[str, str, str]] = [
        (name, o.direction, _summary(type(o))) for name, o in OBJECTIVES.items()
    ]
    rows.append(("path/to/file.py:function", "=maximize", "a function of network and data"))
    _print("Objectives", ("name", "direction", "description"), rows, as_json)


def run_hardware(as_json: bool) -> None:
    """List the hardware models and the devices."""
    rows: list[tuple[str, str, str]] = [
        ("host", "measured", "this machine"),
        ("systolic", "analytical", "a systolic array; its figures in a .toml of that kind"),
        ("imc", "analytical", "in-memory-computing arrays; likewise"),
    ]
    for name in device_names():
        _, content = read_device(name)
        rows.append((name, "roofline", f"{content['name']}: {', '.join(content['peak'])}"))
    rows += [
        ("path/to/device.toml", "yours", "figures of a device, with its kind of model"),
        ("path/to/table.csv", "yours", "layer, choice, seconds"),
        ("path/to/file.py:function", "yours", "a function of layer and choice that gives seconds"),
    ]
    _print("Hardware models", ("name", "kind", "description"), rows, as_json)


def run_compile(
    space: str,
    num_classes: int,
    image_size: int | None,
    operators: str | None,
    candidates: int,
    multiple_of: int,
    exclude: Sequence[str],
    as_json: bool,
) -> None:
    """Compile a space on the meta device and print it."""
    policy = rank_policy(operators, candidates, multiple_of)
    size = side_of(space, image_size)
    with torch.device("meta"):
        model = build_model(space, num_classes=num_classes, input_shape=(3, size, size))
        example = torch.zeros(1, 3, size, size)
    compiled = compile_space(model, example, policy=policy, exclude=exclude)
    if as_json:
        print_json(_document(space, compiled))
    else:
        _print_space(space, compiled)


def side_of(space: str, image_size: int | None) -> int:
    """Pixels along a side of the images of a space.

    Raises:
        UsageError: The given size is below 1.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"`--image-size` must be at least 1, got {image_size}.")
    small = space in SPACES and SPACES[space].family == "cifar"
    return image_size or (32 if small else 224)


def _print_space(name: str, space: SearchSpace) -> None:
    rows: list[tuple[str, ...]] = []
    for layer in space.layers.values():
        dense, least = layer.costs[0], min(cost.macs for cost in layer.costs)
        rows.append(
            (
                layer.name,
                _shape(layer),
                number(dense.macs),
                number(dense.params),
                f"{100 * least / dense.macs:.1f} %",
                ", ".join(f"{k} {v}" for k, v in _counts(layer).items()),
            )
        )
    for skipped in space.skipped:
        cost = skipped.cost
        rows.append(
            (skipped.name, "dense", number(cost.macs), number(cost.params), "", skipped.reason)
        )
    columns = ("layer", "shape", "MACs", "params", "least MACs", "choices, or why dense")
    print_table(f"{name} at {'x'.join(map(str, space.input_shape))}", columns, rows, left=2)
    total = space.dense_cost
    least = space.remainder_cost.macs + sum(
        min(c.macs for c in x.costs) for x in space.layers.values()
    )
    typer.echo(
        f"{len(space.layers)} layers to decompose, {len(space.skipped)} left dense; "
        f"{number(total.macs)} MACs, {number(total.params)} params; "
        f"smallest budget: macs={least / total.macs:.4f}"
    )


def _shape(layer: Layer) -> str:
    shape = layer.shape
    kernel = "x".join(map(str, shape.kernel))
    text = f"{shape.inputs}->{shape.outputs}" + (f" {kernel}" if kernel else "")
    if shape.stride and max(shape.stride) > 1:
        text += f" /{shape.stride[0]}"
    text += f" g{shape.groups}" if shape.groups > 1 else ""
    return text + (f" ({len(shape.calls)} calls)" if len(shape.calls) > 1 else "")


def _counts(layer: Layer) -> Counter[str]:
    return Counter(choice.operator for choice in layer.choices)


def _document(name: str, space: SearchSpace) -> dict[str, Any]:
    return {
        "space": name,
        "input_shape": list(space.input_shape),
        "macs": space.dense_cost.macs,
        "params": space.dense_cost.params,
        "layers": {
            layer.name: {
                str(choice): {"macs": cost.macs, "params": cost.params}
                for choice, cost in layer.items()
            }
            for layer in space.layers.values()
        },
        "dense": {s.name: s.reason for s in space.skipped},
    }


def _print(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], as_json: bool
) -> None:
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(title, columns, rows, left=len(columns))


def _summary(described: type) -> str:
    return (described.__doc__ or "").strip().splitlines()[0]
