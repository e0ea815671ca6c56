"""Strategies: how allocations are proposed. `STRATEGIES` is the complete list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.lazy import Catalogue, exports
from rankNAS.plugins import is_plugin, load_callable

if TYPE_CHECKING:
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
    "CATALOGUE",
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

#: By name: the class, and the first line of its docstring. Nothing is imported to list them.
CATALOGUE: dict[str, tuple[str, str]] = {
    "auto": (
        "rankNAS.strategies.sensitivity.auto:Auto",
        "Second-order losses, the exact solver, screened candidates; the best few are refitted.",
    ),
    "solve": (
        "rankNAS.strategies.one_shot.solve:Solve",
        "The allocation of the least total, or worst, loss or error of the layers.",
    ),
    "energy": (
        "rankNAS.strategies.one_shot.energy:Energy",
        "The least possible worst relative error over the layers, solved exactly.",
    ),
    "uniform": (
        "rankNAS.strategies.one_shot.uniform:Uniform",
        "The same fraction of every layer: the baseline of the literature.",
    ),
    "alds": (
        "rankNAS.strategies.one_shot.alds:Alds",
        "The ranks and numbers of channel groups of the least worst spectral error, exactly.",
    ),
    "lc": (
        "rankNAS.strategies.one_shot.lc:LearningCompression",
        "Per layer the minimum of lambda x cost + energy, with the least lambda within the "
        "budgets.",
    ),
    "pca-greedy": (
        "rankNAS.strategies.one_shot.pca_greedy:PcaGreedy",
        "From full rank, remove the component of the least score until the budgets are met.",
    ),
    "drone": (
        "rankNAS.strategies.sensitivity.drone:Drone",
        "The smallest ranks front to back within a total loss allowance, shared by time.",
    ),
    "strs": (
        "rankNAS.strategies.sensitivity.strs:Strs",
        "Sensitivity-based truncation rank searching, of ASVD.",
    ),
    "hw-filter": (
        "rankNAS.strategies.one_shot.hw_filter:HardwareFilter",
        "The min-max allocation over the choices that are faster than the dense layer.",
    ),
    "beam": (
        "rankNAS.strategies.sampling.beam:Beam",
        "Beam search from the dense network down to the budget.",
    ),
    "bo": (
        "rankNAS.strategies.bayesian.bo:BayesianOptimisation",
        "Gaussian process on the summed losses, log expected improvement, on the budget.",
    ),
    "bolaco": (
        "rankNAS.strategies.bayesian.bolaco:Bolaco",
        "Expected improvement over keep-ratios that layers of one kind share; one objective.",
    ),
    "tpe": (
        "rankNAS.strategies.sampling.tpe:Tpe",
        "The tree-structured Parzen estimator, multivariate.",
    ),
    "nsga2": (
        "rankNAS.strategies.sampling.nsga2:Nsga2",
        "NSGA-II: the evolutionary baseline, for one objective or several.",
    ),
    "haloc": (
        "rankNAS.strategies.supernet.haloc:Haloc",
        "Differentiable search of equal Tucker-2 ranks on a super-net; a reconstruction.",
    ),
    "random": (
        "rankNAS.strategies.sampling.random:Random",
        "Every layer keeps a random share of its cost, all scaled together onto the budget.",
    ),
}
#: By name, the class, imported on first use.
STRATEGIES: Mapping[str, type[Strategy]] = Catalogue(CATALOGUE)

_BASE = ("History", "Problem", "Request", "Strategy", "Trial")
__getattr__ = exports(
    __name__,
    {home.partition(":")[2]: home.partition(":")[0] for home, _ in CATALOGUE.values()}
    | dict.fromkeys(_BASE, "rankNAS.strategies.base")
    | {"OneShot": "rankNAS.strategies.one_shot.base"},
)


def make_strategy(given: str | Strategy) -> Strategy:
    """A strategy from its name, an entry point of ``rankNAS.strategies``, a file, or itself.

    Raises:
        UnknownNameError: No such strategy.
        UsageError: What the name stands for is not a strategy.
    """
    from rankNAS.strategies.base import Strategy

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
