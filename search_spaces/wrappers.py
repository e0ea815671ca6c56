"""Models as plain trees of modules: wrappers removed, programs without modules refused."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rankNAS.exceptions import UsageError

__all__ = ["innermost", "searchable", "unwrapped"]

PROGRAMS = {
    "ExportedProgram": "an exported program (torch.export)",
    "FullyShardedDataParallel": "sharded over processes (FSDP)",
    "FSDPModule": "sharded over processes (FSDP)",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without ``torch.compile``, ``DataParallel`` and DDP, at any depth.

    The names are those of the model that was wrapped. A model with wrappers inside is copied;
    the copy shares its parameters and buffers.

    Raises:
        UsageError: The model is no tree of modules with weights: TorchScript, an exported program,
            a sharded model, or a lazy module that has not run yet.
    """
    _refuse_programs(model)
    model = innermost(model)
    _refuse_programs(model)
    for name, module in model.named_modules():
        if name and (words := _program(module)).endswith("(FSDP)"):
            raise UsageError(
                f"layer {name!r} is {words}, and cannot be replaced; give the model that it was "
                "made from."
            )
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise UsageError(
                f"layer {name!r} is a {type(module).__name__} that has not run yet, so it has no "
                "weights; run the model once on an example first."
            )
    wrappers = [module for module in model.modules() if _inner(module) is not None]
    if not wrappers and not any(module._compiled_call_impl for module in model.modules()):
        return model
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for wrapper in reversed(wrappers):  # inner ones first
        memo[id(wrapper)] = copy.deepcopy(_inner(wrapper), memo)
    return copy.deepcopy(model, memo)  # a copy drops what `Module.compile` has compiled


def innermost(model: nn.Module) -> nn.Module:
    """The model that wrappers around it wrap, itself and not a copy."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def searchable(model: nn.Module) -> nn.Module:
    """The model without wrappers, whose parameters have values.

    Raises:
        UsageError: As for `unwrapped`; or a parameter is on the ``meta`` device.
    """
    model = unwrapped(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"parameter {name!r} is on the meta device and has no values; load the weights "
                "on a real device first (`model.to_empty(device=...)`, then its state dict)."
            )
    return model


def _inner(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper wraps; None for any other module."""
    wrapped: Any = None
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        wrapped = module.module
    elif type(module).__name__ == "OptimizedModule":  # its import would load the compiler
        wrapped = module._modules.get("_orig_mod")
    return wrapped if isinstance(wrapped, nn.Module) else None


def _refuse_programs(model: Any) -> None:
    kind, words = type(model).__name__, _program(model)
    if isinstance(model, torch.jit.ScriptModule):
        words = "a TorchScript program"
    elif isinstance(model, torch.fx.GraphModule) and "eval" in vars(model):
        words = PROGRAMS["ExportedProgram"]  # its `module()`, which has no modes
    elif not words and not isinstance(model, nn.Module):
        words = "no nn.Module"
    if words:
        raise UsageError(
            f"the model ({kind}) is {words}, whose layers cannot be replaced; give the nn.Module "
            "that it was made from."
        )


def _program(model: Any) -> str:
    """What a model of a class without layers of its own is; empty for any other."""
    return next((PROGRAMS[c.__name__] for c in type(model).__mro__ if c.__name__ in PROGRAMS), "")
