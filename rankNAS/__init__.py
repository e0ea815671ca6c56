"""RankNAS: neural architecture search over the ranks of low-rank compressed networks.

The public names are loaded when first used, so that ``import rankNAS`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankNAS.allocation import DENSE, Allocation, Choice
    from rankNAS.comparison import compare
    from rankNAS.compressor import compress, compress_, save
    from rankNAS.data.base import Data
    from rankNAS.data.loading import load_data
    from rankNAS.decompositions import Operator
    from rankNAS.engine import search
    from rankNAS.exceptions import RankNASError, UsageError
    from rankNAS.hw_models import CallableModel, HardwareModel
    from rankNAS.models.artifact import load
    from rankNAS.models.weights import load_weights
    from rankNAS.objectives import Objective
    from rankNAS.recovery.recover import recover
    from rankNAS.search_spaces import RankPolicy, SearchSpace, compile_space
    from rankNAS.settings import Settings
    from rankNAS.strategies import Strategy, Trial
    from rankNAS.study import Study
    from rankNAS.tasks.base import Task
    from rankNAS.tasks.custom import Custom
    from rankNAS.tasks.infer import infer_task

    __version__: str

_HOMES = {
    "DENSE": "allocation",
    "Allocation": "allocation",
    "CallableModel": "hw_models",
    "Choice": "allocation",
    "Data": "data",
    "HardwareModel": "hw_models",
    "Custom": "tasks.custom",
    "Objective": "objectives",
    "Operator": "decompositions",
    "RankNASError": "exceptions",
    "RankPolicy": "search_spaces",
    "SearchSpace": "search_spaces",
    "Settings": "settings",
    "Strategy": "strategies",
    "Study": "study",
    "Task": "tasks.base",
    "Trial": "strategies",
    "UsageError": "exceptions",
    "compare": "comparison",
    "compile_space": "search_spaces",
    "compress": "compressor",
    "compress_": "compressor",
    "infer_task": "tasks.infer",
    "load": "models.artifact",
    "load_data": "data.loading",
    "load_weights": "models.weights",
    "recover": "recovery.recover",
    "save": "compressor",
    "search": "engine",
}

__all__ = [
    "DENSE",
    "Allocation",
    "CallableModel",
    "Choice",
    "Custom",
    "Data",
    "HardwareModel",
    "Objective",
    "Operator",
    "RankNASError",
    "RankPolicy",
    "SearchSpace",
    "Settings",
    "Strategy",
    "Study",
    "Task",
    "Trial",
    "UsageError",
    "compare",
    "compile_space",
    "compress",
    "compress_",
    "infer_task",
    "load",
    "load_data",
    "load_weights",
    "recover",
    "save",
    "search",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'rankNAS' has no attribute {name!r}")
    return getattr(import_module(f"rankNAS.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ranknas")
    except PackageNotFoundError:  # a bare checkout
        return "0.0.0"
