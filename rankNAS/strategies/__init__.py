"""Strategies: how allocations are proposed. `STRATEGIES` is the complete list."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.plugins import is_plugin, load_callable
from rankNAS.strategies.base import History, Problem, Strategy, Trial
from rankNAS.strategies.bo import BayesianOptimisation
from rankNAS.strategies.oneshot import Energy, Uniform
from rankNAS.strategies.random import Random

__all__ = [
    "STRATEGIES",
    "BayesianOptimisation",
    "Energy",
    "History",
    "Problem",
    "Random",
    "Strategy",
    "Trial",
    "Uniform",
    "make_strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {
    "uniform": Uniform,
    "energy": Energy,
    "random": Random,
    "bo": BayesianOptimisation,
}


def make_strategy(given: str | Strategy) -> Strategy:
    """A strategy from its name, an entry point of ``rankNAS.strategies``, a file, or itself.

    Raises:
        UnknownNameError: No such strategy.
        UsageError: What the name stands for is not a strategy.
    """
    if isinstance(given, Strategy):
        return given
    if not isinstance(given, str):
        raise UsageError(f"a strategy must be a name or a Strategy, got {type(given).__name__}.")
    found = _named(given)()
    if not isinstance(found, Strategy):
        raise UsageError(f"strategy {given!r} made a {type(found).__name__}, not a Strategy.")
    return found


def _named(name: str) -> Callable[[], object]:
    if name in STRATEGIES:
        return STRATEGIES[name]
    if is_plugin(name):
        return load_callable(name, "strategy")
    third_party = {point.name: point for point in entry_points(group="rankNAS.strategies")}
    if name in third_party:
        loaded: Callable[[], object] = third_party[name].load()
        return loaded
    raise UnknownNameError("strategy", name, [*STRATEGIES, *third_party], "Or file.py:factory.")
