"""GreedyLore: low-rank gradients with error feedback, as a hook of DistributedDataParallel.

::

    ddp = torch.nn.parallel.DistributedDataParallel(network)
    ddp.register_comm_hook(GreedyLore(network, rank=8), greedylore_hook)

All workers must run the same version of torch on machines of one kind: the basis is computed by
each of them from equal numbers. The workers exchange in turn, without other threads, because
their exchanges must have one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankNAS.exceptions import UsageError
from rankNAS.recovery.greedy_projection import Projection, is_worth_while

__all__ = ["GreedyLore", "greedylore_hook"]


@final
class GreedyLore:
    """The state of a worker: its bases, its errors, and the bytes that it has sent.

    Biases and other vectors, embeddings and the skipped layers are sent whole, and so is what
    compression makes too little smaller.

    Args:
        network: The network, or the `DistributedDataParallel` of it.
        rank: Directions of each gradient that are sent.
        period: Steps after which all gradients are sent whole once, to find new bases.
        start: First steps in which all gradients are sent whole, without a basis.
        rate: A gradient is compressed if that makes it more than so many times smaller.
        carry: Whether errors are added to the whole gradients of a refresh. Otherwise the refresh
            drops them.
        skip: Paths of layers that are sent whole; the last linear layer by default.
        seed: The random seed of the probes, equal for all workers.
        group: The process group; the default one if None.

    Attributes:
        step: The number of the step, from 0.
        sent: Bytes that this worker has given to the exchange so far.
        plain: Bytes that it would have given without compression.

    Raises:
        UsageError: An option is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int = 8,
        *,
        period: int = 200,
        start: int = 0,
        rate: float = 2.0,
        carry: bool = False,
        skip: Sequence[str] | None = None,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if rank < 1 or period < 1 or start < 0 or not rate > 0:
            raise UsageError(
                f"GreedyLore takes a rank and a period of at least 1, a start of 0 or more and a "
                f"rate above 0, got {rank}, {period}, {start} and {rate:g}."
            )
        self.rank, self.period, self.start, self.carry = rank, period, start, carry
        self.seed, self.group = seed, group
        self.step, self.sent, self.plain = 0, 0, 0
        whole = _sent_whole(network, skip)
        self._numbers = {id(p): n for n, p in enumerate(network.parameters())}
        self._projections: dict[int, Projection] = {
            number: Projection(p.shape, rank)
            for number, p in enumerate(network.parameters())
            if p.requires_grad and id(p) not in whole and is_worth_while(p.shape, rank, rate)
        }

    def exchange(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their means over all workers, or by approximations of the means.

        Args:
            parameters: Some parameters of the network, the same ones for all workers.
            gradients: Their gradients, which are changed in place.
        """
        whole, fresh, pressed = [], [], []
        refreshes = self.step >= self.start and not (self.step - self.start) % self.period
        for parameter, gradient in zip(parameters, gradients, strict=True):
            self.plain += gradient.nbytes
            number = self._numbers[id(parameter)]
            projection = self._projections.get(number)
            if projection is not None and projection.basis is not None and not refreshes:
                pressed.append((number, projection, gradient))
                continue
            if projection is not None and refreshes:
                if self.carry:
                    gradient.copy_(projection.with_error(gradient))
                fresh.append((projection, gradient))
            whole.append(gradient)
        for gradient, mean in zip(whole, self._means(whole), strict=True):
            gradient.copy_(mean)
        for projection, gradient in fresh:
            projection.refresh(gradient)
        self._compressed(pressed)

    def state_dict(self) -> dict[str, Any]:
        """The state of this worker, as tensors and plain values."""
        own = self._projections.values()
        return {
            "step": self.step,
            "bases": [projection.basis for projection in own],
            "errors": [projection.error for projection in own],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a worker."""
        self.step = state["step"]
        triples = zip(self._projections.values(), state["bases"], state["errors"], strict=True)
        for projection, basis, error in triples:
            projection.basis, projection.error = basis, error

    def _compressed(self, pressed: Sequence[tuple[int, Projection, Tensor]]) -> None:
        """The compressed step of some gradients: two exchanges for all of them."""
        if not pressed:
            return
        scores = [
            projection.begin(gradient, self._generator(number))
            for number, projection, gradient in pressed
        ]
        means = self._means(scores)
        parts = [p.part(mean) for (_, p, _), mean in zip(pressed, means, strict=True)]
        for (_, projection, gradient), mean in zip(pressed, self._means(parts), strict=True):
            gradient.copy_(projection.end(mean))

    def _generator(self, number: int) -> torch.Generator:
        seed = (self.seed * 1_000_003 + self.step * 7919 + number) % 2**31
        return torch.Generator().manual_seed(seed)

    def _means(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The means over all workers, from one exchange for each type of numbers."""
        found: list[Tensor] = list(given)
        for dtype in dict.fromkeys(x.dtype for x in given):
            places = [n for n, x in enumerate(given) if x.dtype == dtype]
            flat = torch.cat([given[n].reshape(-1) for n in places])
            self.sent += flat.nbytes
            dist.all_reduce(flat, group=self.group)
            flat /= dist.get_world_size(self.group)
            sizes = [given[n].numel() for n in places]
            for n, part in zip(places, flat.split(sizes), strict=True):
                found[n] = part.reshape(given[n].shape)
        return found


def greedylore_hook(state: GreedyLore, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The communication hook; see `GreedyLore`."""
    state.exchange(bucket.parameters(), bucket.gradients())
    if bucket.is_last():
        state.step += 1
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


if dist.is_available():
    # DistributedDataParallel compares the types, which are texts here.
    greedylore_hook.__annotations__.update(get_type_hints(greedylore_hook))


def _sent_whole(network: nn.Module, skip: Sequence[str] | None) -> set[int]:
    """The identities of the parameters of embeddings and of skipped layers."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module
    layers: list[nn.Module] = [m for m in network.modules() if isinstance(m, nn.Embedding)]
    if skip is None:
        layers += [m for m in network.modules() if isinstance(m, nn.Linear)][-1:]
    else:
        layers += [network.get_submodule(path) for path in skip]
    return {id(p) for layer in layers for p in layer.parameters()}
