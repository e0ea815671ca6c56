"""Search spaces: the choices of each layer of a model, and their costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankNAS.lazy import exports

if TYPE_CHECKING:
    from rankNAS.search_spaces.base import Layer, SearchSpace, Skipped
    from rankNAS.search_spaces.compiler import compile_space, count_macs
    from rankNAS.search_spaces.policies import RankPolicy

__all__ = ["Layer", "RankPolicy", "SearchSpace", "Skipped", "compile_space", "count_macs"]

__getattr__ = exports(
    __name__,
    dict.fromkeys(("Layer", "SearchSpace", "Skipped"), f"{__name__}.base")
    | dict.fromkeys(("compile_space", "count_macs"), f"{__name__}.compiler")
    | {"RankPolicy": f"{__name__}.policies"},
)
