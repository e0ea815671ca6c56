"""Refinement of a network in files: each block of a walk is refitted, refined, and walked through.

The factors of a block learn the outputs of the dense block from the inputs that the compressed
blocks before it give, as in `rankNAS.recovery.refinement`. One block is in memory at a time, with
its weights, their gradients and the moments of Adam in single precision. What lies between two
blocks is kept by the walk, beyond a bound in files. A block whose error on held-out samples does
not fall keeps its refitted factors. The weights of each block go to the store as they are made, so
that a refinement that was killed goes on with the next block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.activations import ActivationCache
from rankNAS.compression.block_refit import BlockRefit
from rankNAS.compression.blocks import BlockChain
from rankNAS.compression.factor_store import FactorStore, take_parameters
from rankNAS.compression.factors import LayerFactors
from rankNAS.compression.paired_walk import PairedWalk
from rankNAS.copies import copied, evaluating
from rankNAS.data.samples import Samples, permutation
from rankNAS.data.sizes import affordable_samples
from rankNAS.deadline import check_time
from rankNAS.decompositions.layer_view import LayerView
from rankNAS.io.fingerprints import fingerprint
from rankNAS.recovery.block_descent import BlockDescent, held_out
from rankNAS.recovery.block_gradients import chain_gradients
from rankNAS.recovery.block_losses import ChannelLoss
from rankNAS.recovery.blocks import main_tensor
from rankNAS.recovery.config import Refinement
from rankNAS.recovery.precision import widen_arguments
from rankNAS.tasks.base import Task, at_least_float32
from rankNAS.tasks.feeding import InputBatches
from rankNAS.trees import count_bytes, named_tensors

__all__ = ["StreamedRefinement", "refine_streamed"]

logger = logging.getLogger(__name__)
VERSION = 1  # of the method, in the names of files
MEMORY = (
    2 << 30
)  # bytes of what lies between two blocks in both networks; beyond it, fewer samples
PER_CHANNEL = 16  # positions with gradients for each channel of the outputs of blocks


def refine_streamed(
    network: nn.Module,
    refit: BlockRefit,
    allocation: Allocation,
    data: Samples,
    task: Task,
    config: Refinement,
    *,
    fit: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int], object] | None = None,
) -> nn.Module:
    """The network of an allocation whose blocks are refitted and refined in one walk.

    Args:
        network: The network without refinement.
        refit: The refits of its factorisation.
        allocation: One choice for each layer.
        data: Samples to draw from; their labels are not read.
        task: Reads batches and outputs.
        config: The configuration; a block of the walk is trained alone, whatever `blocks` is.
        fit: Whether blocks are refitted before.
        seed: Random seed of the samples and of their order.
        device: Where to run.
        on_step: Called with the steps done and the steps in all.

    Returns:
        The refined network; `network` if it is as close to the dense one on held-out samples.
    """
    batches = _batches(refit.chain, data, task, config, seed, device)
    if batches is None:
        logger.warning("the network is not refined: two batches are needed, and there is one.")
        return network
    work = StreamedRefinement(refit, batches, task, config, seed, on_step)
    refitted = refit.factors(allocation, then=work, fit=fit)
    refined = refitted.materialise(allocation).to(device).eval()
    for path, parameters in work.parameters.items():
        take_parameters(refined.get_submodule(path), parameters)
    before, after = (
        _divergence(x, refit.chain.network, batches, task) for x in (network, refined)
    )
    logger.info("refinement: divergence %.5g before, %.5g after, held out", before, after)
    if after < before:
        return refined
    logger.warning("the refinement is not kept: it does not help on held-out samples.")
    return network


class StreamedRefinement:
    """What a walk does with each block: `EachBlock`.

    Args:
        refit: The refits.
        batches: The inputs; the first ones are held out.
        task: Reads batches and outputs.
        config: The configuration.
        seed: The random seed.
        on_step: Called with the steps done and the steps in all.

    Attributes:
        parameters: By path of a block, its refined parameters, in mapped files.
    """

    def __init__(
        self,
        refit: BlockRefit,
        batches: InputBatches,
        task: Task,
        config: Refinement,
        seed: int = 0,
        on_step: Callable[[int, int], object] | None = None,
    ) -> None:
        self.batches, self._task, self._seed = batches, task, seed
        self._chain, self._store = refit.chain, refit.store
        self._descent = BlockDescent(batches.sizes, config, seed, len(refit.chain), on_step)
        self.parameters: dict[str, dict[str, Tensor]] = {}
        dense = refit.chain.network
        paths = {id(module): path for path, module in dense.named_modules()}
        self._paths = [paths[id(block)] for block in refit.chain.blocks]
        # A layer alone, such as the head, has been fitted already.
        self._alone = {name for sites in refit.chain.sites for names in sites for name in names}
        inputs = {f"{i} {n}": x for i, b in enumerate(batches) for n, x in named_tensors(b)}
        self.key = fingerprint(inputs, f"{VERSION} {config} {seed} {batches.sizes}")

    def is_done(self, store: FactorStore) -> bool:
        """Whether a store has the parameters of every block."""
        for path in self._paths:
            if path in self._alone:
                continue
            if (known := store.parameters(path)) is None:
                return False
            self.parameters[path] = known
        return True

    def work(
        self,
        walk: PairedWalk,
        number: int,
        layers: Mapping[str, LayerFactors],
        allocation: Mapping[str, Choice],
        store: FactorStore,
    ) -> None:
        """Refine a block, or take its stored parameters, and exchange it."""
        check_time()
        path = self._paths[number]
        if path in self._alone:
            return
        known = store.parameters(path)
        own = {n: x for n, x in layers.items() if _is_inside(x, path)}
        place = partial(_placed, walk, path, walk.network.get_submodule(path))
        if known is None:
            trained = self._trained(walk, number, place(own, allocation, precise=True))
            block = place(own, allocation, precise=False)
            types = {name: p.dtype for name, p in block.named_parameters()}
            known = store.put_parameters(
                path, {name: x.to(types[name]) for name, x in trained.items()}
            )
            del trained
        else:
            block = place(own, allocation, precise=False)
            self._descent.report((number + 1) * self._descent.config.steps)
        take_parameters(block, known)
        self.parameters[path] = known

    def _trained(self, walk: PairedWalk, number: int, block: nn.Module) -> dict[str, Tensor]:
        """The parameters of a block that is trained in place."""
        walk.network.requires_grad_(False)
        kept = self._kept(number)
        own = {n: p for n, p in block.named_parameters() if n not in kept}
        first = self._descent.held_out
        targets = _Targets(walk, number, range(first, len(self.batches)))
        loss = ChannelLoss(targets, self._gradients[number], self.batches)
        handle = block.register_forward_pre_hook(widen_arguments, with_kwargs=True)
        mixed = _mixed(self._chain.blocks[number])

        def error(i: int) -> Tensor:
            with mixed():
                output = walk.run(number, i)
            return loss(output, _target(walk, number, i), i)

        try:
            self._descent.improve(number, self._paths[number], list(own.values()), error)
        finally:
            handle.remove()
        return {name: p.detach() for name, p in own.items()}

    def _kept(self, number: int) -> set[str]:
        """The parameters of a dense block that are frozen, or that other modules use too."""
        block = self._chain.blocks[number]
        inside = set(map(id, block.modules()))
        outside = {
            id(p)
            for module in self._chain.network.modules()
            if id(module) not in inside
            for p in module.parameters(recurse=False)
        }
        return {
            name
            for name, p in block.named_parameters()
            if id(p) in outside or not p.requires_grad or not p.is_floating_point()
        }

    @cached_property
    def _gradients(self) -> list[Tensor | None]:
        """The second moments of the gradients at the outputs of the blocks, from a file."""
        name = f"gradients {self.key}"
        if (known := self._store.parameters(name)) is None:
            some = range(self._descent.held_out, len(self.batches))[: self._graded]
            cache = ActivationCache(self._store.folder.parent)
            found = chain_gradients(self._chain, self.batches, some, self._task, cache, self._seed)
            moments = {str(i): x for i, x in enumerate(found) if x is not None}
            known = self._store.put_parameters(name, moments)
        return [known.get(str(i)) for i in range(len(self._chain))]

    @property
    def _graded(self) -> int:
        """The number of batches that have gradients."""
        with torch.no_grad():
            output = main_tensor(self._chain.run(0, self.batches[0], []))
        assert output is not None
        channels = output.shape[-1]
        return math.ceil(PER_CHANNEL * channels / max(1, output.numel() // channels))


def _placed(
    walk: PairedWalk,
    path: str,
    original: nn.Module,
    layers: Mapping[str, LayerFactors],
    allocation: Mapping[str, Choice],
    *,
    precise: bool,
) -> nn.Module:
    """A copy of a block with its own weights, in the place of the block in the walk's network.

    Args:
        walk: The walk.
        path: The path of the block.
        original: The block as the refit has left it.
        layers: The refitted factors of its layers.
        allocation: The choices.
        precise: Whether all weights are in single precision, instead of the network's types.
    """
    thin = {name: x for name, x in layers.items() if allocation[name] != DENSE}
    memo: dict[int, Any] = {
        id(original.get_submodule(p.removeprefix(f"{path}."))): nn.Identity()
        for x in thin.values()
        for p in x.layer.paths
    }
    block = copied(original, memo)
    LayerView(walk.network, [path]).replace(block)
    for name, found in thin.items():
        choice = allocation[name]
        dtype = torch.float32 if precise else found.weight.dtype
        module = found.factors[choice.operator].truncate(choice.rank, found.bias_of(choice), dtype)
        LayerView(walk.network, found.layer.paths).replace(module.to(found.weight.device))
    if precise:
        block.float()
    walk.renew()
    return block.eval()


def _mixed(dense: nn.Module) -> Callable[[], AbstractContextManager[object]]:
    """Contexts of products in bfloat16, if that is the type of a dense block."""
    weight = next((p for p in dense.parameters() if p.is_floating_point()), None)
    if weight is None or weight.dtype != torch.bfloat16:
        return nullcontext
    return partial(torch.autocast, weight.device.type, torch.bfloat16)


def _is_inside(found: LayerFactors, path: str) -> bool:
    return all(p.startswith(f"{path}.") for p in found.layer.paths)


def _target(walk: PairedWalk, number: int, i: int) -> Tensor:
    """The main output of a dense block."""
    found = main_tensor(walk.output(number, i))
    assert found is not None
    return at_least_float32(found)


class _Targets(Sequence[Tensor]):
    """The main outputs of a dense block for some of the inputs, read when they are needed."""

    def __init__(self, walk: PairedWalk, number: int, numbers: range) -> None:
        self._walk, self._number, self._numbers = walk, number, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, i: int) -> Tensor: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, i: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(i, slice):
            return _Targets(self._walk, self._number, self._numbers[i])
        return _target(self._walk, self._number, self._numbers[i])

    def __iter__(self) -> Iterator[Tensor]:
        return (_target(self._walk, self._number, i) for i in self._numbers)


def _batches(
    chain: BlockChain,
    data: Samples,
    task: Task,
    config: Refinement,
    seed: int,
    device: torch.device | str,
) -> InputBatches | None:
    """The inputs of a refinement, so many as its steps use and the disk should hold."""
    few = task.inputs_of(data.example(1, device))
    with torch.no_grad():
        each = max(1, count_bytes(chain.run(0, few, [])))
    count = min(config.samples, len(data))
    size = affordable_samples(max(1, min(config.batch_size, count // 2)), data)
    used = size * (config.steps + held_out(config.steps))
    count = min(count, used, max(2 * size, MEMORY // (2 * each)))
    some = data.take(permutation(len(data), seed)[:count])
    batches = some.batched(size, device=device)
    return InputBatches(batches, task) if len(batches) > 1 else None


@torch.no_grad()
def _divergence(network: nn.Module, dense: nn.Module, batches: InputBatches, task: Task) -> float:
    """The mean divergence of a network from the dense one over the held-out batches."""
    total, numbers = 0.0, range(held_out(len(batches)))
    with evaluating(network), evaluating(dense):
        for i in numbers:
            predictions = []
            for model in (network, dense):
                with task.compact(model):
                    predictions.append(task.predict(batches[i].run(model), batches.batch(i)))
            found, expected = predictions
            total += float(found.distillation(expected)) * batches.sizes[i]
    total /= sum(batches.sizes[i] for i in numbers)
    return total if math.isfinite(total) else math.inf
