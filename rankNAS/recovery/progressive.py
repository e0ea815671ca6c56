"""Recipe ``progressive``: training at falling ranks, each network started from the last one.

The first member of the family has the factors of the given network, extended by what they lack of
the dense weights; the last one has the ranks of the given network. At the step from one to the
next, the product of trained factors is truncated exactly (`rankNAS.recovery.restart`). Between
members without training, this equals the truncation in one step; all gain comes from training, and
at equal steps in all the last rank gets fewer of them.

References:
    Hajimolahoseini et al., 2024, arXiv 2406.19995: progressive low-rank decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import nn

from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.paths import find, put
from rankNAS.recovery.products import LAYERS, Chain, chains, is_product
from rankNAS.recovery.recipe import Job
from rankNAS.recovery.restart import blocks_of, dense_blocks, extended, rebuilt, truncated

__all__ = ["Progressive", "chain_ranks", "falling_ranks"]


@final
@dataclass(frozen=True, kw_only=True)
class Progressive(Distil):
    """`Distil` of a family of networks with falling ranks; epochs and seconds are shared equally.

    Args:
        members: Networks of the family; the last one has the ranks of the given network.
        factor: The ranks of a member by those of the one before it. Layers of two factors take
            part; others keep their ranks.
    """

    name: ClassVar[str] = "progressive"
    members: int = 3
    factor: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("members", 1 <= self.members <= self.epochs, "from 1 to the epochs")
        self._require("factor", 0 < self.factor < 1, "in (0, 1)")

    @property
    def needs_dense(self) -> bool:
        return True

    @property
    def trainings(self) -> int:
        return self.members

    def config(self, job: Job) -> TrainingConfig:
        return replace(super().config(job), epochs=max(1, self.epochs // self.members))

    def courses(self, job: Job) -> Generator[Job]:
        last = chain_ranks(job.network)
        given = {path: job.network.get_submodule(path) for path in last}
        try:
            for number in range(self.members):
                self._restart(job, last, self.members - 1 - number)
                yield replace(job, checkpoint=job.checkpoint_of(number))
        except GeneratorExit:  # the ranks that the network had
            for path, module in given.items():
                put(job.network, job.network.get_submodule(path), module)
            raise

    def _restart(self, job: Job, last: Mapping[str, int], steps: int) -> None:
        """Give the network the ranks of the member so many steps before the last one."""
        assert job.dense is not None
        for chain in _two_factors(job):
            rank = falling_ranks(last[chain.path], self.factor, steps)
            _restart(job.network, chain, job.dense.get_submodule(chain.path), rank)


def chain_ranks(network: nn.Module) -> dict[str, int]:
    """By path, the ranks of the blocks of the layers of two factors."""
    return {c.path: blocks_of(c.stages)[1].shape[1] for c in _pairs(network)}


def falling_ranks(last: int, factor: float, steps: int) -> int:
    """The rank so many members before the last one.

    >>> [falling_ranks(16, 0.5, steps) for steps in (2, 1, 0)]
    [64, 32, 16]
    """
    return max(last, math.ceil(last / factor**steps - 1e-9))


def _two_factors(job: Job) -> list[Chain]:
    """The layers of two factors whose dense layer is known."""
    assert job.dense is not None
    return [c for c in _pairs(job.network) if isinstance(find(job.dense, c.path), LAYERS)]


def _pairs(network: nn.Module) -> list[Chain]:
    return [c for c in chains(network) if len(c.stages) == 2 and is_product(c.stages)]


@torch.no_grad()
def _restart(network: nn.Module, chain: Chain, dense: Any, rank: int) -> None:
    """Give a chain another rank: extended by its dense weight, or truncated."""
    U, V = blocks_of(chain.stages)
    W = dense_blocks(chain.stages, dense)
    rank = min(rank, *W.shape[1:])
    if rank == V.shape[1]:
        return
    factors = extended(U, V, W, rank) if rank > V.shape[1] else truncated(U, V, rank)
    put(network, network.get_submodule(chain.path), rebuilt(chain.stages, *factors))
