"""Gaussian processes of `bo`: the summed losses as prior mean, a few groups of layers as inputs.

To second order the degradation of an allocation is the sum of its layers' losses
(`summed_losses`). The process models what this leaves over, as a function of the shares of the sum
that a few groups of neighbouring layers have: the losses of layers of one depth are wrong by
similar factors, and with so few inputs a few trials say by which. For a divergence both are
logarithms, so that a factor is a constant; for any other objective the sum has a coefficient,
fitted to the trials.

Notation: P allocations, L layers, G groups, J objectives.

References:
    Balandat et al., NeurIPS 2020 (BoTorch). Ament et al., NeurIPS 2023: log expected improvement.
    Daulton et al., NeurIPS 2021: noisy expected hypervolume improvement, for several objectives.
    Hvarfner et al., ICML 2024: length scales that grow with the dimension (BoTorch's default).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rankNAS.deadline import check_time
from rankNAS.strategies.history import Trial, by_divergence, rankings
from rankNAS.strategies.problem import Array, Problem

__all__ = ["Inputs", "acquisition", "equal_shares", "standardised", "summed_losses"]

Indices = npt.NDArray[np.int64]
FIT_ITERATIONS = 50  # of L-BFGS; later ones change the hyper-parameters, not the choice
FLOOR = 1e-3  # of a typical degradation or sum, added before the logarithm: dense has 0
LEAST = 0.03  # unit of the logarithm of a divergence, at least: what noise makes of equal networks
EXACT = 1e-3  # unit of an objective that its prior mean explains, relative to its spread


def summed_losses(problem: Problem, rows: Indices) -> Array:
    """The sum of the losses of the layers, (P,); of the relative errors where they are unknown."""
    columns = [table[rows[:, i]] for i, table in enumerate(problem.absolute)]
    total: Array = np.sum(columns, axis=0)
    return total


def equal_shares(problem: Problem, row: Indices, groups: int) -> Indices:
    """Groups (L,) of neighbouring layers with about equal parts of an allocation's loss."""
    parts = np.array([float(table[i]) for table, i in zip(problem.absolute, row, strict=True)])
    parts = parts + 1e-9 * (parts.sum() or 1.0)
    middle = (np.cumsum(parts) - parts / 2) / parts.sum()
    found: Indices = np.minimum((groups * middle).astype(np.int64), groups - 1)
    return found


@dataclass(frozen=True)
class Inputs:
    """The inputs of the processes.

    Args:
        problem: Its losses, and its costs that are objectives.
        groups: The group of each layer, (L,).
        priors: By objective, the prior mean of allocations, on the scale of its process.
        low: Least value of each feature, (F,).
        span: Range of each feature, (F,).
    """

    problem: Problem
    groups: Indices
    priors: Sequence[Callable[[Indices], Array]]
    low: Array
    span: Array

    @classmethod
    def over(
        cls,
        problem: Problem,
        groups: Indices,
        priors: Sequence[Callable[[Indices], Array]],
        rows: Indices,
    ) -> Inputs:
        """The inputs with features that are in [0, 1] for some allocations."""
        found = _features(problem, groups, rows)
        span = np.ptp(found, axis=0)
        return cls(problem, groups, priors, found.min(0), np.where(span > 0, span, 1.0))

    def of(self, rows: Indices) -> Tensor:  # (P, L) -> (P, F + J)
        """Features, then prior means."""
        features = (_features(self.problem, self.groups, rows) - self.low) / self.span
        means = np.stack([prior(rows) for prior in self.priors], axis=1)
        return torch.from_numpy(np.concatenate([features, means], axis=1))


def _features(problem: Problem, groups: Indices, rows: Indices) -> Array:  # -> (P, F)
    """The share of each group in the summed losses; the costs that are objectives."""
    total = np.maximum(summed_losses(problem, rows), 1e-300)
    shares = np.zeros((len(rows), int(groups.max(initial=0)) + 1))
    for i, table in enumerate(problem.absolute):
        shares[:, groups[i]] += table[rows[:, i]] / total
    costs = [_cost(problem, name, rows) for name in problem.objectives if name in problem.costs]
    return np.column_stack([shares, *costs])


def _cost(problem: Problem, name: str, rows: Indices) -> Array:
    columns = [table[rows[:, i]] for i, table in enumerate(problem.costs[name])]
    total: Array = problem.remainder_cost[name] + np.sum(columns, axis=0)
    return total


def standardised(
    problem: Problem, trials: Sequence[Trial], rows: Indices
) -> tuple[Array, list[Callable[[Indices], Array]]]:
    """What the processes model, (trials, J), larger is better; and their prior means.

    Each objective has the spread of what its prior mean leaves over as its unit.

    Args:
        problem: Objectives and losses.
        trials: Evaluated allocations.
        rows: The same as indices.
    """
    ranks = rankings(problem, trials)
    compared = by_divergence(problem, trials)
    targets, priors = [], []
    for j, name in enumerate(problem.objectives):
        y, prior = ranks[:, j], _linear(problem, ranks[:, j], rows)
        if j == 0 and compared:
            y, prior = -_logarithm(-y)(-y), _of_divergence(problem, rows)
        elif name in problem.costs:
            prior = _of_cost(problem, name, float(problem.signs[j]))
        left = y - prior(rows)
        least = LEAST if j == 0 and compared else EXACT * float(y.std())
        unit = max(float(left.std()), least) or 1.0
        targets.append((y - y.mean()) / unit)
        priors.append(_affine(prior, float(left.mean() - y.mean()), unit))
    return np.stack(targets, axis=1), priors


def _logarithm(values: Array) -> Callable[[Array], Array]:
    """The logarithm, with a floor that follows from typical values."""
    positive = values[values > 0]
    floor = FLOOR * (float(np.median(positive)) if len(positive) else 1.0)
    return lambda x: np.log(np.maximum(x, 0) + floor)


def _of_divergence(problem: Problem, rows: Indices) -> Callable[[Indices], Array]:
    logarithm = _logarithm(summed_losses(problem, rows))
    return lambda given: -logarithm(summed_losses(problem, given))


def _of_cost(problem: Problem, name: str, sign: float) -> Callable[[Indices], Array]:
    return lambda given: sign * _cost(problem, name, given)


def _linear(problem: Problem, y: Array, rows: Indices) -> Callable[[Indices], Array]:
    """Minus the summed losses times the coefficient that fits the trials best, at least 0."""
    h = summed_losses(problem, rows)
    centred = h - h.mean()
    slope = max(0.0, -float(centred @ y) / (float(centred @ centred) or 1.0))
    return lambda given: -slope * summed_losses(problem, given)


def _affine(
    prior: Callable[[Indices], Array], shift: float, unit: float
) -> Callable[[Indices], Array]:
    return lambda given: (prior(given) + shift) / unit


def acquisition(X: Tensor, Y: Tensor, met: Tensor, waiting: Tensor | None, seed: int) -> Any:
    """The acquisition function, on processes fitted to trials.

    Args:
        X: From `Inputs.of`, (trials, F + J).
        Y: From `standardised`, (trials, J).
        met: Which trials meet the budgets: what is to be improved on.
        waiting: X of the allocations that are being evaluated.
        seed: Of the quasi-random numbers.
    """
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.models.model_list_gp_regression import ModelListGP
    from botorch.sampling.normal import SobolQMCNormalSampler

    features = X.shape[1] - Y.shape[1]
    models = [fitted(X, y, features, features + j) for j, y in enumerate(Y.split(1, dim=1))]
    sampler = SobolQMCNormalSampler(torch.Size([128]), seed=seed % 2**31)
    if len(models) == 1:
        return qLogNoisyExpectedImprovement(
            models[0], X[met], sampler=sampler, X_pending=waiting, prune_baseline=True
        )
    span = Y.max(0).values - Y.min(0).values
    return qLogNoisyExpectedHypervolumeImprovement(
        ModelListGP(*models),
        ref_point=(Y.min(0).values - 0.1 * span).tolist(),
        X_baseline=X[met],
        sampler=sampler,
        X_pending=waiting,
        prune_baseline=True,
    )


def fitted(X: Tensor, y: Tensor, features: int, column: int) -> Any:
    """A process whose prior mean is a column of its inputs, with fitted hyper-parameters.

    Args:
        X: (trials, F + J).
        y: (trials, 1).
        features: F, the columns that the kernel sees.
        column: That of the prior mean.
    """
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
    from gpytorch.means import LinearMean
    from gpytorch.mlls import ExactMarginalLogLikelihood

    mean = LinearMean(X.shape[1], bias=False).to(X)
    mean.weights.data.zero_()
    mean.weights.data[column] = 1.0
    mean.weights.requires_grad_(False)
    kernel = get_covar_module_with_dim_scaled_prior(
        ard_num_dims=features, active_dims=list(range(features))
    )
    model = SingleTaskGP(X, y, mean_module=mean, covar_module=kernel.to(X), outcome_transform=None)
    fit_gpytorch_mll(
        ExactMarginalLogLikelihood(model.likelihood, model),
        optimizer_kwargs={
            "options": {"maxiter": FIT_ITERATIONS},
            "callback": lambda *_: check_time(),
        },
    )
    return model
