"""Shapes of decomposable layers: geometry, exact cost, and empty modules.

A factorised layer is a chain of shapes, so one definition gives its cost, its module and the size
of its weights, without any weights.

Notation: g groups, o outputs per group, c inputs per group, (kh, kw) the kernel, n = c kh kw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "COSTS",
    "EXACT_COSTS",
    "LAYER_COSTS",
    "Cost",
    "GroupedLinear",
    "LayerShape",
    "chain",
    "hf_class",
    "is_hf_conv1d",
    "pointwise",
]

COSTS = ("macs", "params", "weight_bytes")
#: Costs of the decomposable layers alone, as many papers count, to the cost that they sum.
LAYER_COSTS = {"layer_macs": "macs", "layer_params": "params"}
#: All costs that are counted, not measured.
EXACT_COSTS = (*COSTS, *LAYER_COSTS)


@dataclass(frozen=True)
class Cost:
    """Cost of a layer: multiply-accumulates of one forward pass, parameters, bytes of weights."""

    macs: int
    params: int
    weight_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.params + other.params,
            self.weight_bytes + other.weight_bytes,
        )

    def __getitem__(self, name: str) -> int:
        return int(getattr(self, name))

    def repeated(self, factor: int) -> Cost:
        """The cost on `factor` times the inputs: more multiply-accumulates, equal parameters."""
        return Cost(factor * self.macs, self.params, self.weight_bytes)


@dataclass(frozen=True)
class LayerShape:
    """A linear map or a convolution, without its weights.

    Args:
        inputs: Input features or channels, all groups together.
        outputs: Output features or channels, all groups together.
        kernel: Kernel size per spatial dimension; ``()`` for a linear layer.
        stride: As in ``nn.Conv2d``, one entry per spatial dimension.
        padding: As in ``nn.Conv2d``, or ``"same"`` / ``"valid"``.
        dilation: As in ``nn.Conv2d``.
        groups: Channel groups; for a linear layer, the number of diagonal blocks.
        padding_mode: As in ``nn.Conv2d``.
        bias: Whether there is a bias.
        calls: Input sizes in one forward pass, one entry per call: ``(positions,)`` for a linear
            layer, ``(batch, *spatial)`` for a convolution.
        itemsize: Bytes per weight.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False
    calls: tuple[tuple[int, ...], ...] = ()
    itemsize: int = 4

    @classmethod
    def of(cls, module: nn.Module, calls: tuple[tuple[int, ...], ...] = ()) -> LayerShape:
        """The shape of a ``Linear``, ``Conv1d``, ``Conv2d`` or Hugging Face ``Conv1D``."""
        weight: Any = module.weight
        common: dict[str, Any] = {
            "bias": module.bias is not None,
            "calls": calls,
            "itemsize": weight.element_size(),
        }
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return cls(
                module.in_channels,
                module.out_channels,
                tuple(module.kernel_size),
                tuple(module.stride),
                module.padding if isinstance(module.padding, str) else tuple(module.padding),
                tuple(module.dilation),
                module.groups,
                module.padding_mode,
                **common,
            )
        outputs, inputs = reversed(weight.shape) if is_hf_conv1d(module) else weight.shape
        return cls(int(inputs), int(outputs), **common)

    @property
    def width(self) -> int:
        """N = c kh kw, the number of columns of one group's folded weight."""
        return self.inputs // self.groups * math.prod(self.kernel)

    @property
    def explicit_padding(self) -> tuple[tuple[int, int], ...]:
        """(before, after) per spatial dimension."""
        if self.padding == "valid":
            return tuple((0, 0) for _ in self.kernel)
        if self.padding == "same":  # torch puts the odd element at the end
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            return tuple((t // 2, t - t // 2) for t in totals)
        return tuple((int(p), int(p)) for p in self.padding)

    def output_calls(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of the outputs, in the format of `calls`."""
        if not self.kernel:
            return self.calls
        geometry = list(
            zip(self.explicit_padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return tuple(
            (
                call[0],
                *(
                    (size + before + after - d * (k - 1) - 1) // s + 1
                    for size, ((before, after), d, k, s) in zip(call[1:], geometry, strict=True)
                ),
            )
            for call in self.calls
        )

    def cost(self) -> Cost:
        """Exact cost, as ``torch.utils.flop_counter`` counts it (two FLOPs a MAC, bias free)."""
        weights = self.outputs * self.width
        positions = sum(math.prod(call) for call in self.output_calls())
        params = weights + (self.outputs if self.bias else 0)
        return Cost(positions * weights, params, params * self.itemsize)

    def build(self, device: torch.device | str = "meta") -> nn.Module:
        """An uninitialised module of this shape."""
        if not self.kernel and self.groups == 1:
            return nn.Linear(self.inputs, self.outputs, self.bias, device=device)
        if not self.kernel:
            return GroupedLinear(self.inputs, self.outputs, self.groups, self.bias, device=device)
        convolution: Any = nn.Conv1d if len(self.kernel) == 1 else nn.Conv2d
        module: nn.Module = convolution(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.padding_mode,
            device=device,
        )
        return module

    def fold(self, weight: Tensor) -> Tensor:
        """A module's weight as (g, o, c, kh, kw); a one-dimensional kernel becomes (1, k)."""
        kernel = (1,) * (2 - len(self.kernel)) + self.kernel
        g = self.groups
        return weight.reshape(g, self.outputs // g, self.inputs // g, *kernel)

    def unfold(self, folded: Tensor) -> Tensor:
        """The inverse of `fold`: (g, o, n) or (g, o, c, kh, kw) to the module's own shape."""
        if not self.kernel:
            shape = (self.outputs, self.inputs) if self.groups == 1 else folded.shape[:3]
            return folded.reshape(shape)
        return folded.reshape(self.outputs, self.inputs // self.groups, *self.kernel)


def chain(first: LayerShape, *rest: LayerShape) -> tuple[LayerShape, ...]:
    """The shapes, with the calls of each set to the outputs of the previous one."""
    shapes = [first]
    for shape in rest:
        shapes.append(replace(shape, calls=shapes[-1].output_calls(), itemsize=first.itemsize))
    return tuple(shapes)


def pointwise(shape: LayerShape, inputs: int, outputs: int, groups: int) -> LayerShape:
    """A 1 x 1 layer of the same kind."""
    one, zero = (1,) * len(shape.kernel), (0,) * len(shape.kernel)
    return replace(
        shape,
        inputs=inputs,
        outputs=outputs,
        groups=groups,
        kernel=one,
        stride=one,
        dilation=one,
        padding=zero,
        padding_mode="zeros",
        calls=(),
    )


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's ``Conv1D``: a linear layer with a transposed weight."""
    return hf_class(module) is not None


def hf_class(module: nn.Module) -> type[nn.Module] | None:
    """Hugging Face's class ``Conv1D``, if the module or its base is one."""
    named = (kind for kind in type(module).__mro__ if kind.__name__ == "Conv1D")
    return next(named, None) if hasattr(module, "nf") else None


class GroupedLinear(nn.Module):
    """A block-diagonal linear layer: a 1 x 1 grouped convolution on features in the last axis.

    Its weight has the shape ``(groups, outputs / groups, inputs / groups)``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        groups: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(
            torch.empty(groups, outputs // groups, inputs // groups, device=device)
        )
        self.bias = nn.Parameter(torch.empty(outputs, device=device)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # (*batch, inputs) -> (*batch, outputs)
        """The outputs: each block applied to its slice of the features."""
        blocks = x.reshape(-1, self.groups, self.weight.shape[2]).transpose(0, 1)
        y = torch.bmm(blocks, self.weight.transpose(1, 2))
        y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """The sizes, for ``repr``."""
        groups, outputs, inputs = self.weight.shape
        return f"{groups * inputs}, {groups * outputs}, groups={groups}"
