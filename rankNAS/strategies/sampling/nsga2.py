"""NSGA-II: the evolutionary sampler of Optuna, on the budget.

References:
    Deb et al., IEEE Transactions on Evolutionary Computation 2002 (NSGA-II).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from optuna.samplers import BaseSampler, NSGAIISampler

from rankNAS.exceptions import UsageError
from rankNAS.strategies.sampling.samplers import Sampled

__all__ = ["Nsga2"]


@final
@dataclass(frozen=True)
class Nsga2(Sampled):
    """NSGA-II: the evolutionary baseline, for one objective or several.

    Args:
        population: Successful trials of a generation.
        attempts: How often a draw that was seen before is repeated, for each proposal.

    Raises:
        UsageError: Fewer than two individuals, or no attempt.
    """

    population: int = 16
    attempts: int = 20
    name = "nsga2"
    endless = True

    def __post_init__(self) -> None:
        if self.population < 2 or self.attempts < 1:
            raise UsageError(
                f"`population` must be at least 2 and `attempts` at least 1, got {self}."
            )

    def _sampler(self, seed: int) -> BaseSampler:
        return NSGAIISampler(population_size=self.population, seed=seed)

    def _attributes(self, position: int) -> dict[str, Any]:
        # Trials without a generation are nobody's parents.
        return {NSGAIISampler._get_generation_key(): position // self.population}
