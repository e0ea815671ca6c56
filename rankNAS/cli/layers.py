"""The chosen ranks of a solution, with the break-even and full ranks of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankNAS.allocation import DENSE, Choice
from rankNAS.decompositions import OPERATORS
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.search_spaces.base import Layer
from rankNAS.search_spaces.policies import rank_limits
from rankNAS.strategies.problem import Problem

__all__ = ["describe_layers"]


def describe_layers(
    problem: Problem, layers: Mapping[str, Layer], allocation: Mapping[str, Choice]
) -> dict[str, dict[str, Any]]:
    """The choice of each layer, as JSON values.

    Args:
        problem: The problem; its tables contain the predicted latency, if available.
        layers: The layers of the searched space.
        allocation: The chosen allocation.

    Returns:
        By name of the layer: ``macs`` of the dense layer and ``best_macs`` of the choice, the
        layer's ``shape`` in words, its ``roles`` in a transformer, the chosen ``operator`` and
        ``rank``, the ``break_even_rank`` and the ``full_rank`` (see `rank_limits`; None for a
        dense layer), and ``full_macs``, the MACs at full rank. If latency was predicted, also
        ``predicted_latency`` and ``best_predicted_latency``, in seconds.
    """
    seconds = problem.costs.get("latency")
    indices = problem.indices(allocation)
    found: dict[str, dict[str, Any]] = {}
    for i, (name, layer) in enumerate(layers.items()):
        choice = allocation[name]
        found[name] = {
            "macs": layer.costs[0].macs,
            "best_macs": layer[choice].macs,
            "shape": _words(layer.shape),
            "roles": list(layer.roles),
            "operator": choice.operator,
            "rank": list(choice.rank),
            **_limits(layer.shape, choice),
        }
        if seconds is not None:
            found[name]["predicted_latency"] = float(seconds[i][0])
            found[name]["best_predicted_latency"] = float(seconds[i][indices[i]])
    return found


def _limits(shape: LayerShape, choice: Choice) -> dict[str, Any]:
    if choice == DENSE:
        return {"break_even_rank": None, "full_rank": None, "full_macs": None}
    break_even, full = rank_limits(shape, choice)
    return {
        "break_even_rank": None if break_even is None else list(break_even),
        "full_rank": list(full),
        "full_macs": OPERATORS[choice.operator].cost(shape, full).macs,
    }


def _words(shape: LayerShape) -> str:
    """A shape in words: ``64 to 128, 3 x 3``."""
    text = f"{shape.inputs} to {shape.outputs}"
    text += f", {' x '.join(map(str, shape.kernel))}" if shape.kernel else ""
    return text + (f", {shape.groups} groups" if shape.groups > 1 else "")
