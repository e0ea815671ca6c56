"""``ranknas compile``: the search space of a model, printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import typer

from rankNAS.cli.loading import image_side, rank_policy
from rankNAS.cli.options.profile import CompileOptions
from rankNAS.cli.output import number, print_json, print_table
from rankNAS.decompositions.shapes import COSTS, Cost
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import Layer, SearchSpace, Skipped
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model
from rankNAS.search_spaces.zoo.folders import FolderSpec
from rankNAS.search_spaces.zoo.huggingface import (
    PREFIX,
    empty_model,
    example_inputs,
    huggingface_model,
    is_huggingface,
    model_class,
    read_config,
)

__all__ = ["run_compile"]


def run_compile(options: CompileOptions) -> None:
    """Compile a space on the meta device and print it."""
    policy = rank_policy(options)
    given: dict[str, Any] = {"policy": policy, "exclude": options.exclude}
    if is_huggingface(options.space):
        compiled = compiled_folder(options.space, options.image_size, **given)
    else:
        size = image_side(options.space, options.image_size)
        shape = (3, size, size)
        with torch.device("meta"):
            model = build_model(options.space, num_classes=options.num_classes, input_shape=shape)
            example = torch.zeros(1, *shape)
        compiled = compile_space(model, example, **given)
    if options.json:
        print_json(_document(options.space, compiled))
    else:
        _print_space(options.space, compiled)


def compiled_folder(spec: str, image_size: int | None, **given: Any) -> SearchSpace:
    """The space of ``hf:FOLDER`` for inputs that its configuration describes.

    Args:
        spec: The name of the space.
        image_size: As for `example_inputs`.
        given: Further arguments of `compile_space`.
    """
    folder = spec.removeprefix(PREFIX)
    config = read_config(folder)
    empty = empty_model(config, model_class(config, FolderSpec.parse(folder)))
    try:
        return compile_space(empty, example_inputs(empty, image_size), **given)
    except UsageError:  # experts, for example, do not run on the meta device
        model = huggingface_model(folder)
        return compile_space(model, example_inputs(model, image_size), **given)


def _print_space(name: str, space: SearchSpace) -> None:
    shares, roles = space.shares, any(layer.roles for layer in space.layers.values())
    rows: list[tuple[str, ...]] = []
    for layer in space.layers.values():
        dense, least = layer.costs[0], min(cost.macs for cost in layer.costs)
        rows.append(
            (
                layer.name,
                *([" ".join(layer.roles)] if roles else []),
                _shape(layer),
                *_amounts(dense, shares[layer.name]),
                f"{100 * least / dense.macs:.1f} %",
                ", ".join(f"{k} {v}" for k, v in _counts(layer).items()),
            )
        )
    rows += [(name, *([""] if roles else []), *cells) for name, *cells in _skipped_rows(space)]
    columns = (
        *("layer", *(["role"] if roles else []), "shape", "MACs", "%", "params", "%"),
        *("least MACs", "choices, or why dense"),
    )
    print_table(
        f"{name} at {'x'.join(map(str, space.input_shape))}", columns, rows, left=3 if roles else 2
    )
    total, layers = space.dense_cost, space.costs(space.dense)
    least = space.remainder_cost.macs + sum(
        min(c.macs for c in x.costs) for x in space.layers.values()
    )
    typer.echo(
        f"{len(space.layers)} layers to decompose, {len(space.skipped)} other modules; "
        f"{number(total.macs)} MACs, {number(total.params)} params, of which the layers have "
        f"{_with_share(layers['layer_macs'], total.macs)} and "
        f"{_with_share(layers['layer_params'], total.params)}; "
        f"smallest budget: macs={least / total.macs:.4f}"
    )


def _skipped_rows(space: SearchSpace) -> list[tuple[str, ...]]:
    """One row for each skipped layer, and one for all modules without MACs and of one reason."""
    groups: dict[tuple[str, str], list[Skipped]] = {}
    for skipped in space.skipped:
        key = ("" if skipped.cost.macs == 0 else skipped.name), skipped.reason
        groups.setdefault(key, []).append(skipped)
    rows = []
    for (_, reason), members in groups.items():
        cost = sum((skipped.cost for skipped in members), Cost(0, 0, 0))
        whole = space.dense_cost
        share = {of: cost[of] / whole[of] if whole[of] else 0.0 for of in COSTS}
        name = members[0].name if len(members) == 1 else f"({len(members)} modules)"
        rows.append((name, "dense", *_amounts(cost, share), "", reason))
    return rows


def _amounts(cost: Cost, share: Mapping[str, float]) -> Iterator[str]:
    """MACs and parameters, each with its percentage of the model."""
    for of in ("macs", "params"):
        yield number(cost[of])
        yield f"{100 * share[of]:.1f}"


def _with_share(part: int, whole: int) -> str:
    return f"{number(part)} ({100 * part / whole:.1f} %)" if whole else number(part)


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
        **space.costs(space.dense),
        "layers": {
            layer.name: {
                str(choice): {"macs": cost.macs, "params": cost.params}
                for choice, cost in layer.items()
            }
            for layer in space.layers.values()
        },
        "roles": {layer.name: layer.roles for layer in space.layers.values() if layer.roles},
        "dense": {s.name: s.reason for s in space.skipped},
        "shares": space.shares,
    }
