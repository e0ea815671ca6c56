"""Search spaces: what can be chosen for each layer of a model, and what it costs."""

from __future__ import annotations

from rankNAS.search_spaces.base import Layer, SearchSpace, Skipped
from rankNAS.search_spaces.compiler import compile_space, count_macs
from rankNAS.search_spaces.policies import RankPolicy

__all__ = ["Layer", "RankPolicy", "SearchSpace", "Skipped", "compile_space", "count_macs"]
