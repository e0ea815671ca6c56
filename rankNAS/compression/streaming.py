"""Statistics and factors block by block: the statistics of one block exist at a time.

The forward walk keeps the outputs of each block, which are the inputs of the next one. Without
gradients, it accumulates the second moments of a block's inputs on its way. For ``fisher`` the
gradients of the loss at the output of each block are carried from the last block to the first:
each block runs again from its kept inputs, with a graph, which gives the gradients at the outputs
of its layers and at its own input. The results are those of whole passes. With many batches, only
the first ones have gradients, as many as their moments need.

Reference: Chen et al., 2016 (arXiv 1604.06174): backward passes that recompute the forward pass
from kept activations.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rankNAS.compression.accumulators import MomentAccumulator
from rankNAS.compression.activations import ActivationCache
from rankNAS.compression.blocks import BlockChain, freed, graded, leaf
from rankNAS.compression.calibration import Recorder, calibrate, statistics_of
from rankNAS.compression.factor_store import FactorStore
from rankNAS.compression.factorisation import Factorisation, OneLayer
from rankNAS.compression.factors import LayerFactors
from rankNAS.copies import unchanged
from rankNAS.decompositions.norms import NormName, Statistics
from rankNAS.memory import give_back
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.tasks.base import Task
from rankNAS.tasks.feeding import InputBatches
from rankNAS.trees import floating_tensors, rows, tree_map

__all__ = [
    "TOKENS",
    "batches_of_positions",
    "exceeds",
    "factorise_streamed",
    "is_linear",
    "samples_at_once",
    "statistics_bytes",
]

logger = logging.getLogger(__name__)
TOKENS = 1024  # positions of a pass, at most, if samples are shorter
#: Positions with gradients for each output of the widest layer: a second moment of gradients needs
#: fewer than one of inputs, and a backward pass takes longer than a forward pass.
PER_ROW = 8
SHARE = 1 << 30  # bytes of the statistics of whole passes for some of the layers
Step = Callable[[int, int], None]


def factorise_streamed(
    space: SearchSpace,
    batches: InputBatches,
    task: Task,
    each: OneLayer,
    store: FactorStore,
    *,
    seed: int = 0,
    on_layer: Step | None = None,
    on_batch: Step | None = None,
    timed: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Factorisation:
    """The factors of every layer of a space, with bounded memory; see `factorise`.

    Layers whose factors are stored are not computed again. A model whose blocks cannot be run on
    their own takes several whole passes, each for the statistics of some of the layers.

    Args:
        space: The space.
        batches: The calibration inputs, a few samples each.
        task: Reads inputs and outputs.
        each: The model, the norm and the selection of choices.
        store: Takes the factors.
        seed: Random seed of the sampled targets.
        on_layer: Called with (layers done, layers in total).
        on_batch: Called with (batches done, batches in total) of all passes of blocks.
        timed: Called with ``factorise`` for a context of the time that is no calibration.

    Raises:
        WriteError: The disk is full; what is stored stays.
        RankNASError: The statistics are not finite.
    """
    layers: dict[str, LayerFactors] = {}
    for name, layer in space.layers.items():
        if (found := store.get(layer, each.model)) is not None:
            layers[name] = found
    missing = {name: layer for name, layer in space.layers.items() if name not in layers}
    if layers:
        logger.info("%d of %d layers are factorised already", len(layers), len(space.layers))

    def made(layer: Layer, known: Statistics | None) -> None:
        with timed("factorise"):
            layers[layer.name] = each.factorised(layer, known)
        if on_layer is not None:
            on_layer(len(layers), len(space.layers))

    if each.norm == "weight":  # needs no statistics
        for layer in missing.values():
            made(layer, None)
    elif missing:
        few = rows(batches[0], slice(0, 1), batches.sizes[0])
        with unchanged(each.model):
            chain = BlockChain.of(each.model, space.layers, few)
        if chain is None:
            _by_passes(each, space, missing, batches, task, seed, made, on_batch)
        else:
            cache = ActivationCache(store.folder.parent)
            graded = batches_of_positions(space, batches, PER_ROW * _widest(space))
            walk = _Walk(
                chain,
                space.layers,
                missing,
                batches,
                task,
                cache,
                seed,
                made,
                on_batch,
                each.norm,
                graded,
            )
            with unchanged(each.model):
                (walk.backward if each.norm == "fisher" else walk.forward)()
    each.degenerate.warn()
    return Factorisation.of(
        each.model, space, {name: layers[name] for name in space.layers}, store
    )


def statistics_bytes(layers: Mapping[str, Layer], norm: str) -> int:
    """The bytes of the statistics and the factors of all layers at once."""
    total = 0
    for layer in layers.values():
        n, o = layer.shape.width, layer.shape.outputs // layer.shape.groups
        sides = n * n + (o * o if norm == "fisher" else 0)
        families = {(c.operator, *c.rank[:-1]) for c in layer.choices[1:]}
        rank = n * o // (n + o)
        total += 8 * layer.shape.groups * (sides + len(families) * rank * (n + 2 * o + rank))
    return total


def samples_at_once(space: SearchSpace, most: int, tokens: int = TOKENS) -> int:
    """The number of samples of a pass, at most: so many that they have a number of positions.

    Convolutions have many positions, but no outputs as large as the logits of a position.
    """
    if not is_linear(space):
        return most
    return max(1, min(most, int(tokens / _positions(space))))


def batches_of_positions(space: SearchSpace, batches: InputBatches, wanted: float) -> int:
    """The number of batches with so many positions; all if they are fewer."""
    ends = itertools.accumulate(size * _positions(space) for size in batches.sizes)
    return next((i for i, end in enumerate(ends, 1) if end >= wanted), len(batches))


def _positions(space: SearchSpace) -> float:
    """The most positions of a layer in one sample."""
    calls = [call for layer in space.layers.values() for call in layer.shape.output_calls()]
    most = max((math.prod(call) for call in calls), default=1)
    return max(1.0, most / max(1, space.batch_size))


def _widest(space: SearchSpace) -> int:
    return max(layer.shape.outputs for layer in space.layers.values())


def exceeds(space: SearchSpace, norm: str, memory: int) -> bool:
    """Whether the statistics and the factors of linear layers alone need more than a memory."""
    return is_linear(space) and statistics_bytes(space.layers, norm) > memory


def is_linear(space: SearchSpace) -> bool:
    """Whether no layer is a convolution."""
    return not any(layer.shape.kernel for layer in space.layers.values())


@dataclass
class _Walk:
    """Walks through the blocks of a network, and the layers that are still to be factorised.

    Args:
        chain: The blocks.
        layers: All layers.
        missing: Those that are still to be factorised.
        batches: The inputs.
        task: Reads outputs.
        cache: Keeps what lies between two blocks.
        seed: Random seed of the sampled targets.
        made: Called with each layer and its statistics.
        on_batch: Called with (batches done, batches in total).
        norm: The norm; for ``pooled`` each batch is a group.
        graded: The number of batches that have gradients, the first ones.
    """

    chain: BlockChain
    layers: Mapping[str, Layer]
    missing: Mapping[str, Layer]
    batches: InputBatches
    task: Task
    cache: ActivationCache
    seed: int
    made: Callable[[Layer, Statistics], None]
    on_batch: Step | None
    norm: NormName = "input"
    graded: int = 0
    _sums: dict[str, MomentAccumulator] = field(default_factory=dict)  # of the current block
    _shapes: list[list[Any]] = field(default_factory=list)  # by batch, the freed outputs
    _done: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._shapes = [[] for _ in self.batches]

    def forward(self) -> None:
        """Moments of the inputs alone, up to the last block with a missing layer."""
        last = max(number for number in range(len(self.chain)) if self._wanted(number))
        for number in range(last + 1):
            with self._summed(number, gradients=False) as recorder:
                for i in range(len(self.batches)):
                    with recorder.counting(self.batches.mask(i)):
                        self._advance(number, i, keep=number < last)
                    for found in self._sums.values() if self.norm == "pooled" else ():
                        found.close_group()
                    self._report(last + 1)
                    self.cache.drop((number - 1, i))

    def backward(self) -> None:
        """Moments of the inputs and of the gradients, from the last block to the first one."""
        count = len(self.chain)
        first = min(number for number in range(count) if self._wanted(number))
        for number in range(count - 1):
            for i in range(len(self.batches)):
                self._advance(number, i, keep=True)
                self._report(2 * count - 1 - first)
        for number in reversed(range(first, count)):
            with self._summed(number, gradients=True) as recorder:
                for i in range(len(self.batches)):
                    if i < self.graded:
                        self._return(recorder, number, i, first)
                    else:
                        with recorder.counting(self.batches.mask(i)):
                            self._advance(number, i, keep=False)
                        self.cache.drop((number - 1, i))
                    self._report(2 * count - 1 - first)

    @torch.no_grad()
    def _advance(self, number: int, i: int, *, keep: bool) -> None:
        """Run a block on a batch and keep its output."""
        output = self.chain.run(number, self.batches[i], self._before(number, i))
        if keep:
            self.cache.put((number, i), output)
            self._shapes[i].append(tree_map(freed, output))

    def _return(self, recorder: Recorder, number: int, i: int, first: int) -> None:
        """Run a block on a batch with a graph; carry the gradients back to the block before."""
        before, whole = self._before(number, i), number == len(self.chain) - 1
        starts: list[Tensor] = []
        if number > first:
            before[-1] = tree_map(leaf, before[-1])
            starts = floating_tensors(before[-1])
        with recorder.counting(self.batches.mask(i), gradients=True):
            with self.task.compact(self.chain.network) if whole else nullcontext():
                output = self.chain.run(number, self.batches[i], before, whole=whole)
            if whole:
                ends, given = [recorder.loss(output, self.batches.batch(i))], None
            else:
                ends, given = graded(output, self.cache.get(("g", number, i)))
            del output
            found = recorder.backward(ends, given, starts) if ends else []
        self.cache.drop(("g", number, i))
        self.cache.drop((number - 1, i))
        if number > first:
            self.cache.put(("g", number - 1, i), found)

    def _before(self, number: int, i: int) -> list[Any]:
        """The outputs of the blocks before one, of which only the last has values."""
        if not number:
            return []
        return [*self._shapes[i][: number - 1], self.cache.get((number - 1, i))]

    def _wanted(self, number: int) -> list[list[str]]:
        """The missing layers of a block by site; all of its experts, if one is missing."""
        sites = self.chain.sites[number]
        names = {name for site in sites for name in site if name in self.missing}
        experts = {name for site in sites for name in site if "expert" in self.layers[name].roles}
        if names & experts:  # the statistics of an expert depend on those of the others
            names |= experts
        found = ([name for name in site if name in names] for site in sites)
        return [site for site in found if site]

    @contextmanager
    def _summed(self, number: int, *, gradients: bool) -> Iterator[Recorder]:
        """Context in which the missing layers of a block are recorded; it ends with their factors.

        The layers of a site share the moments of their inputs.
        """
        sums = self._sums = {}
        for leader, *others in self._wanted(number):
            layer = self.layers[leader]
            absolute = self.norm == "asvd"
            sums[leader] = MomentAccumulator(layer, self._generator, absolute=absolute)
            for name in others:
                layer = self.layers[name]
                sums[name] = MomentAccumulator(layer, self._generator, sums[leader])
        layers = {name: self.layers[name] for name in sums}
        recorder = Recorder(layers, sums, self.task, self._generator)
        with recorder.recording(self.chain.network, gradients=gradients):
            yield recorder
        experts = {name: sums.pop(name) for name in layers if "expert" in layers[name].roles}
        for name in list(sums):  # one after another, as these are large
            known = statistics_of({name: sums.pop(name)}, layers)
            self.made(layers[name], known[name])
        for name, statistics in statistics_of(experts, layers).items():
            if name in self.missing:
                self.made(layers[name], statistics)
        give_back()

    def _report(self, walks: int) -> None:
        self._done += 1
        if self.on_batch is not None:
            self.on_batch(self._done, walks * len(self.batches))


def _by_passes(
    each: OneLayer,
    space: SearchSpace,
    missing: Mapping[str, Layer],
    batches: InputBatches,
    task: Task,
    seed: int,
    made: Callable[[Layer, Statistics], None],
    on_batch: Step | None,
) -> None:
    """Statistics from whole passes, each for as many layers as the memory allows."""
    groups = list(_groups(missing, each.norm))
    logger.warning(
        "the blocks of %s cannot be run on their own, so the statistics take %d passes over the "
        "whole model instead of one.",
        type(each.model).__name__,
        len(groups),
    )
    for group in groups:
        part = replace(space, layers=group)
        found = calibrate(
            each.model, part, batches, task, norm=each.norm, seed=seed, on_batch=on_batch
        )
        for name, layer in group.items():
            made(layer, found.pop(name))


def _groups(layers: Mapping[str, Layer], norm: str) -> Iterator[dict[str, Layer]]:
    """Consecutive layers whose statistics fit into the memory, at least one."""
    group: dict[str, Layer] = {}
    for name, layer in layers.items():
        if group and statistics_bytes({**group, name: layer}, norm) > SHARE:
            yield group
            group = {}
        group[name] = layer
    yield group
