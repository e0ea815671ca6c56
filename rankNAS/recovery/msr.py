"""Recipes ``msr`` and ``prehab``: spectra are pressed low before they are truncated.

The first half of the epochs trains the dense weights under a penalty on their singular values, for
the ranks of the given network. Then the trained weights are truncated to these ranks, and the
second half trains the factors. With ``--strategy beam`` this is the whole method of BSR, but for
the truncation, which is that of whitened weights here: it is better where a short training leaves
a tail. Prehab penalises the stable rank of whitened weights, which knows no target rank.

References:
    Eo, Kang and Rhee, Neural Networks 2023 (BSR): the modified stable rank. The published formula
    was not available; see `rankNAS.decompositions.stable_rank`.
    Qin et al., 2025, arXiv 2512.01980: low-rank prehab, a penalty in the whitened space.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from rankNAS.decompositions.stable_rank import modified_stable_rank, stable_rank
from rankNAS.exceptions import UsageError
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.parts import Part
from rankNAS.recovery.paths import find, put
from rankNAS.recovery.products import LAYERS, chains, is_product
from rankNAS.recovery.recipe import Job, Setup
from rankNAS.recovery.spectra import Moment, truncated_chain, unfoldings, whitenable
from rankNAS.tasks.feeding import input_batches

__all__ = ["Msr", "Prehab", "SpectralPenalty"]

WHITENED = 512  # samples of which the second moments are taken
PENALTIES = ("msr", "stable")


@dataclass(frozen=True, kw_only=True)
class Msr(Distil):
    """Training under the modified stable rank, truncation, and `Distil` of the factors.

    Args:
        strength: Coefficient of the penalty, which is summed over the layers.
        penalty: ``msr``, the modified stable rank for the ranks of the given network, or
            ``stable``, the stable rank.
        exponent: Of the singular values in the modified stable rank, 1 or 2.
        whiten: Whether the penalty's singular values are those of the weights times a square root
            of the second moment of their inputs, except in chains of three factors.
        refresh: Steps between two computations of the penalty's gradient.
    """

    name: ClassVar[str] = "msr"
    strength: float = 0.1
    penalty: Literal["msr", "stable"] = "msr"
    exponent: int = 1
    whiten: bool = False
    refresh: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("epochs", self.epochs >= 2, "at least 2, as there are two trainings")
        self._require("strength", 0 < self.strength < float("inf"), "above 0")
        self._require("penalty", self.penalty in PENALTIES, " or ".join(PENALTIES))
        self._require("exponent", self.exponent in (1, 2), "1 or 2")
        self._require("refresh", self.refresh >= 1, "at least 1")

    @property
    def needs_dense(self) -> bool:
        return True

    @property
    def trainings(self) -> int:
        return 2

    def config(self, job: Job) -> TrainingConfig:
        return replace(super().config(job), epochs=max(1, self.epochs // 2))

    def courses(self, job: Job) -> Generator[Job]:
        layers = decomposed(job)
        if not layers:
            raise UsageError(
                f"recipe {self.name!r} found no decomposed layer whose dense layer is known; give "
                "a compressed network and the network that was compressed."
            )
        given = {path: job.network.get_submodule(path) for path in layers}
        kept = {name: x.detach().clone() for name, x in job.network.state_dict().items()}
        try:
            take_dense(job, layers)
            yield _dense_job(job, layers)
            roots = input_roots(job, layers)
            for path, stages in layers.items():
                dense = job.network.get_submodule(path)
                put(job.network, dense, truncated_chain(stages, dense, roots.get(path)))
            yield replace(job, checkpoint=job.checkpoint_of(1))
        except GeneratorExit:  # the form and the weights that the network had
            for path, module in given.items():
                put(job.network, job.network.get_submodule(path), module)
            job.network.load_state_dict(kept)
            raise

    @contextmanager
    def prepared(self, job: Job) -> Iterator[Setup]:
        with super().prepared(job) as setup:
            parts = list(setup.parts)
            if isinstance(job, DenseJob):
                roots = input_roots(job, job.layers) if self.whiten else {}
                parts.append(SpectralPenalty(self, job.network, job.layers, roots))
            yield Setup(setup.loss, parts, setup.variants)


@dataclass(frozen=True, kw_only=True)
class Prehab(Msr):
    """`Msr` with the stable rank of whitened weights."""

    name: ClassVar[str] = "prehab"
    penalty: Literal["msr", "stable"] = "stable"
    whiten: bool = True


@dataclass(frozen=True)
class DenseJob(Job):
    """The training of the dense weights, with the stages of the chains that they will become.

    Args:
        layers: Stages by path.
    """

    layers: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@final
class SpectralPenalty(Part):
    """Adds the gradient of a penalty on singular values, which is computed every few steps.

    Args:
        recipe: Its options.
        network: The network, with dense layers.
        layers: The stages of the chains that they will become, by path.
        roots: By path, a square root of the second moment of the inputs, where there is one.
    """

    def __init__(
        self,
        recipe: Msr,
        network: nn.Module,
        layers: Mapping[str, Sequence[Any]],
        roots: Mapping[str, Tensor],
    ) -> None:
        self.recipe, self.layers, self.roots = recipe, layers, roots
        self.dense: dict[str, Any] = {path: network.get_submodule(path) for path in layers}
        self._gradients: dict[str, Tensor] = {}

    def begin_epoch(self, number: int) -> None:
        self._gradients = {}

    def before_step(self, rate: float) -> None:
        if not self._gradients:
            self._gradients = {path: self.gradient(path) for path in self.layers}
        for path, gradient in self._gradients.items():
            weight = self.dense[path].weight
            if weight.grad is not None:
                weight.grad.add_(gradient, alpha=self.recipe.strength)

    def after_step(self, step: int) -> None:
        if (step + 1) % self.recipe.refresh == 0:
            self._gradients = {}

    def gradient(self, path: str) -> Tensor:
        """The gradient of a layer's penalty for its weight."""
        dense = self.dense[path]
        with torch.enable_grad():
            found: Tensor = torch.autograd.grad(self.of(path), dense.weight)[0]
        return found

    def of(self, path: str) -> Tensor:
        """The penalty of a layer: the mean over its unfoldings and blocks."""
        root, values = self.roots.get(path), []
        for W, rank in unfoldings(self.layers[path], self.dense[path]):
            W = W.float() if root is None else W.float() @ root.float()
            if self.recipe.penalty == "stable":
                values.append(stable_rank(W).mean())
            elif rank < min(W.shape[1:]):
                values.append(modified_stable_rank(W, rank, self.recipe.exponent).mean())
        if not values:
            zero: Tensor = 0.0 * self.dense[path].weight.sum()
            return zero
        return torch.stack(values).mean()


def decomposed(job: Job) -> dict[str, tuple[Any, ...]]:
    """By path, the stages of the decomposed layers whose dense layer is known."""
    assert job.dense is not None
    return {
        c.path: c.stages
        for c in chains(job.network)
        if is_product(c.stages) and isinstance(find(job.dense, c.path), LAYERS)
    }


@torch.no_grad()
def take_dense(job: Job, layers: Mapping[str, Any]) -> None:
    """Give the network the layers of the dense network, and its weights elsewhere."""
    assert job.dense is not None
    for path in layers:
        dense = copy.deepcopy(job.dense.get_submodule(path)).requires_grad_(True)
        put(job.network, job.network.get_submodule(path), dense)
    wanted = job.dense.state_dict()
    for name, tensor in job.network.state_dict().items():
        if name in wanted and wanted[name].shape == tensor.shape:
            tensor.copy_(wanted[name])


def input_roots(job: Job, layers: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """By path, a square root of the second moment of a dense layer's inputs, where it is known."""
    modules = {path: job.network.get_submodule(path) for path in layers}
    moments = {p: Moment(stages[0]) for p, stages in layers.items() if whitenable(stages)}
    hooks = [
        modules[path].register_forward_pre_hook(lambda _, args, m=moment: m.add(args[0]))
        for path, moment in moments.items()
    ]
    samples = job.data.subsample(WHITENED, job.seed)
    job.network.eval()
    try:
        with torch.no_grad():
            for inputs in input_batches(samples, 128, task=job.task, device=job.device):
                inputs.run(job.network)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: moment.root() for path, moment in moments.items()}


def _dense_job(job: Job, layers: Mapping[str, Sequence[Any]]) -> DenseJob:
    given = {f.name: getattr(job, f.name) for f in fields(Job)}
    return DenseJob(**(given | {"checkpoint": job.checkpoint_of(0)}), layers=layers)
