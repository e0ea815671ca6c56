"""Recipe ``lora``: adapters on the factors are trained, with the loss of ``distil``, and merged.

Gradients and the optimiser's state are small, so that large transformers can be trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import nn

from rankNAS.compression.batch_norm import has_batch_norm
from rankNAS.recovery.adapters import adapted
from rankNAS.recovery.distil import BatchNorms, Distil
from rankNAS.recovery.parts import Average, Part
from rankNAS.recovery.recipe import Job, Setup

__all__ = ["Lora"]


@final
@dataclass(frozen=True, kw_only=True)
class Lora(Distil):
    """Low-rank adapters on the factors.

    Args:
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
        targets: ``factors``, or ``all`` for linear layers and convolutions that are no factors,
            too. A network without factors has adapters on all layers.
        vectors: Whether biases and norms are trained, too; those of 16 bits are not.
        gradient_checkpointing: Compute activations again in the backward pass, where the network
            offers it: slower, in less memory.
    """

    name: ClassVar[str] = "lora"
    trains_weights: ClassVar[bool] = False
    epochs: int = 3
    decay: float = 0.0
    ema: float = 0.0
    rank: int = 8
    alpha: float = 16.0
    targets: Literal["factors", "all"] = "factors"
    vectors: bool = True
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("rank", self.rank >= 1, "at least 1")
        self._require("alpha", 0 < self.alpha < float("inf"), "above 0")
        self._require("targets", self.targets in ("factors", "all"), "factors or all")

    def default_rate(self, optimizer: str, job: Job) -> float:
        return 1e-3 if optimizer == "adamw" else 0.03

    @contextmanager
    def prepared(self, job: Job) -> Iterator[Setup]:
        with ExitStack() as stack:
            if self.gradient_checkpointing:
                stack.enter_context(_checkpointing(job.network))
            loss, variants = self.loss(job, stack)
            adapters = stack.enter_context(
                adapted(
                    job.network,
                    self.rank,
                    self.alpha / self.rank,
                    job.seed,
                    every=self.targets == "all",
                    vectors=self.vectors,
                )
            )
            yield Setup(loss, [adapters, *self.parts(job)], variants)

    def parts(self, job: Job) -> list[Part]:
        found: list[Part] = []
        if self.ema:
            found.append(Average(job.network, self.ema))
        if has_batch_norm(job.network):
            found.append(BatchNorms(job))
        return found


@contextmanager
def _checkpointing(network: nn.Module) -> Iterator[None]:
    """Context with gradient checkpoints, if the network is a transformer that offers them."""
    if not getattr(network, "supports_gradient_checkpointing", False):
        yield
        return
    # The name of the methods from version 5 of transformers on, or the earlier one.
    newer = hasattr(network, "activation_checkpointing_enable")
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    # Frozen embeddings give re-entrant checkpoints no input with a gradient.
    getattr(network, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(network, f"{name}_disable")()
