"""Recipe ``greedylore``: training in several local processes with compressed gradients.

Each process computes the gradient of its part of every batch. They exchange low-rank projections
of the gradients with error feedback (`rankNAS.recovery.greedylore`), and all make the same step.
At full rank, this is `distil` on the whole batch, but for the batch norms, which see a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, final

from rankNAS.exceptions import UsageError
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.greedylore import GreedyLore
from rankNAS.recovery.helpers import Helpers
from rankNAS.recovery.recipe import Job, Setup
from rankNAS.recovery.recover import loop_of
from rankNAS.recovery.team import DismissedError, Team

__all__ = ["GreedyDistil"]


@final
@dataclass(frozen=True, kw_only=True)
class GreedyDistil(Distil):
    """`Distil` in several processes of this machine.

    Starting them takes some seconds, which the limit `seconds` does not count.

    Args:
        processes: Processes, this one included; each has its own copy of the data.
        rank: Directions of each gradient that are exchanged; see `GreedyLore`.
        period: Steps after which gradients are exchanged whole once.
        start: First steps in which they are exchanged whole.
        rate: Gradients that compression makes less than so many times smaller are exchanged whole.
        carry: Whether a refresh adds the errors to the gradients, and does not drop them.
    """

    name: ClassVar[str] = "greedylore"
    processes: int = 2
    rank: int = 8
    period: int = 200
    start: int = 0
    rate: float = 2.0
    carry: bool = False
    speed: str = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("processes", "rank", "period"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("start", self.start >= 0, "0 or more")
        self._require("rate", 0 < self.rate < float("inf"), "above 0")
        # A measurement might choose differently in each process.
        self._require("speed", self.speed != "auto", "plain or a mode such as channels_last")

    @contextmanager
    def prepared(self, job: Job) -> Iterator[Setup]:
        size = min(self.config(job).batch_size, len(job.data))
        if self.processes > size:
            raise UsageError(
                f"recipe 'greedylore': {self.processes} processes are more than the {size} "
                "samples of a batch; give fewer processes or larger batches."
            )
        helpers = Helpers(self.processes, follow, (self, job), job.checkpoint)
        team: Team | None = None
        try:
            team = self._team(job, helpers)
            with super().prepared(job) as setup:
                yield replace(setup, parts=[*setup.parts, team], team=team)
        finally:
            if team is None:
                helpers.close()
            else:
                helpers.close(team.dismiss)

    @contextmanager
    def prepared_beside(self, job: Job) -> Iterator[Setup]:
        """`prepared`, in a process that follows another one."""
        team = self._team(job)
        with super().prepared(job) as setup:
            yield replace(setup, parts=[*setup.parts, team], team=team)

    def _team(self, job: Job, helpers: Helpers | None = None) -> Team:
        lore = GreedyLore(
            job.network,
            self.rank,
            period=self.period,
            start=self.start,
            rate=self.rate,
            carry=self.carry,
            seed=job.seed,
        )
        if helpers is None:
            return Team(job.network, lore, job.seed)
        return Team(job.network, lore, job.seed, helpers.failed)


def follow(payload: tuple[GreedyDistil, Job]) -> None:
    """Train beside the process that has sent a recipe and a job, until it says to stop."""
    recipe, job = payload
    job.network.to(job.device)
    with recipe.prepared_beside(job) as setup:
        try:
            loop_of(recipe, job, setup).follow()
        except DismissedError:
            return
