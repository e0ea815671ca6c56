"""Latency profiler for the local device: per-stage timings, calibrated against whole networks.

1. A representative part of a space's stages is timed, and further stages as time allows.
   Stages are timed interleaved in randomised blocks; each stage appears in two blocks to separate
   machine drift from noise.
2. A Gaussian process (`StageRegression`) predicts all stages, with uncertainties.
3. The network is timed end to end, dense and under a few random allocations, with its
   normalisations and activations. Each layer is also timed inside the network: in-network cache
   state differs from isolated timing, which gives a factor per layer and operator
   (`in_network_factors`). A constant and two factors absorb the remaining difference to the
   end-to-end time (`NetworkFit`).

The network is timed between the stages throughout (`DriftMonitor`).

All measurements are kept in a file; profiling the same network again costs nothing.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.decompositions import LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.hw_models.base import Progress, StageModel
from rankNAS.hw_models.blocks import combined
from rankNAS.hw_models.networks import (
    Watch,
    batched,
    built,
    in_network_factors,
    place,
    random_allocations,
)
from rankNAS.hw_models.plan import general_shapes, network_key, stage_key, stages_of, thinned
from rankNAS.hw_models.profiles import Measurement, NetworkFit, Profile, Terms
from rankNAS.hw_models.regression import StageRegression, kind_of
from rankNAS.hw_models.timing import (
    DriftMonitor,
    interleaved,
    spread_of_median,
    waiting,
)
from rankNAS.io.files import cache_folder
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.trees import Inputs, to_device

__all__ = ["Host", "general_shapes"]

logger = logging.getLogger(__name__)
BLOCK = 16  # stages per interleaved block
DTYPES = {2: torch.float16, 4: torch.float32, 8: torch.float64}
LIMIT = 120.0  # seconds after which only required stages are timed
TURNS = 2  # blocks in which each stage is timed
FITTED = 500  # largest number of stages used to learn the kernel of the regression
MOST = 4000  # largest number of stages in the regression; those of the space come first
PULL = 0.1  # ridge weight of the network's factors towards 1, relative to one timing each


@final
@dataclass(frozen=True)
class Host(StageModel):
    """Latency on a device of this machine, random weights and inputs.

    Without `bind`, each stage is timed on request.

    Args:
        device: The device to measure.
        repeats: Number of interleaved rounds.
        seconds: Time limit for one stage; at least three rounds are timed.
        shapes: Number of stages of a space that are timed without a time limit. For a new space,
            further stages are timed up to a total of two minutes.
        general: Also time common shapes, so that the file suits other networks better.
        networks: Allocations under which the whole network is timed, besides the dense one.
        file: The file of the measurements; None for the cache folder.
        measures: Whether to measure what the file lacks; otherwise it is predicted.
        strict: Raise an error for kinds of layers that the file lacks, if not measuring.
        seed: Random seed of the allocations.
        profile: The measurements; set by `bind`.
        fitted: The regression fitted to them.
        fit: The end-to-end fit of the bound network.
        known: Cached predictions.
    """

    device: str = "cpu"
    repeats: int = 31
    seconds: float = 0.4
    shapes: int = 320
    general: bool = False
    networks: int = 24
    file: Path | None = None
    measures: bool = True
    strict: bool = False
    seed: int = 0
    name: str = "host"
    profile: Profile | None = field(default=None, compare=False, repr=False)
    fitted: StageRegression | None = field(default=None, compare=False, repr=False)
    fit: NetworkFit = field(default_factory=NetworkFit, compare=False, repr=False)
    known: dict[LayerShape, tuple[float, float]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @torch.no_grad()
    def bind(
        self,
        network: nn.Module | None,
        space: SearchSpace,
        inputs: Inputs | Tensor | None = None,
        on_progress: Progress | None = None,
    ) -> Host:
        wanted = list(dict.fromkeys(stage_key(s) for s in stages_of(space)))
        key, profile = network_key(space), self._profile()
        chosen = thinned(wanted, self.shapes) if self.measures else []
        if self.measures and self.general:
            chosen += general_shapes(space.batch_size)
        missing = [shape for shape in chosen if shape not in profile.stages]
        queue, whole = missing, None
        new = self.measures and key not in profile.networks
        if new and network is not None and inputs is not None:
            taken = {*chosen, *profile.stages}
            further = [shape for shape in wanted if shape not in taken]
            random.Random(self.seed).shuffle(further)
            queue = missing + further  # further stages only while time is left
            whole = self._whole(network, space, batched(inputs, space.batch_size))
        steps = TURNS * len(queue) + (0 if whole is None else len(whole.allocations))
        report = on_progress or (lambda done, total: None)
        report(0, steps)

        def on_share(share: float) -> None:
            if whole is not None:
                whole.pace.after(share)
            report(round(share * TURNS * len(queue)), steps)

        profile = self._with_stages(profile, queue, len(missing), on_share)
        model = self._regressed(profile, wanted)
        if whole is not None:
            profile = profile.with_network(key, model._fit_network(space, whole))
            self._keep(profile)
            report(steps, steps)
        fit = profile.networks.get(key, NetworkFit())
        return replace(model, profile=profile, fit=fit)

    def stage(self, shape: LayerShape) -> tuple[float, float]:
        key = stage_key(shape)
        if key not in self.known:
            if self.fitted is None:
                (found,) = self._measure([key])
                self.known[key] = found.seconds, found.sigma
            else:
                seconds, sigma = self.fitted.predict([key])
                self.known[key] = float(seconds[0]), float(sigma[0])
        return self.known[key]

    def latency(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        seconds, sigma = super().latency(layer, choice)
        factor = self.fit.dense if choice == DENSE else self.fit.decomposed
        factor *= self.fit.places.get(place(layer.name, choice), 1.0)
        return factor * seconds, factor * sigma

    def remainder_cost(self, space: SearchSpace) -> tuple[float, float]:
        """Latency in seconds outside the layers; the deviation is the residual of the model."""
        dense = sum(self.latency(layer, DENSE)[0] for layer in space.layers.values())
        return self.fit.remainder_cost, self.fit.residual * (dense + self.fit.remainder_cost)

    @property
    def path(self) -> Path:
        """The path of the measurements."""
        return self._path(Terms.here(torch.device(self.device)))

    def _profile(self) -> Profile:
        terms = Terms.here(torch.device(self.device))
        path = self._path(terms)
        if not os.path.exists(path):  # unlike Path.exists, it accepts any text
            if not self.measures:
                raise UsageError(f"device file {str(path)!r} does not exist.")
            return Profile(terms)
        try:
            profile = Profile.read(path)
        except UsageError as error:
            if self.file is not None:
                raise
            logger.warning("%s It is made again.", error)
            return Profile(terms)
        profile.check(terms, f"device file {str(path)!r}")
        return profile

    def _path(self, terms: Terms) -> Path:
        if self.file is not None:
            return self.file
        name = hashlib.sha256(repr(terms).encode()).hexdigest()[:16]
        return cache_folder() / "hardware" / f"host-{name}.json"

    def _keep(self, profile: Profile) -> None:
        try:
            profile.write(self._path(profile.terms))
        except OSError as error:
            if self.file is not None:
                raise
            logger.warning("the measurements could not be kept: %s", error)

    def _regressed(self, profile: Profile, wanted: Sequence[LayerShape]) -> Host:
        """A model with predictions for all wanted stages."""
        if not profile.stages:
            raise UsageError(f"device file {str(self.file)!r} has no measurements.")
        self._check_kinds(profile, wanted)
        seen = list(dict.fromkeys([*(s for s in wanted if s in profile.stages), *profile.stages]))
        seen = seen[:MOST]
        learned = set(thinned(seen, FITTED))
        rows = [profile.stages[s] for s in seen]
        fitted = StageRegression.fit(
            seen,
            [m.seconds for m in rows],
            [m.sigma for m in rows],
            [i for i, shape in enumerate(seen) if shape in learned],
        )
        seconds, sigma = fitted.predict(wanted)
        pairs = zip(seconds.tolist(), sigma.tolist(), strict=True)
        known = dict(zip(wanted, pairs, strict=True))
        return replace(self, profile=profile, fitted=fitted, known=known)

    def _check_kinds(self, profile: Profile, wanted: Sequence[LayerShape]) -> None:
        """Raise an error that names unseen kinds of layers and batch sizes."""
        seen = {kind_of(shape) for shape in profile.stages}
        unseen = sorted({kind_of(shape) for shape in wanted} - seen)
        sizes = {shape.calls[0][0] for shape in profile.stages}
        batches = sorted({shape.calls[0][0] for shape in wanted if shape.kernel} - sizes)
        problems = [f"layers of the kind {kind!r}" for kind in unseen]
        problems += [f"inputs at batch size {size}" for size in batches]
        if not problems:
            return
        text = f"the measurements have no {' and no '.join(problems)}"
        if self.strict or batches:
            raise UsageError(f"{text}; profile them, for example with `ranknas profile`.")
        logger.warning("%s; their times are extrapolated", text)

    def _with_stages(
        self,
        profile: Profile,
        queue: Sequence[LayerShape],
        needed: int,
        on_share: Callable[[float], object],
    ) -> Profile:
        """A profile with further stage times, saved as it grows; see `_in_blocks`."""
        blocks: list[dict[LayerShape, Measurement]] = []
        for found, share in self._in_blocks(queue, needed):
            blocks.append(found)
            if share <= 1 / TURNS:
                profile = profile.with_stages(found)
                self._keep(profile)
            on_share(share)
        if blocks:
            profile = profile.with_stages(combined(blocks))
            self._keep(profile)
        return profile

    def _in_blocks(
        self, queue: Sequence[LayerShape], needed: int
    ) -> Iterator[tuple[dict[LayerShape, Measurement], float]]:
        """Stage times of each block, and the share of the work that is done.

        The first `needed` stages are always timed, the others while time is left. All timed
        stages are then timed again in reshuffled blocks.
        """
        part = replace(self, repeats=math.ceil(self.repeats / TURNS), seconds=self.seconds / TURNS)
        begun = time.perf_counter()
        timed: dict[LayerShape, None] = {}
        for turn in range(TURNS):
            if turn:
                queue = list(timed)
                random.Random(self.seed + turn).shuffle(queue)
            for start in range(0, len(queue), BLOCK):
                spent = (time.perf_counter() - begun) / LIMIT * TURNS
                if not turn and start >= needed and spent > 1:
                    break
                shapes = queue[start : start + BLOCK]
                timed |= dict.fromkeys(shapes)
                done = (start + len(shapes)) / len(queue)
                share = min(1.0, done if turn else max(done, spent))
                found = dict(zip(shapes, part._measure(shapes), strict=True))
                yield found, (turn + share) / TURNS

    @torch.no_grad()  # `stage` also calls it
    def _measure(self, shapes: Sequence[LayerShape]) -> list[Measurement]:
        device = torch.device(self.device)
        runs = [waiting(_run(shape, device), device) for shape in shapes]
        times = interleaved(
            runs, rounds=self.repeats, seconds=self.seconds * len(shapes), seed=self.seed
        )
        medians, spread = np.median(times, axis=0).tolist(), spread_of_median(times).tolist()
        return [Measurement(m, s, len(times)) for m, s in zip(medians, spread, strict=True)]

    def _whole(self, network: nn.Module, space: SearchSpace, inputs: Inputs) -> _Whole:
        """The network under several allocations, for timing between the stages."""
        device = torch.device(self.device)
        x = to_device(inputs, device)
        allocations = [space.dense, *random_allocations(space, self.networks, self.seed)]
        networks = [built(network, allocation, x) for allocation in allocations]
        watched = [each.watching(space.layers.values()) for each in networks]
        runs: list[Callable[[], object]] = [waiting(each, device) for each in networks]
        # Long enough to reach a steady clock: processors run faster for the first seconds.
        seconds = 4 * self.seconds * len(networks)
        rounds = 20 * self.repeats
        pace = DriftMonitor([*runs, *watched], rounds=rounds, seconds=seconds, seed=self.seed)
        return _Whole(allocations, watched, pace)

    def _fit_network(self, space: SearchSpace, whole: _Whole) -> NetworkFit:
        """End-to-end fit: regress the network's times (dense first) on the times of its stages."""
        allocations = whole.allocations
        whole.pace.after(1.0)  # the remaining rounds
        times = whole.pace.seconds()[: len(allocations)]
        inside = [watch.seconds() for watch in whole.watched]
        found = in_network_factors(
            space, allocations, inside, lambda *at: StageModel.latency(self, *at)[0]
        )
        placed = replace(self, fit=NetworkFit(places=found))
        dense, decomposed = (np.zeros(len(allocations)) for _ in range(2))
        for k, allocation in enumerate(allocations):
            for name, choice in allocation.items():
                seconds, _ = placed.latency(space.layers[name], choice)
                part = dense if choice == DENSE else decomposed
                part[k] += seconds
        A = np.column_stack([np.ones(len(times)), dense, decomposed]) / times[:, None]
        pull = PULL * np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        target = np.concatenate([np.ones(len(times)), [PULL, PULL]])
        solved = lsq_linear(np.vstack([A, pull]), target, bounds=(0, np.inf)).x
        residual = float(np.std(A @ solved - 1))
        remainder_cost, factor, decomposed_factor = (float(v) for v in solved)
        return NetworkFit(
            remainder_cost,
            factor,
            decomposed_factor,
            residual,
            timed=float(times[0]),
            places=found,
        )


@dataclass(frozen=True)
class _Whole:
    """A network under several allocations: end-to-end runs first, then runs with layer times."""

    allocations: Sequence[Allocation]
    watched: Sequence[Watch]
    pace: DriftMonitor


def _run(shape: LayerShape, device: torch.device) -> Callable[[], object]:
    layer = shape.build("cpu").to(device, DTYPES.get(shape.itemsize, torch.float32)).eval()
    call = shape.calls[0]
    size = (call[0], shape.inputs, *call[1:]) if shape.kernel else (*call, shape.inputs)
    x = torch.randn(size).to(device, DTYPES.get(shape.itemsize, torch.float32))
    if x.dim() == 4:
        layer = layer.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    return lambda: layer(x)
