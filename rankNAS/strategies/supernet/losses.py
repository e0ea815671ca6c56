"""Losses of a super-net: relaxed samples, expected costs, the penalty and the regularisers.

Notation: J candidates of a layer, K budgets.

References:
    Jang et al.; Maddison et al., ICLR 2017: the Gumbel-softmax relaxation.
    Xiao et al., ICML 2023 (ComCAT): the penalty in its power form.
    Gao et al., NAACL 2024 (ARS): the penalty in its logarithmic form, and the alignment of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Maps",
    "Penalty",
    "alignment",
    "expected_costs",
    "feature_distance",
    "gumbel_softmax",
    "penalised",
]

Maps = dict[str, list[Tensor]]  # by layer, the output of each of its calls
Penalty = Literal["power", "log"]


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A relaxed sample of one of J candidates, (J,) (Jang et al., Maddison et al., ICLR 2017).

    Args:
        logits: (J,).
        temperature: Towards 0 the sample becomes one-hot.
        generator: A generator on the CPU.
    """
    noise = -torch.empty(logits.shape).exponential_(generator=generator).log()
    return torch.softmax((logits + noise.to(logits)) / temperature, -1)


def expected_costs(
    probabilities: Sequence[Tensor], tables: Sequence[Tensor], rest: Tensor
) -> Tensor:  # (K,)
    """The cost of the whole network under independent probabilities of every layer's candidates.

    Args:
        probabilities: (J,), one a layer.
        tables: Costs of the candidates, (K, J), one a layer.
        rest: Costs of everything else, (K,).
    """
    return rest + torch.stack([t @ p for t, p in zip(tables, probabilities, strict=True)]).sum(0)


def penalised(
    cross_entropy: Tensor, ratios: Tensor, penalty: Penalty = "power", strength: float = 1.5
) -> Tensor:
    """The objective of the logits; costs within their targets leave the cross-entropy as it is.

    Several budgets multiply: R = prod_k max(1, ratio_k). ``power`` is CE R^strength, as in the
    code of ComCAT (Xiao et al., ICML 2023); ``log`` is CE + strength log R, as in ARS.

    Args:
        cross_entropy: CE, a scalar.
        ratios: Expected cost over target, (K,).
        penalty: ``power`` or ``log``.
        strength: beta = 1.5 in ComCAT; lambda = 16 in ARS.
    """
    overrun = ratios.clamp_min(1).prod()
    if penalty == "power":
        return cross_entropy * overrun**strength
    return cross_entropy + strength * overrun.log()


def feature_distance(maps: Maps, targets: Maps) -> Tensor:
    """Mean over the layers of ||F - F0||^2 / ||F0||^2.

    Relative, and a mean, so that one coefficient suits networks of any depth and scale.
    """
    ratios = [
        (f - t).square().mean() / t.square().mean().clamp_min(torch.finfo(t.dtype).tiny)
        for name in maps
        for f, t in zip(maps[name], targets[name], strict=True)
    ]
    return torch.stack(ratios).mean()


def alignment(mask: Tensor, singular_values: Tensor) -> Tensor:
    """How far a mask over singular values is from the truncation that keeps as many.

    ||m s - m' s||^2 with m' the mask of the largest sum(m) values (ARS, Gao et al., NAACL 2024);
    zero if and only if the mask is a truncation.

    Args:
        mask: m, ones and zeros, (R,).
        singular_values: s, decreasing, (R,).
    """
    truncated = (torch.arange(len(mask), device=mask.device) < mask.detach().sum()).to(mask)
    return ((mask - truncated) * singular_values).square().sum()
