"""HALOC: ranks by differentiable architecture search on a super-net.

Every layer has a few candidates of equal Tucker-2 ranks in coarse steps, all truncations of one
weight, and one logit per candidate. Each epoch first improves the logits on training data that the
weights do not see, by the cross-entropy under a penalty on the expected cost, and then trains the
network at the likely ranks, its feature maps held close to the dense network's. The
solution is the most probable allocation within the budgets, with the trained weights, decomposed
anew at its ranks; or, if the weights are not kept, with the original ones.

Notation: p_lj the probability of candidate j of layer l, T the budget.

Provenance. This is a reconstruction. Xiao et al., AAAI 2023 (arXiv:2301.09422), published no code;
from its abstract and from summaries by others come: Tucker-2, selection as differentiable
architecture search, weights and probabilities learned in turn, the expected hardware cost in the
objective, ranks in coarse multiples, equal ranks, and the feature-map regulariser. The code of the
same first author's ComCAT (Xiao et al., ICML 2023) gives the rest, and may differ from HALOC's own
settings: equal logits at the start, Gumbel-softmax with its temperature falling from 5 to 0.1,
AdamW on the logits, the loss CE (cost / T)^1.5 above the budget, fixed ranks before each epoch of
weights, and the coefficient of the regulariser. Own choices: dense and the cheapest choice as
candidates, the cost expected under softmax(logits) where ComCAT weighs it by the relaxed sample,
the relative error in the regulariser, few steps an epoch with a larger rate of the logits, the
expected ranks where the argmax, which ComCAT takes, leaves a tenth of the budget (`picked`), exact
decoding of the solution, the original weights where they are better on the validation data, and
SVD where Tucker-2 does not apply (at equal ranks the Tucker-2 of a matrix is its truncated SVD, so
the method is not tied to images). In the training, weights are truncated in their own norm; the
solution is decomposed in the Fisher norm and refitted, as networks of other strategies are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final, get_args

import numpy as np
from torch import Tensor

from rankNAS.allocation import Allocation, Choice
from rankNAS.evaluation.context import SearchContext, silent
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import Layer
from rankNAS.strategies.base import Proposal, Request, Strategy
from rankNAS.strategies.history import History
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.supernet.candidates import coarse, equal_ranks, picked
from rankNAS.strategies.supernet.losses import Penalty
from rankNAS.strategies.supernet.training import Training

__all__ = ["Haloc"]


@final
@dataclass(frozen=True)
class Haloc(Strategy):
    """Differentiable search of equal Tucker-2 ranks on a super-net; a reconstruction.

    It needs a model and training data (see `bind_context`) and a budget, and proposes one
    allocation per problem. The training is continued where it was interrupted.

    Args:
        epochs: Rounds of logits and weights.
        steps: Batches of each in a round.
        batch_size: Samples a batch.
        granularity: Ranks are multiples of this; None takes an eighth of each layer's smaller
            side.
        penalty: ``power`` or ``log``, see `penalised`.
        strength: The exponent of ``power``, or the factor of ``log`` (16 in ARS).
        learning_rate: Of the logits (AdamW).
        weight_rate: Of the weights (SGD, momentum 0.9).
        features: Coefficient of the feature-map regulariser in the first epoch.
        keep: Whether the solution keeps the trained weights; None keeps them where they are better
            on the validation data than the original ones, refitted.
        operators: In order of preference: a layer takes its candidates from the first that it
            offers. None is the default, followed by all others.

    Raises:
        UsageError: A number out of range, or an unknown penalty.
    """

    epochs: int = 8
    steps: int = 24
    batch_size: int = 64
    granularity: int | None = None
    penalty: Penalty = "power"
    strength: float = 1.5
    learning_rate: float = 0.1
    weight_rate: float = 5e-3
    features: float = 0.5
    keep: bool | None = None
    operators: tuple[str, ...] | None = ("tucker2", "svd")
    name = "haloc"
    needs_context = True
    trains = True

    def __post_init__(self) -> None:
        for number in ("epochs", "steps", "granularity"):
            value = getattr(self, number)
            if value is not None and value < 1:
                raise UsageError(f"`{number}` must be at least 1, got {value}.")
        if self.batch_size < 2:
            raise UsageError(f"`batch_size` must be at least 2, got {self.batch_size}.")
        for number in ("strength", "learning_rate", "weight_rate"):
            if not 0 < (value := getattr(self, number)) < math.inf:
                raise UsageError(f"`{number}` must be positive, got {value}.")
        if not 0 <= self.features < math.inf:
            raise UsageError(f"`features` must not be negative, got {self.features}.")
        if self.penalty not in get_args(Penalty):
            raise UsageError(f"`penalty` must be power or log, got {self.penalty!r}.")

    def check(self, request: Request) -> None:
        """Raise a UsageError without a budget, or with too little data."""
        _check_budget(request.budget)
        self._check_size(request.training)

    def _check_size(self, training: int) -> None:
        if training < 2 * self.batch_size:
            raise UsageError(
                f"strategy 'haloc' needs two batches of training data, {2 * self.batch_size} "
                f"samples, but there are {training}; lower `batch_size` or give more data."
            )

    def candidates(self, layer: Layer, weight: Tensor) -> Mapping[Choice, float]:
        """Equal ranks in multiples of the granularity, of the first operator that is offered."""
        ranks = equal_ranks(layer.choices, layer.shape, self.operators, self.granularity)
        return {choice: -float(max(choice.rank)) for choice in ranks}

    def bind_context(self, context: SearchContext) -> Strategy:
        """The strategy with the model and the data that it trains on."""
        self._check_size(len(context.splits.training))
        return _Bound(self, context, self.operators)

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        raise UsageError(
            "strategy 'haloc' has no model and no training data yet; call "
            "`bind_context(context)` first, as `rankNAS.search` does, and propose with what it "
            "returns."
        )


def _check_budget(budget: Mapping[str, float]) -> None:
    if not budget:
        raise UsageError(
            "strategy 'haloc' trades accuracy for a cost, so it needs a budget; give one, for "
            "example macs=0.5."
        )


@final
@dataclass(frozen=True)
class _Bound(Strategy):
    """`Haloc` on a search context; equal to another of the same configuration."""

    configuration: Haloc
    context: SearchContext = field(compare=False, repr=False)
    operators: tuple[str, ...] | None
    name = "haloc"
    trains = True

    def __getstate__(self) -> dict[str, Any]:
        # A progress bar and an evaluator, with its traced network, do not pickle; neither matters.
        context = replace(self.context, report=silent, evaluator=None)  # type: ignore[arg-type]
        return self.__dict__ | {"context": context}

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """The allocation of the solution, once; see `proposals`."""
        return [proposal.allocation for proposal in self.proposals(problem, history, n, rng)]

    def proposals(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """The solution, once; trained, unless a checkpoint has it.

        Raises:
            ObjectiveError: The training diverged.
            BudgetError: No allocation of the candidates meets the budgets.
            UsageError: There is no budget.
            WriteError: The checkpoint cannot be written; the one of the last epoch is intact.
        """
        _check_budget(problem.budget)
        if n < 1 or history.candidates(problem):
            return []
        layers = self.context.factorisation.space.layers
        shapes = {name: layers[name].shape for name in problem.choices}
        searched = coarse(problem, shapes, self.operators, self.configuration.granularity)
        training = Training(self.configuration, self.context, searched)
        allocation = searched.allocation(picked(searched, training.run()))
        if allocation in history.proposed:
            return []
        keep = self.configuration.keep
        weights = None if keep is False else training.keep(allocation)
        if keep is None and not self._better(problem, allocation, str(weights)):
            weights = None
        return [Proposal(allocation, weights)]

    def _better(self, problem: Problem, allocation: Allocation, weights: str) -> bool:
        """Whether trained weights are better than the original ones, refitted."""
        evaluator = self.context.evaluator
        if evaluator is None or evaluator.recovery is not None:  # or both are trained further
            return True
        original = evaluator.evaluate(allocation, final=True)
        trained = evaluator.evaluate(allocation, weights=weights)
        if problem.objectives[0] in problem.metrics and problem.divergence in trained:
            return trained[problem.divergence] < original[problem.divergence]
        first = problem.objectives[0]
        return float(problem.signs[0]) * (trained[first] - original[first]) > 0
