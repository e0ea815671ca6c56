"""Mixtures of experts whose matrices are ordinary linear layers.

``transformers`` stores the experts of a block in three-dimensional parameters, so replacing
modules cannot decompose them. `SeparateExperts` computes the same with three ``nn.Linear`` an
expert (two if the experts have no gate).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.copies import copied
from rankNAS.decompositions.layer_view import linear_of

__all__ = ["SeparateExperts", "balanced_routing", "is_fused_experts", "separate_experts"]

GATED = "gate_up_proj"
UNGATED = "up_proj"
DOWN = "down_proj"
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")

_balanced: ContextVar[bool] = ContextVar("balanced", default=False)


@contextmanager
def balanced_routing() -> Iterator[None]:
    """Context in which every expert receives its equal share of the tokens, by position.

    Costs counted in it do not depend on the router, and no value is read from a tensor, so it
    works on the ``meta`` device. Outputs are meaningless.
    """
    token = _balanced.set(True)
    try:
        yield
    finally:
        _balanced.reset(token)


class Expert(nn.Module):
    """One expert: the projections around its activation.

    Args:
        gate: The gate (intermediate, hidden); None for experts without one.
        up: The other input projection.
        down: The output projection (hidden, intermediate).
    """

    def __init__(self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down


class SeparateExperts(nn.Module):
    """The experts of a block as separate modules, with the call signature of the fused ones.

    Args:
        fused: A module of `is_fused_experts`; it provides sizes, weights and the activation.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        experts: Any = fused
        self.interleaved = not experts.is_concatenated
        self.count = len(experts.down_proj)
        for number in range(self.count):
            self.add_module(str(number), Expert(*_projections(experts, number)))
        self.activation = _without_weights(fused)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs for each token.

        Args:
            hidden_states: (tokens, hidden), or with more axes in front.
            top_k_index: The chosen experts of each token (tokens, k).
            top_k_weights: Their weights (tokens, k).
        """
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros_like(x)
        for number, tokens, weights in self._routes(top_k_index, top_k_weights):
            y = self._expert(number, x[tokens]) * weights.unsqueeze(-1)
            total.index_add_(0, tokens, y.to(total.dtype))
        return total.reshape(hidden_states.shape)

    def _expert(self, number: int, x: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(number))
        activation: Any = self.activation
        if expert.gate_proj is None:
            h = activation.act_fn(expert.up_proj(x))
        else:
            both = expert.gate_proj(x), expert.up_proj(x)
            joined = torch.stack(both, -1).flatten(-2) if self.interleaved else torch.cat(both, -1)
            h = activation._apply_gate(joined)
        found: Tensor = expert.down_proj(h)
        return found

    def _routes(self, index: Tensor, weights: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Expert, tokens (n,) and weights (n,) of every expert that is chosen."""
        if _balanced.get():
            yield from self._equal_shares(index, weights)
            return
        for number in range(self.count):
            tokens, places = torch.where(index == number)
            if len(tokens):
                yield number, tokens, weights[tokens, places]

    def _equal_shares(
        self, index: Tensor, weights: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The chosen places of all tokens, dealt out in turn."""
        places = torch.arange(index.numel(), device=index.device)
        for number in range(self.count):
            own = places[number :: self.count]
            yield number, own // index.shape[-1], weights.flatten()[own]


def separate_experts(model: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """The model with the matrices of fused experts as layers; a copy if it has any.

    The weights of the experts stay those of the model; everything else is copied.

    Args:
        model: The model.
        names: Layers or weights that the result must have; fused experts without any of them
            stay fused.
    """
    separate = {
        id(module): SeparateExperts(module)
        for path, module in model.named_modules()
        if is_fused_experts(module)
        and (names is None or any(name.startswith(f"{path}.0.") for name in names))
    }
    if not separate:
        return model
    found: nn.Module = separate.get(id(model)) or copied(model, separate)
    return found


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as ``transformers`` fuses them, and nothing else."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    own = module._parameters
    down = own.get(DOWN)
    wanted = own.get(GATED if getattr(module, "has_gate", False) else UNGATED)
    return (
        all(hasattr(module, name) for name in FLAGS)
        and hasattr(type(module), "_apply_gate")
        and down is not None
        and wanted is not None
        and down.dim() == wanted.dim() == 3
        and not getattr(module, "has_post_expert_norm", False)
        and not getattr(module, "_is_expert_parallel", False)
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _projections(fused: Any, number: int) -> tuple[nn.Linear | None, nn.Linear, nn.Linear]:
    """Gate, up and down of one expert."""
    turn = fused.is_transposed
    down = _linear(fused, DOWN, number, turn)
    if not fused.has_gate:
        return None, _linear(fused, UNGATED, number, turn), down
    rows = fused.gate_up_proj.shape[2 if turn else 1]
    if fused.is_concatenated:
        parts = slice(0, rows // 2), slice(rows // 2, None)
    else:
        parts = slice(0, None, 2), slice(1, None, 2)
    gate, up = (_linear(fused, GATED, number, turn, part) for part in parts)
    return gate, up, down


def _linear(
    fused: Any, name: str, number: int, turn: bool, part: slice = slice(None)
) -> nn.Linear:
    """The rows of one expert's matrix as a layer."""
    parameter = getattr(fused, name)
    weight = (parameter[number].mT if turn else parameter[number])[part].detach()
    bias = getattr(fused, f"{name}_bias")[number][part].detach() if fused.has_bias else None
    bias = None if bias is None else bias.contiguous()
    return linear_of(weight.contiguous(), bias, trained=parameter.requires_grad)


def _without_weights(fused: nn.Module) -> nn.Module:
    """A copy of the fused module that keeps only what its activation needs."""
    own = {id(parameter): None for parameter in fused._parameters.values()}
    found = copy.deepcopy(fused, dict(own))
    found._parameters.clear()
    return found
