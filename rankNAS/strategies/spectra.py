"""Spectra of the layers, for strategies that need more than the tables; no factors.

A strategy names the spectra that it needs (`Strategy.needs_spectra`); only these are computed,
once a search, and nothing here refers to a layer's weights or factors.

Notation, per layer of weight W (g, o, n): H and C of the study's norm, e_k[j] as in
`rankNAS.strategies.one_shot.alds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rankNAS.allocation import Choice
from rankNAS.deadline import check_time
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import Layer
from rankNAS.strategies.problem import Array

if TYPE_CHECKING:
    from rankNAS.compression.factorisation import Factorisation
    from rankNAS.compression.factors import LayerFactors

__all__ = [
    "LayerSpectra",
    "SpectrumName",
    "channel_groups",
    "make_spectra",
    "output_spectrum",
    "spectral_errors",
]

SpectrumName = Literal["energy", "outputs", "weight"]


@dataclass(frozen=True)
class LayerSpectra:
    """The spectra of one layer; those that were not asked for are None or empty.

    Args:
        layer: Its name, shape, choices and their costs.
        energy: ||H W C^1/2||_F^2, to which the layer's relative errors are relative.
        outputs: Eigenvalues (o,) of the covariance of the outputs, largest first, summed over the
            groups of the layer.
        weight: Spectral errors e_k (R + 1,) of the weight, without data, by number of channel
            groups k: 1 where ``svd`` is offered, and those of the ``group_svd`` choices.
    """

    layer: Layer
    energy: float | None = None
    outputs: tuple[float, ...] = ()
    weight: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


def make_spectra(
    factorisation: Factorisation, needed: Sequence[SpectrumName]
) -> dict[str, LayerSpectra]:
    """The spectra of all layers, by name.

    Args:
        factorisation: The factors; nothing that is returned refers to them.
        needed: Which spectra; the others are left out.

    Raises:
        UsageError: There is no such spectrum.
        TimeLimitError: The active deadline has passed.
    """
    if unknown := [name for name in needed if name not in get_args(SpectrumName)]:
        raise UsageError(
            f"there is no spectrum {unknown[0]!r}; there are {', '.join(get_args(SpectrumName))}."
        )
    return {name: _of(found, needed) for name, found in factorisation.layers.items()}


def _of(found: LayerFactors, needed: Sequence[SpectrumName]) -> LayerSpectra:
    check_time()
    groups = {channel_groups(c) for c in found.layer.choices} - {None}
    outputs: tuple[float, ...] = ()
    if "outputs" in needed:
        assert found.moment is not None
        outputs = tuple(output_spectrum(found.moment, found.weight.shape[1]).tolist())
    return LayerSpectra(
        found.layer,
        found.energy if "energy" in needed else None,
        outputs,
        {k: tuple(spectral_errors(found.weight, k).tolist()) for k in groups if k is not None}
        if "weight" in needed
        else {},
    )


def output_spectrum(moment: Tensor, outputs: int) -> Array:
    """Eigenvalues (o,) of the covariance of a layer's outputs, largest first.

    Args:
        moment: A matrix (g, m, m) with the eigenvalues of the covariance that are not zero; those
            of the groups, which share their rank, are summed.
        outputs: Outputs of a group, o.
    """
    values = torch.linalg.eigvalsh(moment.double()).clamp_min(0).flip(-1).sum(0)
    spectrum: Array = np.zeros(outputs)
    spectrum[: len(values)] = values.cpu().numpy()
    return spectrum


def spectral_errors(weight: Tensor, groups: int) -> Array:
    """The spectral errors e_k[j] of a weight: max_i sigma_{j+1}(W_i) / sigma_1(W).

    Args:
        weight: (g, o, c, kh, kw); the blocks of a grouped convolution are blocks like the others.
        groups: k, a divisor of c.

    Returns:
        (R + 1,), one error for each rank j = 0 .. R, where R = min(o, c kh kw / k); the last is 0.
    """
    W = weight.detach().double().flatten(2)  # (g, o, n)
    largest = float(torch.linalg.matrix_norm(W, 2).max())
    values = torch.linalg.svdvals(W.unflatten(2, (groups, -1)).transpose(1, 2))  # (g, k, R)
    errors = np.append(values.amax((0, 1)).cpu().numpy(), 0.0)
    relative: Array = errors / largest if largest > 0 else 0 * errors
    return relative


def channel_groups(choice: Choice) -> int | None:
    """The number of channel groups k of an ``svd`` or ``group_svd``; None for other choices."""
    return {"svd": 1, "group_svd": choice.rank[0] if choice.rank else 1}.get(choice.operator)
