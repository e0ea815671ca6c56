"""What strategies are given of the model: nothing, spectra, or the whole context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from rankNAS.allocation import Allocation
from rankNAS.compression.factorisation import factorise
from rankNAS.evaluation.context import SearchContext
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces import compile_space
from rankNAS.strategies import STRATEGIES
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.binding import bind
from rankNAS.strategies.history import History
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.spectra import LayerSpectra


class Proposing(Strategy):
    """Proposes nothing."""

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        return []


@dataclass(frozen=True)
class OfSpectra(Proposing):
    seen: Any = None
    name = "spectra"
    needs_spectra = ("outputs", "energy")

    def bind(self, spectra: Mapping[str, LayerSpectra]) -> Strategy:
        return replace(self, seen=spectra)


@dataclass(frozen=True)
class OfEverything(Proposing):
    seen: Any = None
    name = "everything"
    needs_context = True

    def bind_context(self, context: SearchContext) -> Strategy:
        return replace(self, seen=context)


def test_a_strategy_gets_what_it_asks_for(small_net: nn.Module) -> None:
    factorisation = factorise(small_net, compile_space(small_net, torch.zeros(1, 3, 8, 8)))
    context = cast(SearchContext, SimpleNamespace(factorisation=factorisation))
    plain = Energy()
    assert bind(plain, context) is plain
    bound = bind(OfSpectra(), context)
    assert isinstance(bound, OfSpectra) and list(bound.seen) == list(factorisation.layers)
    for found in bound.seen.values():
        assert found.energy > 0 and found.outputs and not found.weight
    bound = bind(OfEverything(), context)
    assert isinstance(bound, OfEverything) and bound.seen is context


def test_haloc_alone_is_given_the_context() -> None:
    assert [name for name, cls in STRATEGIES.items() if cls.needs_context] == ["haloc"]


def test_a_strategy_of_the_former_contract_is_told_the_new_one() -> None:
    with pytest.raises(UsageError, match="Former overrides `bind`.*`needs_spectra`.*context"):

        class Former(Proposing):
            def bind(self, context: Any) -> Strategy:
                return self

    with pytest.raises(UsageError, match="Silent overrides `bind_context`.*`needs_context`"):

        class Silent(Proposing):
            def bind_context(self, context: SearchContext) -> Strategy:
                return self
