"""Strategies: how allocations are proposed. `STRATEGIES` is the complete list."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.plugins import is_plugin, load_callable
from rankNAS.strategies.base import Request, Strategy
from rankNAS.strategies.bayesian.bo import BayesianOptimisation
from rankNAS.strategies.bayesian.bolaco import Bolaco
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.one_shot.alds import Alds
from rankNAS.strategies.one_shot.base import OneShot
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.one_shot.hw_filter import HardwareFilter
from rankNAS.strategies.one_shot.lc import LearningCompression
from rankNAS.strategies.one_shot.pca_greedy import PcaGreedy
from rankNAS.strategies.one_shot.solve import Solve
from rankNAS.strategies.one_shot.uniform import Uniform
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sampling.beam import Beam
from rankNAS.strategies.sampling.nsga2 import Nsga2
from rankNAS.strategies.sampling.random import Random
from rankNAS.strategies.sampling.tpe import Tpe
from rankNAS.strategies.sensitivity.auto import Auto
from rankNAS.strategies.sensitivity.drone import Drone
from rankNAS.strategies.sensitivity.strs import Strs
from rankNAS.strategies.supernet.haloc import Haloc

__all__ = [
    "STRATEGIES",
    "Alds",
    "Auto",
    "BayesianOptimisation",
    "Beam",
    "Bolaco",
    "Drone",
    "Energy",
    "Haloc",
    "HardwareFilter",
    "History",
    "LearningCompression",
    "Nsga2",
    "OneShot",
    "PcaGreedy",
    "Problem",
    "Random",
    "Request",
    "Solve",
    "Strategy",
    "Strs",
    "Tpe",
    "Trial",
    "Uniform",
    "make_strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {
    "auto": Auto,
    "solve": Solve,
    "energy": Energy,
    "uniform": Uniform,
    "alds": Alds,
    "lc": LearningCompression,
    "pca-greedy": PcaGreedy,
    "drone": Drone,
    "strs": Strs,
    "hw-filter": HardwareFilter,
    "beam": Beam,
    "bo": BayesianOptimisation,
    "bolaco": Bolaco,
    "tpe": Tpe,
    "nsga2": Nsga2,
    "haloc": Haloc,
    "random": Random,
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
