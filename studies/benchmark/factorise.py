"""CPU seconds of the factorisation of whole networks, statistics given, on one thread.

    python studies/benchmark/factorise.py [--spaces NAME …] [--norm NORM] [--all]

The weights are random with decaying spectra along inputs, outputs and positions, as those of
trained networks are; the statistics are those of correlated, rectified inputs. As in a search for
a budget of multiply-accumulates, a layer keeps the choices that no other choice dominates; with
``--all`` it keeps all of them. ``--save FILE`` writes the errors of all choices that are kept, and
``--against FILE`` compares with them, for example those of another version.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rankNAS.allocation import Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.decompositions import OPERATORS, NormName, Statistics
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model
from rankNAS.solver.pareto import pareto_filter, pareto_screen

SPACES = {"resnet20": 32, "vgg16_cifar": 32, "resnet50": 224}  # sides of the images
CHOICES = 64  # kept by a layer, as in the default settings
SAMPLES = 2  # inputs per column of a layer


def measure(name: str, norm: NormName, everything: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of a space by operator, and the errors by layer and choice."""
    torch.manual_seed(0)
    side = SPACES.get(name, 224)
    model = build_model(name, num_classes=10, input_shape=(3, side, side)).eval()
    space = compile_space(model, torch.zeros(1, 3, side, side))
    statistics = made_up(model, space)
    with by_operator() as seconds:
        started = time.process_time()
        kept: dict[str, Any] = {} if everything else {"select": front, "screen": screen}
        found = factorise(model, space, statistics, norm=norm, **kept)
        total = time.process_time() - started
    errors = {
        layer: {str(c): x.error(c) for c in x.layer.choices} for layer, x in found.layers.items()
    }
    return {"layers": len(space.layers), "seconds": total, **seconds}, errors


def front(layer: Layer, errors: Sequence[float]) -> list[Choice]:
    """The choices that none dominates in error and multiply-accumulates."""
    kept = pareto_filter(errors, [[cost.macs for cost in layer.costs]], CHOICES)
    return [layer.choices[i] for i in kept]


def screen(layer: Layer, errors: Sequence[float], estimates: Sequence[float]) -> list[Choice]:
    """The choices that may be on the front."""
    kept = pareto_screen(errors, estimates, [[cost.macs for cost in layer.costs]])
    return [layer.choices[i] for i in kept]


def made_up(model: torch.nn.Module, space: SearchSpace) -> dict[str, Statistics]:
    """Statistics by layer; the weights get decaying spectra, in place."""
    by_shape: dict[tuple[int, ...], Statistics] = {}
    result = {}
    for name, layer in space.layers.items():
        weight: Any = model.get_submodule(name).weight
        with torch.no_grad():
            for axis in range(min(2, weight.dim())):
                weight.copy_(along(weight, axis, mixing(weight.shape[axis])))
        shape = layer.shape
        key = (shape.inputs, shape.outputs, shape.groups, *shape.kernel)
        if key not in by_shape:
            by_shape[key] = statistics_of(shape)
        result[name] = by_shape[key]
    return result


def statistics_of(shape: LayerShape) -> Statistics:
    """The moments of correlated, rectified inputs and of correlated gradients."""
    channels, positions = shape.inputs // shape.groups, shape.width * shape.groups // shape.inputs
    x = torch.randn(shape.groups, SAMPLES * shape.width, channels, positions)
    near = torch.arange(positions, dtype=torch.float32)
    smooth = torch.linalg.cholesky(0.6 ** (near[:, None] - near).abs())
    x = (along(x, 2, mixing(channels)) @ smooth.T).relu().flatten(2)
    outputs = shape.outputs // shape.groups
    gradient = along(torch.randn(shape.groups, 2 * outputs, outputs), 2, mixing(outputs))
    return Statistics(moment(x), x.double().mean(1), moment(gradient))


def moment(x: Tensor) -> Tensor:
    return (x.mT @ x / x.shape[1]).double()


def mixing(size: int) -> Tensor:
    """A matrix whose singular values decay as a power of their number."""
    scale = torch.arange(1, size + 1, dtype=torch.float32) ** -0.5
    return torch.randn(size, size) / size**0.5 * scale


def along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """The product of a matrix and one axis of a tensor."""
    return torch.tensordot(x, matrix, dims=([axis], [1])).movedim(-1, axis)


@contextmanager
def by_operator() -> Iterator[dict[str, float]]:
    """Within, the CPU seconds of each operator are added up."""
    seconds = dict.fromkeys(OPERATORS, 0.0)

    def timed(name: str, inner: Any) -> Any:
        def factorise_(self: Any, *args: Any, **options: Any) -> Any:
            started = time.process_time()
            found = inner(self, *args, **options)
            seconds[name] += time.process_time() - started
            return found

        return factorise_

    with ExitStack() as stack:
        for name, operator in OPERATORS.items():
            inner = type(operator).factorise
            stack.enter_context(mock.patch.object(type(operator), "factorise", timed(name, inner)))
        yield seconds


def compare(errors: dict[str, Any], others: dict[str, Any]) -> str:
    """The largest difference of the errors of the same choices, in words."""
    worst, where, shared = 0.0, "", 0
    for layer, found in errors.items():
        for choice in found.keys() & others[layer].keys():
            shared += 1
            difference = found[choice] - others[layer][choice]
            if abs(difference) > abs(worst):
                worst, where = difference, f" ({layer}, {choice})"
    return f"errors of {shared} choices differ by {worst:+.1e} at most{where}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spaces", nargs="+", default=list(SPACES))
    parser.add_argument("--norm", default="fisher")
    parser.add_argument("--all", action="store_true", help="keep all choices")
    parser.add_argument("--save", type=Path, help="write the errors as JSON")
    parser.add_argument("--against", type=Path, help="errors to compare with")
    given = parser.parse_args()
    torch.set_num_threads(1)
    saved = {}
    columns = ("layers", "seconds", *OPERATORS)
    print("| space | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for space_name in given.spaces:
        row, saved[space_name] = measure(space_name, given.norm, given.all)
        cells = [f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        print(f"| {space_name} | " + " | ".join(cells) + " |", flush=True)
        if given.against:
            others = json.loads(given.against.read_text())[space_name]
            print(compare(saved[space_name], others), flush=True)
    if given.save:
        given.save.write_text(json.dumps(saved))
