"""Models whose layers are plain: attention as linear layers, computed weights as weights.

A subclass of a convolution or a linear layer may compute its weight at each call, as weight
standardisation does, or only rewrite what its base class does. In evaluation mode it is a plain
layer all the same, if all that it does is one plain operation on its own input. Such a layer runs
once, and a plain layer with the weight and the bias that the operation received takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from rankNAS.copies import copied
from rankNAS.decompositions.shapes import hf_class
from rankNAS.search_spaces.attention import separate_attention
from rankNAS.search_spaces.experts import separate_experts
from rankNAS.search_spaces.projections import fused_projections, split_projections

__all__ = ["overrides_forward", "with_plain_layers"]

OPERATIONS: tuple[tuple[Any, Any], ...] = (
    (nn.Linear, nn.functional.linear),
    (nn.Conv1d, torch.conv1d),
    (nn.Conv2d, torch.conv2d),
)
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
MARGINS = (2, 5)  # by which a probe is larger than the kernel, at least


def with_plain_layers(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """The model without wrappers, with plain layers wherever these are the same function.

    It is a copy if anything is replaced. ``nn.MultiheadAttention`` becomes four linear layers, and
    the matrices of fused experts become layers. A layer that computes its weight becomes one that
    holds it, which training then changes directly.

    Args:
        model: The model.
        names: Layers or weights that the result must have. Fused experts stay fused, and fused
            projections are split, if these names say so. By default, experts are separated and
            projections stay as they are.

    Raises:
        UsageError: The model is no tree of modules with weights; see `unwrapped`.

    Example:
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, 2 * self.weight, self.bias)
        >>> model = nn.Sequential(Doubled(3, 2))
        >>> plain = with_plain_layers(model)
        >>> plain, bool(torch.equal(plain[0].weight, 2 * model[0].weight))
        (Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
        ), True)
    """
    model = separate_attention(model)
    if names is None:
        model = separate_experts(model)
    else:
        names = set(names)
        model = separate_experts(model, names)
        split = {
            path for path, parts in fused_projections(model).items() if _has(names, path, parts)
        }
        model = split_projections(model, split)
    operations = {name: op for name, m in model.named_modules() if (op := _operation(m))}
    if not operations:
        return model
    network = copied(model)
    plain = {}
    for name, operation in operations.items():
        plain[network.get_submodule(name)] = operation.layer(network.get_submodule(name))
    if network in plain:
        return plain[network]
    for parent in list(network.modules()):
        for child, module in list(parent._modules.items()):
            if module in plain:
                setattr(parent, child, plain[module])
    return network


def _has(names: Collection[str], path: str, parts: Iterable[str]) -> bool:
    """Whether some names are those of parts of a module, or lie inside one."""
    inside = tuple(f"{path}.{part}." for part in parts)
    return any(f"{name}.".startswith(inside) for name in names)


def overrides_forward(module: nn.Module) -> bool:
    """Whether a subclass computes something else; one that changes no method is its base."""
    bases = (hf_class(module), nn.Linear, nn.Conv1d, nn.Conv2d)
    kind = next(base for base in bases if base is not None and isinstance(module, base))
    methods = ("forward", "__call__", "_conv_forward")
    return any(getattr(type(module), m, None) is not getattr(kind, m, None) for m in methods)


@dataclass(frozen=True)
class _Operation:
    """A plain operation with constant arguments.

    Args:
        kind: The class of layers that performs it.
        given: Its arguments by name, without the input.
        own: By name, whether an argument is the layer's parameter of that name itself.
    """

    kind: Any
    given: dict[str, Any]
    own: dict[str, bool]

    def layer(self, module: nn.Module) -> nn.Module:
        """The plain layer in evaluation mode; `module` is the layer, or its copy in a network."""
        weight, options = self.given["weight"], dict(self.given)
        bias = options.pop("bias", None)
        del options["weight"]
        width = weight.shape[1] * options.get("groups", 1)
        sizes = (width, len(weight), *((weight.shape[2:],) if weight.dim() > 2 else ()))
        layer: nn.Module = self.kind(*sizes, bias=bias is not None, device="meta", **options)
        layer.train(module.training)
        for name in ("weight", "bias"):
            if self.own[name]:  # it may be tied to others
                setattr(layer, name, getattr(module, name))
            elif (value := self.given.get(name)) is not None:
                trained = any(p.requires_grad for p in module.parameters())
                setattr(layer, name, nn.Parameter(value.detach().clone(), trained))
        return layer


class _Watch(TorchFunctionMode):
    """Records the calls of one function, with their results."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self._function = function
        self.calls: list[tuple[dict[str, Any], Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self._function:
            given = dict(zip(ARGUMENTS, args, strict=False)) | (kwargs or {})
            self.calls.append((given, result))
        return result


def _operation(module: nn.Module) -> _Operation | None:
    """The one plain operation that a layer with a forward of its own performs; None otherwise."""
    found = next((pair for pair in OPERATIONS if isinstance(module, pair[0])), None)
    if found is None or not _is_candidate(module) or not overrides_forward(module):
        return None
    kind, function = found
    module = copied(module).eval()  # a pass may change buffers
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            first = _probed(module, function, MARGINS[0])
            for margin in _margins(module):
                other = _probed(module, function, margin)
                if first is None or other is None or not _equal(first, other):
                    return None
    except Exception:  # a layer of another form, which takes other arguments for example
        return None
    if first is None:
        return None
    own = {name: first.get(name) is not None for name in ("weight", "bias")}
    own = {n: given and first[n] is module._parameters.get(n) for n, given in own.items()}
    return _Operation(kind, first, own)


def _margins(module: nn.Module) -> range:
    """Margins of every remainder by the stride, on which computed padding depends."""
    stride = max(getattr(module, "stride", (1,)))
    return range(MARGINS[1], MARGINS[1] + stride)


def _is_candidate(module: nn.Module) -> bool:
    """Whether nothing but the class of a layer makes it another function."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and not is_lazy(weight)
        and weight.is_floating_point()
        and not is_parametrized(module)
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _probed(module: nn.Module, function: Any, margin: int) -> dict[str, Any] | None:
    """The arguments of the one operation on a random input; None if the layer does more."""
    x, before = _probe(module, margin).requires_grad_(), _state(module)
    with _Watch(function) as watch:
        output = module(x)
    if _state(module) != before or len(watch.calls) != 1:
        return None
    given: dict[str, Any]
    given, result = watch.calls[0]
    if given.pop("input", None) is not x or output is not result:
        return None
    for name in ("weight", "bias"):
        value = given.get(name)
        if isinstance(value, Tensor) and value.requires_grad and _depends(value, x):
            return None
    return given


def _probe(module: nn.Module, margin: int) -> Tensor:
    weight: Any = module.weight
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (margin, module.in_features)
    else:
        convolution: Any = module
        kernel = zip(convolution.kernel_size, convolution.dilation, strict=True)
        shape = (1, convolution.in_channels, *(d * (k - 1) + 1 + margin for k, d in kernel))
    generator = None if weight.is_meta else torch.Generator(weight.device).manual_seed(margin)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device=weight.device)
    return drawn.to(weight.dtype)


def _state(module: nn.Module) -> dict[str, Any]:
    """What a pass may change: attributes by identity, tensors by version too."""
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    attributes = {name: id(value) for name, value in vars(module).items()}
    return attributes | {f"{name}.": t._version for name, t in tensors.items()}


def _depends(value: Tensor, x: Tensor) -> bool:
    found = torch.autograd.grad(value.sum(), x, allow_unused=True, retain_graph=True)
    return found[0] is not None


def _equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two calls have the same arguments."""
    if first.keys() != second.keys():
        return False
    for name, value in first.items():
        other = second[name]
        if not isinstance(value, Tensor):
            if value != other:
                return False
        elif not value.is_meta and not torch.equal(value, other):
            return False
    return bool(math.prod(first["weight"].shape) > 0)
