"""Handing a strategy what it asks to know of the model, before a search starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rankNAS.evaluation.context import SearchContext
from rankNAS.evaluation.sensitive import most_sensitive
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.spectra import make_spectra

__all__ = ["bind", "focused"]


def bind(strategy: Strategy, context: SearchContext) -> Strategy:
    """The strategy with what it asks for: spectra, the whole context, or nothing.

    Args:
        strategy: As configured; it is not changed.
        context: The model, its factors and the data.

    Raises:
        TimeLimitError: The active deadline has passed.
    """
    if strategy.needs_context:
        return strategy.bind_context(context)
    if strategy.needs_spectra:
        return strategy.bind(make_spectra(context.factorisation, strategy.needs_spectra))
    return strategy


def focused(strategy: Strategy, context: SearchContext, problem: Problem) -> SearchContext:
    """The context whose evaluator measures the most sensitive samples too, if they are wanted.

    Args:
        strategy: As configured.
        context: The model, its factors and the data.
        problem: The first problem.

    Raises:
        TimeLimitError: The active deadline has passed.
    """
    count = strategy.sensitive
    if not 0 < count < len(context.splits.validation):
        return context
    sampled = strategy.sampled(problem, np.random.default_rng(context.seed))
    order = most_sensitive(context.evaluator, sampled)
    if order is None:
        return context
    return replace(context, evaluator=context.evaluator.focused(order, count))
