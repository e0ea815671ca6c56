"""The weight and bias of a layer in a model: read, written, exchanged and replaced.

A layer may lie at several paths of a model, and its class may store the weight with the inputs
first. `LayerView` hides both: its weights have the outputs first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankNAS.decompositions.shapes import is_hf_conv1d

__all__ = ["LayerView", "linear_of"]


@final
class LayerView:
    """A layer of a model, at all of its paths.

    Args:
        model: The model.
        paths: Every path of the layer; the modules there have one weight and one bias.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> view = LayerView(model, ["0"])
        >>> view.write(torch.ones(2, 3))
        >>> model(torch.ones(1, 3)).shape, view.weight.sum().item()
        (torch.Size([1, 2]), 6.0)
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._model, self.paths = model, tuple(paths)
        self.modules = tuple(dict.fromkeys(model.get_submodule(path) for path in self.paths))

    @property
    def parameter(self) -> Tensor:
        """The weight as the layer stores it."""
        weight: Any = self.modules[0].weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight(self) -> Tensor:
        """The weight, outputs first, without a graph; it shares the memory of the layer's."""
        return self.turned(self.parameter.detach())

    @property
    def bias_parameter(self) -> Tensor | None:
        """The bias (outputs,) of the layer itself; None if the layer has none."""
        bias: Any = self.modules[0].bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def bias(self) -> Tensor | None:
        """The bias (outputs,), without a graph; None if the layer has none."""
        bias = self.bias_parameter
        return None if bias is None else bias.detach()

    def turned(self, weight: Tensor) -> Tensor:
        """A weight with the outputs first as the layer stores it, or the reverse."""
        return weight.T if is_hf_conv1d(self.modules[0]) else weight

    def write(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Copy a weight, outputs first, and a bias (None keeps it) into the layer."""
        self.write_from(lambda: (weight, bias))

    @torch.no_grad()
    def write_from(self, source: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        """Copy the weight and the bias that a function returns into the layer.

        A layer that computes its weight keeps the function instead of the weight.
        """
        weight, bias = source()
        for module in self.modules:
            own: Any = module
            if parametrize.is_parametrized(module, "weight"):
                own.parametrizations.weight[0].source = source
            else:
                own.weight.copy_(self.turned(weight))
            if bias is not None:
                own.bias.copy_(bias)

    def compute_weight(self) -> None:
        """Let the layer compute its weight at each access and free it; see `write_from`."""
        for module in self.modules:
            computed = _Computed(is_hf_conv1d(module))
            parametrize.register_parametrization(module, "weight", computed, unsafe=True)

    def replace(self, module: nn.Module) -> None:
        """Set another module at every path."""
        for path in self.paths:
            parent, _, child = path.rpartition(".")
            setattr(self._model.get_submodule(parent), child, module)


def linear_of(weight: Tensor, bias: Tensor | None, *, trained: bool) -> nn.Linear:
    """A linear layer of a weight (outputs, inputs) and a bias (outputs,), which are not copied.

    Args:
        weight: The weight.
        bias: The bias; None for a layer without one.
        trained: Whether they require gradients.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias, trained)
    return layer


class _Computed(nn.Module):
    """Computes a layer's weight from a function; without one, it is the layer's own."""

    source: Callable[[], tuple[Tensor, Tensor | None]] | None

    def __init__(self, inputs_first: bool) -> None:
        super().__init__()
        self.source, self._inputs_first = None, inputs_first

    def forward(self, dense: Tensor) -> Tensor:
        if self.source is None:
            return dense
        weight, _ = self.source()
        return torch.empty_like(dense).copy_(weight.T if self._inputs_first else weight)
