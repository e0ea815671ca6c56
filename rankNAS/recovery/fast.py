"""Recipe ``fast``: training on labels in a limit of seconds, as in a competition of ten minutes.

Every part has an option that leaves it out. The learning rate is that of all recipes; in the paper
it is piece-wise linear, and larger for biases. The published code applied SAM to one weight at a
time with the graph of the first pass; here it is the method of its authors. The code of the
virtual step was not published: here the gradients of one half of a batch follow a step of gradient
descent on the other half. The mean over mirrored images at test time would double the cost of the
network, so it is not part of the recipe.

References:
    arXiv 2309.03965, 2023: the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from rankNAS.recovery.distil import Distil
from rankNAS.recovery.gradients import Centralisation, Sharpness, VirtualStep
from rankNAS.recovery.parts import Part
from rankNAS.recovery.recipe import Job

__all__ = ["Fast"]


@final
@dataclass(frozen=True, kw_only=True)
class Fast(Distil):
    """A training within seconds.

    It learns from labels; without labels, or with ``distill`` above 0, from the dense network.

    Args:
        label_smoothing: Share of the label spread over all classes (Szegedy et al. 2016). Tasks
            without classes have none, nor have language models, whose perplexity it would raise.
        centralise: Whether the gradients of an output have the mean 0.
        sam: Radius of sharpness-aware minimisation; 0 leaves it out.
        sam_every: Of so many epochs, it acts in the last one, whose steps take twice the time.
        virtual: Whether the gradients of one half of a batch follow a virtual step on the other
            half. Then outputs of the dense network are not kept.
    """

    name: ClassVar[str] = "fast"
    epochs: int = 200
    seconds: float | None = 600.0
    distill: float = 0.0
    ema: float = 0.99
    label_smoothing: float = 0.1
    centralise: bool = True
    sam: float = 0.05
    sam_every: int = 6
    virtual: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._require("sam", 0 <= self.sam < float("inf"), "0 or more")
        self._require("sam_every", self.sam_every >= 1, "at least 1")

    def smoothing(self, job: Job) -> float:
        return 0.0 if job.language else self.label_smoothing

    def parts(self, job: Job) -> list[Part]:
        found: list[Part] = []
        if self.virtual:
            found.append(VirtualStep(job.network, self.clip))
        if self.sam:
            found.append(Sharpness(job.network, self.sam, self.sam_every))
        if self.centralise:
            found.append(Centralisation(job.network))
        return found + super().parts(job)
