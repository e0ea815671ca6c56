"""Choices that strategies need for their own search, whatever the error of the study says.

A space offers a grid of ranks, and dominated choices of it are dropped. A strategy that searches
in another error, or among ranks of its own, names its candidates (`Strategy.candidates`): these
are offered, and stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.decompositions import OPERATORS
from rankNAS.decompositions.layer_view import LayerView
from rankNAS.decompositions.shapes import Cost
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.policies import RankPolicy, candidate_choices
from rankNAS.solver.pareto import pareto_filter
from rankNAS.strategies.base import Strategy

__all__ = ["needed_choices", "with_choices"]


def needed_choices(
    strategies: Sequence[Strategy],
    model: nn.Module,
    space: SearchSpace,
    policy: RankPolicy,
    costs: Sequence[str],
    most: int,
) -> dict[str, dict[Choice, Cost]]:
    """By layer, the choices that strategies need, with their costs.

    Of a strategy's candidates, those that its own error and the costs do not dominate. Layers that
    a user has restricted offer no more than they did.

    Args:
        strategies: The strategies.
        model: The compiled model.
        space: Its space.
        policy: The policy that the space was made with.
        costs: Names of the costs that matter, of `Cost`.
        most: The largest number of choices for each strategy and layer.
    """
    found: dict[str, dict[Choice, Cost]] = {name: {} for name in space.layers}
    for strategy in strategies:
        if type(strategy).candidates is Strategy.candidates:
            continue
        for name, layer in space.layers.items():
            weight = layer.shape.fold(LayerView(model.get_submodule(name), [""]).weight)
            candidates = strategy.candidates(layer, weight)
            found[name] |= _kept(layer, candidates, policy, costs, most)
    return found


def with_choices(space: SearchSpace, needed: Mapping[str, Mapping[Choice, Cost]]) -> SearchSpace:
    """The space with further choices, each layer's in the order of their MACs."""
    layers = {name: _with(layer, needed.get(name, {})) for name, layer in space.layers.items()}
    return replace(space, layers=layers)


def _kept(
    layer: Layer,
    candidates: Mapping[Choice, float],
    policy: RankPolicy,
    costs: Sequence[str],
    most: int,
) -> dict[Choice, Cost]:
    as_compiled = layer.choices == candidate_choices(layer.shape, policy)[0]
    dense = layer[DENSE]
    priced: dict[Choice, Cost] = {}
    for choice in candidates:
        if choice in layer:
            priced[choice] = layer[choice]
        elif as_compiled and not any(r % policy.multiple_of for r in _ranks(choice)):
            cost = OPERATORS[choice.operator].cost(layer.shape, choice.rank)
            if cost.macs < dense.macs and cost.params < dense.params:
                priced[choice] = cost
    choices = list(priced)
    columns = [[priced[c][name] for c in choices] for name in costs or ("macs",)]
    if not choices:
        return {}
    rows = pareto_filter([candidates[c] for c in choices], columns, most)
    return {choices[i]: priced[choices[i]] for i in rows}


def _ranks(choice: Choice) -> Collection[int]:
    """The ranks of a choice, without a number of groups."""
    return choice.rank[1:] if choice.operator == "group_svd" else choice.rank


def _with(layer: Layer, more: Mapping[Choice, Cost]) -> Layer:
    table = {choice: layer[choice] for choice in layer.choices[1:]}
    if not set(more) - set(table):
        return layer
    ordered = sorted((table | dict(more)).items(), key=lambda item: (-item[1].macs, item[0]))
    choices = (DENSE, *(choice for choice, _ in ordered))
    return replace(layer, choices=choices, costs=(layer[DENSE], *(cost for _, cost in ordered)))
