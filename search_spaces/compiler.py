"""Compiler from a model and example inputs to a search space.

One forward pass under PyTorch's FLOP counter records the called layers, their number of calls and
input sizes. All other quantities follow from shapes, so a model on the ``meta`` device compiles
too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.flop_counter import FlopCounterMode

from rankNAS.copies import unchanged
from rankNAS.decompositions.shapes import Cost, LayerShape, is_hf_conv1d
from rankNAS.exceptions import DataError, RankNASError, UsageError
from rankNAS.search_spaces.attention import separate_attention
from rankNAS.search_spaces.base import Layer, SearchSpace, Skipped
from rankNAS.search_spaces.policies import RankPolicy, candidate_choices
from rankNAS.trees import Inputs, size_of, tensors

__all__ = ["compile_space", "count_macs"]

MIN_WEIGHTS = 1024  # smaller layers stay dense


def compile_space(
    model: nn.Module,
    example_inputs: Any,
    *,
    policy: RankPolicy | None = None,
    exclude: Sequence[str] = (),
    keep_output_dense: bool = True,
    min_weights: int = MIN_WEIGHTS,
) -> SearchSpace:
    """The search space of a model.

    Args:
        model: Any module; ``nn.MultiheadAttention`` is treated as four linear layers.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments, or
            `Inputs`, on the model's device (``meta`` included). Costs refer to exactly this input.
        policy: Policy for the candidate ranks.
        exclude: Regular expressions; a layer whose path matches one of them stays dense.
        keep_output_dense: Keep the last layer of the forward pass dense.
        min_weights: Keep layers with fewer weights dense.

    Returns:
        The space; ``space.layers`` maps names to layers, ``space.skipped`` lists dense layers and
        the reasons.

    Raises:
        UsageError: The model fails on the example inputs, or no layer can be decomposed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> space = compile_space(model, torch.zeros(1, 64))
        >>> space.dense_cost.macs, list(space.layers)
        (4736, ['0'])
        >>> from rankNAS.allocation import Choice
        >>> space.layers["0"][Choice("svd", (8,))].macs
        1024
    """
    model = separate_attention(model)
    policy = policy or RankPolicy()
    calls, total = _trace(model, example_inputs)
    order = {name: position for position, name in enumerate(calls)}
    groups = sorted(_tied(model), key=lambda names: min(order.get(n, len(order)) for n in names))
    output = max(calls, key=lambda n: order[n]) if calls and keep_output_dense else None
    layers: dict[str, Layer] = {}
    skipped: list[Skipped] = []
    for names in groups:
        shape = _shape(model, names, calls)
        reason = _reason(model, names, shape, exclude, output, min_weights)
        choices, costs = candidate_choices(shape, policy) if reason is None else ((), ())
        if reason is None and len(choices) == 1:
            reason = "no rank costs less than the dense layer"
        if reason is None:
            layers[names[0]] = Layer(names[0], tuple(names[1:]), shape, choices, costs)
        else:
            skipped.append(Skipped(names[0], reason, shape.cost()))
    if not layers:
        raise UsageError(f"no layer of {type(model).__name__} can be decomposed.{_why(skipped)}")
    return SearchSpace(
        layers, tuple(skipped), _rest(model, layers, total), _shape_of(example_inputs)
    )


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass, as ``torch.utils.flop_counter`` counts them."""
    return _trace(model, example_inputs)[1]


def _trace(model: nn.Module, example_inputs: Any) -> tuple[dict[str, list[tuple[int, ...]]], int]:
    """Input sizes of each call by layer name, in the order of first calls; and the MACs."""
    calls: dict[str, list[tuple[int, ...]]] = {}
    names = {id(m): n for n, m in model.named_modules() if _is_decomposable(m)}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(names[id(module)], []).append(_call(module, (*args, *kwargs.values())[0]))

    modules = [m for m in model.modules() if id(m) in names]
    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in modules]
    try:
        # Under no_grad, some modules (and attention on CPUs) use fused kernels that the counter
        # does not support.
        with (
            _evaluating(model),
            unchanged(model),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            _forward(model, example_inputs)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} does not run on the example inputs "
            f"{_shape_of(example_inputs)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls, counter.get_total_flops() // 2


def _forward(model: nn.Module, example_inputs: Any) -> Any:
    # The model may change its inputs in place.
    return Inputs.of(example_inputs).copied().run(model)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _shape_of(example_inputs: Any) -> tuple[int, ...]:
    """The shape of the first input tensor with one sample along axis 0; () without any."""
    inputs = Inputs.of(example_inputs)
    found = [tensor for tensor in tensors(inputs) if tensor.dim()]
    try:
        size: int | None = size_of(inputs)
    except DataError:  # some tensor, such as a table of positions, has no axis of samples
        size = None
    batched = [tensor for tensor in found if size in (None, len(tensor))]
    return tuple(batched[0].shape) if batched else ()


def _is_decomposable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or is_hf_conv1d(module)


def _call(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Input size of a call, in the format of `LayerShape.calls`."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return (x.numel() // x.shape[-1],)
    spatial = len(module.kernel_size)
    return (x.shape[0] if x.dim() == spatial + 2 else 1, *x.shape[-spatial:])


def _tied(model: nn.Module) -> list[list[str]]:
    """Paths of decomposable modules, grouped by weight, in the model's order."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_decomposable(module):
            weight = module._parameters.get("weight")  # a property if parametrised
            groups.setdefault(id(module if weight is None else weight), []).append(name)
    return list(groups.values())


def _shape(
    model: nn.Module, names: list[str], calls: dict[str, list[tuple[int, ...]]]
) -> LayerShape:
    all_calls = tuple(call for name in names for call in calls.get(name, ()))
    return LayerShape.of(model.get_submodule(names[0]), all_calls)


def _reason(
    model: nn.Module,
    names: list[str],
    shape: LayerShape,
    exclude: Sequence[str],
    output: str | None,
    min_weights: int,
) -> str | None:
    """Why a layer stays dense, or None."""
    modules = [model.get_submodule(name) for name in names]
    checks: list[tuple[str, Callable[[], bool]]] = [
        ("the model itself: wrap it in nn.Sequential", lambda: "" in names),
        ("excluded", lambda: any(re.search(e, n) for e in exclude for n in names)),
        ("its weight is parametrised", lambda: any(map(_is_computed, modules))),
        ("its class overrides forward", lambda: any(map(_overrides_forward, modules))),
        ("not called in the forward pass", lambda: not shape.calls),
        ("output layer", lambda: output in names),
        ("depthwise: one channel a group", lambda: 1 < shape.groups == shape.inputs),
        (
            f"tiny: fewer than {min_weights} weights",
            lambda: shape.outputs * shape.width < min_weights,
        ),
        ("its weight is used by another kind of module", lambda: _shared(model, modules)),
        ("its weight is tied under different biases", lambda: _biases(modules) > 1),
        ("its weight is tied under different settings", lambda: _settings(modules) > 1),
    ]
    return next((reason for reason, applies in checks if applies()), None)


def _is_computed(module: nn.Module) -> bool:
    return is_parametrized(module) or "weight" not in module._parameters


def _overrides_forward(module: nn.Module) -> bool:
    if is_hf_conv1d(module):
        return False
    return not any(type(module).forward is c.forward for c in (nn.Linear, nn.Conv1d, nn.Conv2d))


def _shared(model: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether a module that is not one of `modules` holds the same weight (an embedding, say)."""
    weight, own = modules[0].weight, {id(m) for m in modules}
    return any(
        parameter is weight
        for module in model.modules()
        if id(module) not in own
        for parameter in module._parameters.values()
    )


def _biases(modules: list[nn.Module]) -> int:
    return len({id(module.bias) for module in modules})


def _settings(modules: list[nn.Module]) -> int:
    """How many ways, in stride or orientation for example, the modules use their one weight."""
    return len({(is_hf_conv1d(module), LayerShape.of(module)) for module in modules})


def _rest(model: nn.Module, layers: dict[str, Layer], total_macs: int) -> Cost:
    """Cost of everything but the layers of the space."""
    parameters = {id(p): p for p in model.parameters()}.values()
    params = sum(p.numel() for p in parameters)
    weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
    own = sum((layer.costs[0] for layer in layers.values()), Cost(0, 0, 0))
    if own.macs > total_macs:
        raise RankNASError(
            f"the layers' MACs ({own.macs}) exceed those of the model ({total_macs}); "
            "please report the model."
        )
    return Cost(total_macs - own.macs, params - own.params, weight_bytes - own.weight_bytes)


def _why(skipped: list[Skipped]) -> str:
    return "".join(f" {s.name}: {s.reason}." for s in skipped[:3])
