"""Multi-head attention with projections as ordinary linear layers.

``nn.MultiheadAttention`` keeps the query, key and value projections in one fused parameter and
never calls its output projection as a module, so replacing modules cannot decompose them.
`separate_attention` replaces each by an equivalent module that calls four ``nn.Linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.copies import copied
from rankNAS.decompositions.layer_view import linear_of
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.wrappers import unwrapped

__all__ = ["SeparateAttention", "separate_attention"]


class SeparateAttention(nn.Module):
    """``nn.MultiheadAttention`` with separate projections and the same call signature.

    Args:
        attention: The module that provides the sizes and the weights (by reference or by slice).

    Raises:
        UsageError: The module uses ``add_bias_kv`` or ``add_zero_attn``.
    """

    # nn.TransformerEncoderLayer reads this and then skips its fused fast path.
    _qkv_same_embed_dim = False
    bias_k = bias_v = None
    add_zero_attn = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.bias_k is not None or attention.add_zero_attn:
            raise UsageError("attention with `add_bias_kv` or `add_zero_attn` is not supported.")
        self.embed_dim, self.head_dim = attention.embed_dim, attention.head_dim
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.num_heads = attention.num_heads
        self.batch_first = attention.batch_first
        self.dropout = attention.dropout
        self.q_proj, self.k_proj, self.v_proj = _input_projections(attention)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and weights of attention; see ``nn.MultiheadAttention`` for shapes and masks.

        Raises:
            UsageError: ``is_causal``, a hint about the mask, is given without a mask.
        """
        if is_causal and attn_mask is None:
            raise UsageError("`is_causal` needs the causal mask itself in `attn_mask`.")
        batched = query.dim() == 3
        if batched and not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            _heads(x if batched else x.unsqueeze(0), self.num_heads)
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        mask = _mask(attn_mask, key_padding_mask, q)
        y, weights = self._attend(q, k, v, mask, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # (batch, length, embed)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    @property
    def in_proj_weight(self) -> Tensor:
        """The weights of the projections as one matrix, for a model that reads it.

        Raises:
            AttributeError: They differ in width, so that the attention had none either.
        """
        if not self.embed_dim == self.kdim == self.vdim:
            raise AttributeError("the projections are no single matrix")
        return torch.cat([p.weight for p in (self.q_proj, self.k_proj, self.v_proj)])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The biases of the projections as one vector, also of decomposed ones; None without."""
        found = [_bias(p) for p in (self.q_proj, self.k_proj, self.v_proj)]
        biases = [bias for bias in found if bias is not None]
        return torch.cat(biases) if biases else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
            return y, None
        scores = q @ k.mT / q.shape[-1] ** 0.5
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = functional.dropout(weights, dropout)
        return weights @ v, weights


def separate_attention(model: nn.Module) -> nn.Module:
    """The model without wrappers, with each ``nn.MultiheadAttention`` replaced.

    It is a copy if the model contains any. Those that a separate module would not equal stay:
    subclasses that override forward, added keys (``add_bias_kv``, ``add_zero_attn``), hooks, and a
    forward that is replaced on the instance.

    Raises:
        UsageError: The model is no tree of modules with weights; see `unwrapped`.
    """
    model = unwrapped(model)
    if not any(map(_is_attention, model.modules())):
        return model
    model = copied(model)
    if _is_attention(model):
        return SeparateAttention(model)  # type: ignore[arg-type]
    separate = {m: SeparateAttention(m) for m in model.modules() if _is_attention(m)}  # type: ignore[arg-type]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # a shared module under all names
            if child in separate:
                setattr(parent, name, separate[child])
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # nested tensors need the fused parameter
    return model


def _is_attention(module: nn.Module) -> bool:
    own = nn.MultiheadAttention
    return (
        isinstance(module, own)
        and type(module).forward is own.forward
        and "forward" not in vars(module)
        and module.bias_k is None
        and not module.add_zero_attn
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _input_projections(attention: nn.MultiheadAttention) -> list[nn.Linear]:
    if attention._qkv_same_embed_dim:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    bias = attention.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [_linear(w, b) for w, b in zip(weights, biases, strict=True)]


def _bias(projection: nn.Module) -> Tensor | None:
    named = projection.named_parameters()
    return next((p for name, p in named if name.rpartition(".")[2] == "bias"), None)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    copy = None if bias is None else bias.detach().clone()
    linear = linear_of(weight.detach().clone(), copy, trained=weight.requires_grad)
    if bias is not None:
        linear.bias.requires_grad_(bias.requires_grad)
    return linear


def _heads(x: Tensor, heads: int) -> Tensor:  # (batch, length, embed) -> (batch, heads, length, d)
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """One additive mask, broadcastable to (batch, heads, queries, keys)."""
    total: Tensor | None = None
    if attn_mask is not None:
        additive = _additive(attn_mask, q)
        if additive.dim() == 3:  # (batch * heads, queries, keys)
            additive = additive.unflatten(0, (-1, q.shape[1]))
        total = additive
    if padding is not None:
        additive = _additive(padding, q)
        additive = additive.reshape(-1, 1, 1, additive.shape[-1])
        total = additive if total is None else total + additive
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """An additive mask: true in a Boolean mask excludes; float masks are added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
