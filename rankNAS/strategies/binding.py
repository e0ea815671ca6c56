"""Handing a strategy what it asks to know of the model, before a search starts."""

from __future__ import annotations

from rankNAS.evaluation.context import SearchContext
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.spectra import make_spectra

__all__ = ["bind"]


def bind(strategy: Strategy, context: SearchContext) -> Strategy:
    """The strategy with what it asks for: spectra, the whole context, or nothing.

    Args:
        strategy: As configured; it is not changed.
        context: The model, its factors and the data.
    """
    if strategy.needs_context:
        return strategy.bind_context(context)
    if strategy.needs_spectra:
        return strategy.bind(make_spectra(context.factorisation, strategy.needs_spectra))
    return strategy
