"""Bayesian optimisation of a few shared keep-ratios, after Bolaco.

A Gaussian process models loss and divergence from the dense model as a function of what each kind
of layer keeps. The next allocation is the one of the largest expected improvement among random
feasible ones and small changes of the best.

References:
    Ji et al., EMNLP Findings 2024, arXiv 2405.10616 (Bolaco), section 3, and the code released
    with it, where the two differ: Matern-5/2 kernel, no margin of improvement, three initial
    points, the direction of the divergence, bounds of the length scales.
    Ginsbourger, Le Riche and Carraro, 2010: the believer, which stands in for results to come.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.budget import BUDGET_COSTS
from rankNAS.copies import copied
from rankNAS.evaluation.context import SearchContext
from rankNAS.exceptions import RankNASError, UsageError
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.diagonals import train_diagonals
from rankNAS.strategies.base import Request, Strategy
from rankNAS.strategies.bayesian.bo import deterministic
from rankNAS.strategies.bayesian.keep_ratios import KeepRatios
from rankNAS.strategies.bayesian.surrogate import FIT_ITERATIONS
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Array, Problem

__all__ = ["Bolaco", "expected_improvement", "matern", "surrogate"]

logger = logging.getLogger(__name__)

FARTHEST = 100  # random allocations among which the farthest from all others is an initial one
SAMPLED, STAGES = 20, 4  # random allocations that tell which samples are the most sensitive
BATCH, RATE = 64, 2e-3  # of the post-training
LENGTHS = 0.8, 1.0  # initial length scales: of other layers, of attention layers
SHORTEST, LONGEST = 1.2e-3, 1.09  # bounds of the length scales


@final
@dataclass(frozen=True)
class Bolaco(Strategy):
    """Expected improvement over keep-ratios that layers of one kind share; one objective.

    It minimises loss + `divergence_weight` x KL(compressed || dense), both measured on the
    `sensitive` validation samples whose perplexity, or loss, varies most over 20 random
    allocations (section 3.3); where they were not, the first objective. Published is the
    perplexity plus 1e-3 times the divergence summed over sequences of 4096 tokens: at a perplexity
    of 8, which changes by 8 for a unit of loss, that is 4.1 / 8 times the mean divergence of a
    token.

    In the norm ``pooled``, its own, the SVD is Bolaco's factorisation (section 3.1). Diagonals of
    the returned network are trained on labelled training samples (`train_diagonals`, section 3.4).

    Args:
        stages: Parts of the depth that have their own variables: published are 1 and 4.
        divergence_weight: Of the divergence, in nats, against the loss, in nats.
        initial: Trials before the process takes over: the published proportions of attention and
            other layers, and allocations far from each other.
        pool: Random allocations among which each is chosen, and changes of the best ones tried.
        operators: Whose choices are used; None for all.
        sensitive: Validation samples that count; 0 for all.
        epochs: Of the post-training; 0 for none.
        samples: Training samples of an epoch, at most.
        slices: Components of a layer whose diagonals are trained, at most.

    Raises:
        UsageError: A number out of range.
    """

    stages: int = 1
    divergence_weight: float = 0.5
    initial: int = 3
    pool: int = 512
    operators: tuple[str, ...] | None = ("svd",)
    sensitive: int = 100
    epochs: int = 2
    samples: int = 2048
    slices: int = 256
    name = "bolaco"
    norm = "pooled"

    def __post_init__(self) -> None:
        if min(self.stages, self.pool) < 1 or self.initial < 2 or self.divergence_weight < 0:
            raise UsageError(
                "`stages` and `pool` must be at least 1, `initial` at least 2 and "
                f"`divergence_weight` not negative; got {self}."
            )

    def check(self, request: Request) -> None:
        if not request.budget:
            raise UsageError(
                "the strategy 'bolaco' searches among networks that use up a budget, but there is "
                "none; give one, for example params=0.8."
            )
        if costs := [name for name in request.objectives if name in BUDGET_COSTS]:
            raise UsageError(
                "the strategy 'bolaco' minimises loss and divergence alone, but the objectives "
                f"include {', '.join(costs)}; give several budgets instead, or use 'bo'."
            )

    @property
    def finishes(self) -> bool:  # type: ignore[override]
        """Whether the returned network is trained."""
        return self.epochs > 0

    def sampled(self, problem: Problem, rng: np.random.Generator) -> list[Allocation]:
        """Random feasible allocations with variables of their own in four parts of the depth."""
        ratios = KeepRatios.of(problem.within(self.operators), STAGES)
        if not ratios.variables:
            return []
        rows = np.unique(ratios.draw(rng, SAMPLED), axis=0)
        return [ratios.problem.allocation(row) for row in rows.tolist()]

    def finish(
        self, network: nn.Module, allocation: Allocation, context: SearchContext
    ) -> nn.Module:
        """The network after the post-training of diagonals; as it was, if that diverges."""
        layers = [name for name, choice in allocation.items() if choice.operator == "svd"]
        if not self.finishes or not layers:
            return network
        config = TrainingConfig(
            self.epochs, batch_size=BATCH, learning_rate=RATE, optimizer="adamw", weight_decay=0.0
        )
        recovery = context.recovery(config, self.samples)
        trained, device = copied(network), context.evaluator.device
        try:
            return train_diagonals(trained, layers, recovery, slices=self.slices, device=device)
        except RankNASError as error:
            logger.warning("the post-training of bolaco is left out: %s", error)
            return network

    def select(self, problem: Problem, history: History) -> Trial:
        """The trial of the least minimised value.

        Raises:
            StudyError: No trial has succeeded yet.
        """
        if not history.feasible(problem):
            return super().select(problem, history)
        return self._best(problem, history)

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        ratios = KeepRatios.of(problem.within(self.operators), self.stages)
        found: list[Allocation] = []
        for _ in range(n):
            waiting = history.awaiting((*history.pending, *found))
            allocation = self._next(problem, ratios, waiting, rng)
            if allocation is None:
                break
            found.append(allocation)
        return found

    def _next(
        self, problem: Problem, ratios: KeepRatios, history: History, rng: np.random.Generator
    ) -> Allocation | None:
        default = ratios.default()
        if default not in history.proposed:
            return default
        if not ratios.variables:
            return None
        begun = len(history.feasible(problem)) >= self.initial
        rows = ratios.draw(rng, self.pool if begun else FARTHEST)
        if begun:
            best = _kept(problem, ratios, [self._best(problem, history).allocation])[0]
            rows = np.concatenate([rows, ratios.around(rng, best, self.pool)])
        rows = np.unique(rows, axis=0)
        drawn = [ratios.problem.allocation(row) for row in rows.tolist()]
        new = [i for i, allocation in enumerate(drawn) if allocation not in history.proposed]
        if not new:
            return None
        points = ratios.kept(ratios.problem, rows[new])
        if begun:
            return drawn[new[self._most_promising(problem, ratios, history, points, rng)]]
        tried = [t.allocation for t in history.trials] + list(history.pending)
        distances = np.linalg.norm(points[:, None] - _kept(problem, ratios, tried), axis=2)
        return drawn[new[int(distances.min(1).argmax())]]

    def _best(self, problem: Problem, history: History) -> Trial:
        trials = history.feasible(problem)
        return trials[int(self._value(problem, trials).argmin())]

    def _value(self, problem: Problem, trials: Sequence[Trial]) -> Array:
        """The minimised value, (trials,)."""
        for where in ("@sensitive", ""):
            names = f"loss{where}", f"reverse_kl{where}"
            if all(name in t.metrics for t in trials for name in names):
                pairs = [[t.metrics[name] for name in names] for t in trials]
                return np.array(pairs) @ [1.0, self.divergence_weight]
        first: Array = np.array([t.values[0] for t in trials])
        return -float(problem.signs[0]) * first

    def _most_promising(
        self,
        problem: Problem,
        ratios: KeepRatios,
        history: History,
        points: Array,
        rng: np.random.Generator,
    ) -> int:
        """Position of the point of the largest expected improvement."""
        with deterministic(int(rng.integers(2**31))):
            # Where all results are equal the process is certain of the next one, too.
            warnings.filterwarnings("ignore", message="Negative variance values detected")
            trials, lengths = history.complete, np.choose(ratios.attention, LENGTHS)
            X = torch.from_numpy(_kept(problem, ratios, [t.allocation for t in trials]))
            y = torch.from_numpy(self._value(problem, trials)).unsqueeze(1)
            met = [problem.meets(problem.indices(t.allocation)) for t in trials]
            least = float(y[torch.tensor(met)].min())
            model = surrogate(X, y, lengths.tolist())
            if history.pending:
                waiting = torch.from_numpy(_kept(problem, ratios, history.pending))
                believed = model.posterior(waiting).mean.detach()
                model = surrogate(
                    torch.cat([X, waiting]), torch.cat([y, believed]), lengths.tolist()
                )
            acquisition = expected_improvement(model, least)
            with torch.no_grad():
                return int(acquisition(torch.from_numpy(points).unsqueeze(1)).argmax())


def _kept(problem: Problem, ratios: KeepRatios, allocations: Sequence[Allocation]) -> Array:
    """The variables of allocations, (P, V)."""
    return ratios.kept(problem, np.array([problem.indices(a) for a in allocations]))


def matern(lengths: Sequence[float]) -> Any:
    """A scaled Matern-5/2 kernel with one length scale a variable, initially these."""
    from gpytorch.constraints import Interval
    from gpytorch.kernels import MaternKernel, ScaleKernel

    bounds = Interval(SHORTEST, LONGEST)
    kernel = MaternKernel(nu=2.5, ard_num_dims=len(lengths), lengthscale_constraint=bounds)
    kernel.lengthscale = torch.tensor(lengths, dtype=torch.float64)
    scaled = ScaleKernel(kernel)
    scaled.outputscale = 2.0
    return scaled.double()


def surrogate(X: Tensor, y: Tensor, lengths: Sequence[float]) -> Any:  # X (P, V), y (P, 1)
    """A Gaussian process with white noise, its hyper-parameters fitted to standardised values."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    model = SingleTaskGP(X, y, covar_module=matern(lengths), outcome_transform=Standardize(1))
    fit_gpytorch_mll(
        ExactMarginalLogLikelihood(model.likelihood, model),
        optimizer_kwargs={"options": {"maxiter": FIT_ITERATIONS}},
    )
    return model


def expected_improvement(model: Any, least: float) -> Any:
    """The logarithm of E[max(0, least - f)], for minimisation; without overflow far from it."""
    from botorch.acquisition.analytic import LogExpectedImprovement

    return LogExpectedImprovement(model, best_f=least, maximize=False)
