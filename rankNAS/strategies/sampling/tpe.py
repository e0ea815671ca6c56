"""TPE: the tree-structured Parzen estimator of Optuna, on the budget.

References:
    Bergstra et al., NeurIPS 2011 (TPE), multivariate as in Falkner et al., ICML 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from optuna.samplers import BaseSampler, TPESampler

from rankNAS.exceptions import UsageError
from rankNAS.strategies.sampling.samplers import Sampled

__all__ = ["Tpe"]


@final
@dataclass(frozen=True)
class Tpe(Sampled):
    """The tree-structured Parzen estimator, multivariate.

    Args:
        startup: Successful trials before the estimator takes over from uniform draws.
        attempts: How often a draw that was seen before is repeated, for each proposal.

    Raises:
        UsageError: A number below one.
    """

    startup: int = 10
    attempts: int = 20
    name = "tpe"
    endless = True

    def __post_init__(self) -> None:
        if self.startup < 1 or self.attempts < 1:
            raise UsageError(f"`startup` and `attempts` must be at least 1, got {self}.")

    def _sampler(self, seed: int) -> BaseSampler:
        return TPESampler(
            n_startup_trials=self.startup, multivariate=True, constant_liar=True, seed=seed
        )
