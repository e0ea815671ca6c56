"""The contract of a strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankNAS.allocation import Allocation, Choice
from rankNAS.decompositions.norms import NormName
from rankNAS.exceptions import StudyError, UsageError
from rankNAS.solver.pareto import non_dominated
from rankNAS.strategies.history import History, Trial, objective_values, rankings
from rankNAS.strategies.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankNAS.evaluation.context import SearchContext
    from rankNAS.search_spaces.base import Layer
    from rankNAS.strategies.spectra import LayerSpectra, SpectrumName

__all__ = ["Proposal", "Request", "Strategy"]


@dataclass(frozen=True)
class Request:
    """The demands on a search, known before any work is done.

    Args:
        budget: As in `Problem`.
        objectives: Their names.
        training: Samples that may be trained on.
    """

    budget: Mapping[str, float]
    objectives: Sequence[str]
    training: int


@dataclass(frozen=True)
class Proposal:
    """An allocation to evaluate.

    Args:
        allocation: One choice for each layer.
        weights: The file with the state of its network, if the strategy has trained it; from
            `rankNAS.io.tensors.write_tensors`. Without one, the network has the truncated weights
            of the dense model.
    """

    allocation: Allocation
    weights: Path | None = None


class Strategy(ABC):
    """Proposes allocations.

    `propose` is a pure function of the strategy's configuration and its arguments: what it needs
    to know about earlier proposals it reads from the history. Every proposal is an allocation of
    the problem's space that meets its budgets. An empty list means there is nothing more to
    propose. A strategy must pickle, and is a frozen dataclass of its configuration.

    More methods may be overridden: `check` refuses what the strategy cannot do, `candidates` names
    choices that must be offered, `bind` takes spectra of the layers, and `probes` asks for
    measurements of allocations that need not meet the budgets. A strategy that trains the network
    itself takes the whole search context through `bind_context` instead of `bind`, and gives the
    trained weights with its `proposals`.

    Attributes:
        name: As given to ``--strategy``.
        operators: Whose choices it uses; None for all. See `using`.
        norm: The norm of the published method, in which the layers are decomposed unless the
            settings name another one; None for the default.
        needs_latency: Whether it needs the problem's latency table, budgeted or not.
        needs_spectra: The spectra that `bind` receives: any of ``energy``, ``outputs`` and
            ``weight``, see `LayerSpectra`. `bind` is only called where there are some.
        needs_context: Whether `bind_context` is called, instead of `bind`.
        endless: Whether it proposes as many trials as are wanted, as long as it finds new ones.
        needs_losses: Whether it uses the second-order loss of every choice (`Problem.losses`),
            which takes a pass over the calibration samples.
        screens: Whether its probes are measured on a part of the samples, `Settings.screening`.
        sensitive: So many of the validation samples, the most sensitive ones, are measured apart
            too: metrics named ``NAME@sensitive``. See `sampled`.
        finishes: Whether `finish` trains the returned network.
        trains: Whether it trains weights while it searches, on labels if the data have any.
        refits: Evaluate proposals after sequential refitting
            (`rankNAS.compression.reconstruction`), if the settings have it. A trial then takes
            several times longer. Probes are never refitted.

    Example:
        >>> class Dense(Strategy):
        ...     name = "dense"
        ...     def propose(self, problem, history, n, rng):
        ...         allocation = problem.allocation(problem.all_dense)
        ...         return [] if allocation in history.proposed else [allocation]
        >>> Dense().name
        'dense'
    """

    name: str
    operators: tuple[str, ...] | None = None
    norm: NormName | None = None
    needs_latency: bool = False
    needs_spectra: tuple[SpectrumName, ...] = ()
    needs_context: bool = False
    endless: bool = False
    needs_losses: bool = False
    screens: bool = False
    sensitive: int = 0
    finishes: bool = False
    trains: bool = False
    refits: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method, flag in (("bind", "needs_spectra"), ("bind_context", "needs_context")):
            if method in cls.__dict__ and not getattr(cls, flag):
                raise UsageError(
                    f"strategy {cls.__name__} overrides `{method}`, but does not set `{flag}`, so "
                    "it would never be called. `bind` receives the spectra that `needs_spectra` "
                    "names; `bind_context` receives the search context if `needs_context` is true."
                )

    def check(self, request: Request) -> None:  # noqa: B027
        """Raise a UsageError if the strategy cannot do what is asked; called before any work."""

    def using(self, operators: Sequence[str]) -> Strategy:
        """The strategy with the operators that a user names, in place of those of its paper."""
        configuration = getattr(self, "__dataclass_fields__", {})
        if "operators" not in configuration:
            return self
        return replace(self, operators=tuple(operators))  # type: ignore[type-var]

    def candidates(self, layer: Layer, weight: Tensor) -> Mapping[Choice, float]:
        """Choices of a layer that the strategy needs, with the error in which it compares them.

        Those that no other candidate beats in this error and in the costs are offered, and stay
        whatever the errors of the study say. None are needed by default.

        Args:
            layer: Its name and shape, the operators and choices that it offers.
            weight: Its weight, folded (g, o, c, kh, kw).
        """
        return {}

    def bind(self, spectra: Mapping[str, LayerSpectra]) -> Strategy:
        """The strategy with what it needs to know of the layers; called once a search.

        Args:
            spectra: By layer, those that `needs_spectra` names. They hold numbers alone, so a
                strategy that keeps them keeps no weights or factors in memory.
        """
        return self

    def bind_context(self, context: SearchContext) -> Strategy:
        """The strategy with the model, its factors and the data; called once a search.

        For strategies that train the network: what is kept of the context stays in memory.
        """
        return self

    def probes(self, problem: Problem, history: History) -> list[Allocation]:
        """Allocations to measure before `propose` is called again; they need not meet the budget.

        Probes that are in the history are not measured again, so this may always return the same
        list. A pure function, like `propose`. Neighbours in the list are cheapest to evaluate if
        they agree in the first layers.
        """
        return []

    def sampled(self, problem: Problem, rng: np.random.Generator) -> list[Allocation]:
        """Allocations over which the loss of the most sensitive samples varies most."""
        return []

    def finish(
        self, network: nn.Module, allocation: Allocation, context: SearchContext
    ) -> nn.Module:
        """The network that is returned for an allocation, trained as the paper has it.

        Args:
            network: The network, refitted and trained as the settings say.
            allocation: Its choices.
            context: The data and the task.
        """
        return network

    def select(self, problem: Problem, history: History) -> Trial:
        """The solution of a problem: the best measured trial that meets its budgets.

        The trial of the best rank (`rankings`), with several objectives among those of the Pareto
        front. Ties go to the smaller loss, then to the earlier trial.

        Raises:
            StudyError: No trial has succeeded yet.
        """
        best = history.best(problem)
        if best is None:
            raise StudyError(f"no trial of the study has succeeded yet for {problem.budget_key}.")
        if len(problem.objectives) == 1:
            return best
        trials = history.feasible(problem)
        ranks = (-rankings(problem, trials)[:, 0]).tolist()
        losses = [t.metrics.get("loss", 0.0) for t in trials]
        numbers = [t.number for t in trials]
        on_front = np.flatnonzero(non_dominated(objective_values(problem, trials))).tolist()
        return trials[min(on_front, key=lambda i: (ranks[i], losses[i], numbers[i]))]

    def proposals(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """The allocations of `propose`, with their weights if the strategy has trained them.

        This is what searches call; a strategy that trains overrides it.
        """
        return [Proposal(a) for a in self.propose(problem, history, n, rng)]

    @abstractmethod
    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """At most n allocations to evaluate next.

        Args:
            problem: Tables, budgets and directions.
            history: What is known.
            n: How many are wanted.
            rng: The only source of randomness.
        """
