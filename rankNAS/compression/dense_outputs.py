"""The outputs of the dense network's layers at the drawn positions, kept for many refits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.compression.accumulators import counted
from rankNAS.compression.patches import outputs_at
from rankNAS.decompositions.layer_view import LayerView
from rankNAS.search_spaces.base import Layer
from rankNAS.tasks.feeding import InputBatches

__all__ = ["MEMORY", "DenseOutputs", "draw", "positions"]

MEMORY = 1 << 29  # bytes of outputs that are kept
# Positions of each input: enough for so many patches per column of the weight, within limits.
# More inputs help more than more positions of each, as neighbouring patches are correlated.
PER_COLUMN = 16
FEWEST, MOST = 16, 32


class DenseOutputs:
    """The outputs of layers in the dense network on fixed batches, without their biases.

    They depend on no allocation. Beyond the memory bound they are computed again for each refit,
    in as many forward passes as the bound requires.

    Args:
        model: The dense network, in the mode in which it runs.
        layers: The layers, in the order of the forward pass.
        batches: The inputs.
        seed: Random seed of the positions; see `draw`.
        memory: Bytes to keep.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        batches: InputBatches,
        *,
        seed: int,
        memory: int,
    ) -> None:
        self._model, self._layers, self._batches = model, layers, batches
        self._seed, self._memory = seed, memory
        self._order = list(layers)
        self._kept: dict[str, list[Tensor | None]] = {}

    def of(self, name: str) -> Sequence[Tensor | None]:
        """The outputs (g, N, o) of a layer by batch; None where the layer is not called."""
        if name not in self._kept:
            self._kept.clear()
            self._compute(self._order[self._order.index(name) :])
        return self._kept[name]

    @torch.no_grad()
    def _compute(self, names: Sequence[str]) -> None:
        """Run the network and keep the outputs of the first layers that the memory allows."""
        wanted = list(names)
        for number in range(len(self._batches)):
            found = self._pass(number, wanted)
            if number == 0:
                wanted = self._affordable(found, wanted)
            for name in wanted:
                self._kept.setdefault(name, []).append(found.get(name))

    def _affordable(self, found: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
        """The first layers whose outputs fit, as the first batch tells; at least one."""
        share = self._batches.samples / self._batches.sizes[0]
        total = 0.0
        kept: list[str] = []
        for name in names:
            total += found[name].nbytes * share if name in found else 0
            if kept and total > self._memory:
                break
            kept.append(name)
        return kept

    def _pass(self, number: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of some layers on one batch."""
        found: dict[str, Tensor] = {}
        mask = self._batches.mask(number)

        def keep(name: str, y: Tensor) -> None:
            shape = self._layers[name].shape
            y = outputs_at(
                shape,
                counted(shape, y, mask),
                draw(self._seed, number),
                positions(self._layers[name], self._batches.samples),
            )
            bias = LayerView(self._model, [name]).bias
            # An own tensor: a later in-place operation may change the output.
            own = y.clone() if bias is None else y - bias.to(y.dtype).reshape(len(y), 1, -1)
            found[name] = own

        def hook(name: str) -> Any:
            def kept(module: nn.Module, args: Any, output: Tensor) -> None:
                if name not in found:
                    keep(name, output.detach())
                if len(found) == len(names):
                    raise _AllFoundError

            return kept

        handles = [self._model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
        try:
            self._batches[number].copied().run(self._model)  # the model may change its inputs
        except _AllFoundError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found


class _AllFoundError(Exception):
    """All wanted layers have been called."""


def draw(seed: int, number: int) -> torch.Generator:
    """The generator of the positions in one batch; the same for all networks."""
    return torch.Generator().manual_seed(seed + number)


def positions(layer: Layer, samples: int) -> int:
    """Largest number of positions that are drawn from each of a number of inputs."""
    enough = math.ceil(PER_COLUMN * layer.shape.width / samples)
    return min(MOST, max(FEWEST, enough))
