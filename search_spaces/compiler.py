"""Compiler from a model and example inputs to a search space.

One forward pass under PyTorch's FLOP counter records the called layers, their number of calls and
input sizes; another finds the layers that the model needs in their place. All other quantities
follow from shapes, so a model on the ``meta`` device compiles too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rankNAS.decompositions.shapes import Cost, LayerShape, is_hf_conv1d
from rankNAS.exceptions import RankNASError, UsageError
from rankNAS.search_spaces.base import Layer, SearchSpace, Skipped
from rankNAS.search_spaces.plain_layers import overrides_forward, with_plain_layers
from rankNAS.search_spaces.policies import RankPolicy, candidate_choices
from rankNAS.search_spaces.projections import fused_projections, split_projections
from rankNAS.search_spaces.remainder import Remainder
from rankNAS.search_spaces.roles import RoleRequest, find_roles
from rankNAS.search_spaces.substitution import needed_in_place
from rankNAS.search_spaces.tracing import Trace, is_decomposable, shape_of, trace
from rankNAS.search_spaces.wrappers import unwrapped
from rankNAS.search_spaces.zoo.huggingface import named_model

__all__ = ["check_patterns", "compile_space", "count_macs", "prepared_model"]

MIN_WEIGHTS = 1024  # smaller layers stay dense


def compile_space(
    model: nn.Module | str,
    example_inputs: Any,
    *,
    policy: RankPolicy | None = None,
    exclude: Sequence[str] = (),
    keep_output_dense: bool = True,
    min_weights: int = MIN_WEIGHTS,
) -> SearchSpace:
    """The search space of a model.

    Args:
        model: Any module; ``nn.MultiheadAttention`` is treated as four linear layers. Or
            ``hf:FOLDER``, the model of a folder for ``transformers``.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments, or
            `Inputs`, on the model's device (``meta`` included). Costs refer to exactly this input.
        policy: Policy for the candidate ranks.
        exclude: Regular expressions; a layer whose path matches one of them stays dense. With
            ``role:`` in front, a role, such as ``role:k`` for key projections.
        keep_output_dense: Keep the last layer of the forward pass dense.
        min_weights: Keep layers with fewer weights dense.

    Returns:
        The space; ``space.layers`` maps names to layers, ``space.skipped`` lists dense layers and
        the reasons.

    Raises:
        UsageError: The model fails on the example inputs, no layer can be decomposed, or an
            expression of ``exclude`` is no regular expression.

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
    check_patterns(exclude)
    policy = policy or RankPolicy()
    model = prepared_model(named_model(model), example_inputs, policy)
    traced = trace(model, example_inputs)
    compiler = _Compiler(model, traced, exclude, keep_output_dense, min_weights)
    found = compiler.layers(policy)
    candidates = {name: layer.paths for name, layer in found.items()}
    needed = needed_in_place(model, candidates, traced.calls, example_inputs)
    layers = {name: layer for name, layer in found.items() if name not in needed}
    remainder = Remainder(model, traced, layers)
    reasons = compiler.reasons | {name: needed[name] for name in needed}
    skipped = [
        Skipped(names[0], reasons[names[0]], remainder.take(names))
        for names in compiler.groups
        if names[0] in reasons
    ]
    others = remainder.others()
    if not layers:
        why = _why(skipped, others, traced.total)
        raise UsageError(f"no layer of {type(model).__name__} can be decomposed.{why}")
    return SearchSpace(
        layers, (*skipped, *others), _rest(model, layers, traced.total), shape_of(example_inputs)
    )


def prepared_model(model: nn.Module, example_inputs: Any, policy: RankPolicy) -> nn.Module:
    """The model whose layers a space is made of: plain layers, and split ones if a policy says so.

    Args:
        model: The model.
        example_inputs: See `compile_space`.
        policy: Says whether fused projections are split.
    """
    model = with_plain_layers(model)
    sizes = fused_projections(model) if policy.split_fused else {}
    if not sizes:
        return model
    traced = trace(model, example_inputs)
    compiler = _Compiler(model, traced, (), False, 0)
    alone = {names[0] for names in compiler.groups if len(names) == 1}
    usable = {p: [p] for p in sizes if p in alone and compiler.unsupported([p]) is None}
    needed = needed_in_place(model, usable, traced.calls, example_inputs)
    return split_projections(model, usable.keys() - needed.keys())


def check_patterns(exclude: Sequence[str]) -> None:
    """Raise a UsageError unless all texts are regular expressions or ask for a role."""
    for pattern in exclude:
        try:
            if RoleRequest.of(pattern) is None:
                re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(
                f"`exclude` {pattern[:100]!r} is no regular expression ({error}); give one such "
                r"as 'layer4' or '^head\.', with \ before each of ()[]{}.*+?^$| that is meant "
                "literally."
            ) from None


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass, as ``torch.utils.flop_counter`` counts them."""
    return trace(unwrapped(model), example_inputs).total


class _Compiler:
    """The groups of decomposable modules with one weight, and what becomes of each.

    Args:
        model: The model.
        traced: Its forward pass.
        exclude: Patterns of layers that stay dense.
        keep_output_dense: Keep the last layer dense.
        min_weights: Keep layers with fewer weights dense.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Trace,
        exclude: Sequence[str],
        keep_output_dense: bool,
        min_weights: int,
    ) -> None:
        self._model, self._calls, self._readers = model, traced.calls, traced.readers
        self._exclude, self._min_weights = exclude, min_weights
        order = {name: position for position, name in enumerate(traced.calls)}
        self.groups = sorted(
            _tied(model), key=lambda names: min(order.get(n, len(order)) for n in names)
        )
        last = next(reversed(traced.calls), None)
        self._output = last if keep_output_dense else None
        self._sites, self._roles = (
            traced.sites,
            find_roles(_linear_shapes(model, traced.calls), traced.sites, last),
        )
        self.reasons: dict[str, str] = {}  # by the first name of a group that stays dense

    def layers(self, policy: RankPolicy) -> dict[str, Layer]:
        """The groups that can be decomposed; `reasons` has the others."""
        found: dict[str, Layer] = {}
        for names in self.groups:
            reason = self.unsupported(names)
            if reason is None:
                shape = self._shape(names)
                reason = self._unsuitable(names, shape)
            if reason is None:
                choices, costs = candidate_choices(shape, policy)
                if len(choices) == 1:
                    reason = "no rank costs less than the dense layer"
                else:
                    name, roles = names[0], self._roles.get(names[0], ())
                    site = self._sites.get(name, "")
                    found[name] = Layer(name, tuple(names[1:]), shape, choices, costs, roles, site)
            if reason is not None:
                self.reasons[names[0]] = reason
        return found

    def _shape(self, names: list[str]) -> LayerShape:
        calls = tuple(call for name in names for call in self._calls.get(name, ()))
        return LayerShape.of(self._model.get_submodule(names[0]), calls)

    def unsupported(self, names: list[str]) -> str | None:
        """Why modules cannot be replaced, whatever their shape, or None."""
        modules = [self._model.get_submodule(name) for name in names]
        reader = next((self._readers[name] for name in names if name in self._readers), "")
        checks: list[tuple[str, Callable[[], bool]]] = [
            ("the model itself: wrap it in nn.Sequential", lambda: "" in names),
            ("excluded", lambda: any(self._excludes(e, n) for e in self._exclude for n in names)),
            ("its weight is parametrised", lambda: any(map(_is_computed, modules))),
            ("its class overrides forward", lambda: any(map(overrides_forward, modules))),
            (
                "its forward is replaced on the instance",
                lambda: any("forward" in vars(module) for module in modules),
            ),
            ("it has a forward hook", lambda: any(m._forward_hooks for m in modules)),
            ("it has a forward pre-hook", lambda: any(m._forward_pre_hooks for m in modules)),
            (
                f"its weight is {_dtype(modules[0])}, no real floating-point type",
                lambda: not all(_is_floating(module) for module in modules),
            ),
            (
                f"its weight is used by {reader}, outside its own call"
                if reader
                else "not called in the forward pass",
                lambda: not any(map(self._calls.get, names)),
            ),
        ]
        return next((reason for reason, applies in checks if applies()), None)

    def _excludes(self, text: str, name: str) -> bool:
        """Whether an expression or a role is that of a layer."""
        request = RoleRequest.of(text)
        if request is None:
            return re.search(text, name) is not None
        return request.role in self._roles.get(name, ())

    def _unsuitable(self, names: list[str], shape: LayerShape) -> str | None:
        """Why a layer of this shape and with these uses of its weight stays dense, or None."""
        modules = [self._model.get_submodule(name) for name in names]
        checks: list[tuple[str, Callable[[], bool]]] = [
            ("output layer", lambda: self._output in names),
            ("depthwise: one channel a group", lambda: 1 < shape.groups == shape.inputs),
            (
                f"tiny: fewer than {self._min_weights} weights",
                lambda: shape.outputs * shape.width < self._min_weights,
            ),
            (
                "its weight is used by another kind of module",
                lambda: _shared(self._model, modules),
            ),
            ("its weight is tied under different biases", lambda: _biases(modules) > 1),
            ("its weight is tied under different settings", lambda: _settings(modules) > 1),
        ]
        return next((reason for reason, applies in checks if applies()), None)


def _tied(model: nn.Module) -> list[list[str]]:
    """Paths of decomposable modules, grouped by weight, in the model's order."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_decomposable(module):
            weight = module._parameters.get("weight")  # a property if parametrised
            groups.setdefault(id(module if weight is None else weight), []).append(name)
    return list(groups.values())


def _linear_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, LayerShape]:
    """The shapes of linear layers."""
    modules = {name: model.get_submodule(name) for name in names}
    return {
        name: LayerShape.of(module)
        for name, module in modules.items()
        if isinstance(module, nn.Linear) or is_hf_conv1d(module)
        if isinstance(module.weight, Tensor) and module.weight.dim() == 2
    }


def _dtype(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    return "" if weight is None else str(weight.dtype).removeprefix("torch.")


def _is_floating(module: nn.Module) -> bool:
    weight = module._parameters["weight"]
    return weight is not None and weight.is_floating_point()


def _is_computed(module: nn.Module) -> bool:
    return is_parametrized(module) or not {"weight", "bias"} <= module._parameters.keys()


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


def _why(skipped: Sequence[Skipped], others: Sequence[Skipped], total_macs: int) -> str:
    """The reasons for the largest parts of a model without layers, and where its MACs lie."""
    parts = [*skipped, *others]
    most = sorted(parts, key=lambda s: (s.cost.macs, s.cost.params), reverse=True)
    reasons: dict[str, str] = {}
    for part in most:
        reasons.setdefault(part.reason, part.name)
    words = "".join(f" {name}: {reason}." for reason, name in list(reasons.items())[:3])
    largest = max(others, key=lambda s: s.cost.macs, default=None)
    if largest is None or not largest.cost.macs:
        return words
    share = 100 * largest.cost.macs / total_macs
    return f"{words} {share:.0f} % of the MACs lie in {largest.name}: {largest.reason}."
