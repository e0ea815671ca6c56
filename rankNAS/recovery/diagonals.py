"""Post-training of diagonals: a few scales of the factors are trained, everything else is frozen.

The product B A of a decomposed layer becomes B A + L_b B' L_d A', where B' and A' are the same
random columns of B and rows of A, and only the diagonals L_b and L_d are trained. As A' is a part
of A, the sum is another second factor: the layer keeps its rank and cost.

References:
    Ji et al., EMNLP Findings 2024, arXiv 2405.10616 (Bolaco), section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankNAS.recovery.trainer import Recovery

__all__ = ["train_diagonals"]

START = 0.1  # of L_d; L_b starts at 0


def train_diagonals(
    network: nn.Module,
    layers: Iterable[str],
    recovery: Recovery,
    *,
    slices: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Train the diagonals of decomposed layers, in place.

    Args:
        network: The network.
        layers: Paths of its layers of two stages; those with groups in the second are left alone.
        recovery: The training.
        slices: Columns of B', at most.
        device: Where to train.

    Raises:
        RankNASError: The loss is not finite.
    """
    second = [module for name in layers if (module := _second(network, name)) is not None]
    if not second:
        return network
    frozen = [(p, p.requires_grad) for p in network.parameters()]
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(recovery.config.seed)
    try:
        for module in second:
            diagonals = _Diagonals(module.weight, slices, generator)
            parametrize.register_parametrization(module, "weight", diagonals)
        recovery.train(network, network, device=device)
    finally:
        for module in second:
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)
        for module in second:
            module.weight.requires_grad_(True)
    return network


class _Diagonals(nn.Module):
    """B to B + L_b B' L_d E, with E the rows of the identity that A' takes."""

    positions: Tensor

    def __init__(self, B: Tensor, slices: int, generator: torch.Generator) -> None:
        super().__init__()
        o, r = B.shape[:2]
        positions = torch.randperm(r, generator=generator)[: min(slices, r)]
        self.register_buffer("positions", positions.to(B.device))
        self.left = nn.Parameter(B.new_zeros(o))
        self.inner = nn.Parameter(B.new_full((len(positions),), START))

    def forward(self, B: Tensor) -> Tensor:
        scales = B.new_zeros(B.shape[1]).index_add(0, self.positions, self.inner)
        return B * (1 + (self.left[:, None] * scales).view(*B.shape[:2], *[1] * (B.dim() - 2)))


def _second(network: nn.Module, name: str) -> nn.Linear | nn.Conv1d | nn.Conv2d | None:
    """The second of two stages of a layer; None if there is no such."""
    module = network.get_submodule(name)
    if not isinstance(module, nn.Sequential) or len(module) != 2:
        return None
    found = module[1]
    if isinstance(found, nn.Conv1d | nn.Conv2d):
        return found if found.groups == 1 else None
    return found if isinstance(found, nn.Linear) else None
