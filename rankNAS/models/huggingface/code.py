"""The module of an exported folder: a class of ``transformers`` whose layers are decomposed."""

from __future__ import annotations

from typing import Any

from rankNAS.decompositions.shapes import LayerShape

__all__ = ["MODULE", "module_text", "stage_arguments"]

MODULE = "modeling_ranknas"
CODE = '''"""{model} with low-rank layers, made by RankNAS. It needs transformers alone."""

import torch
from torch import nn
from transformers import {config}, {model}


class RankNASConfig({config}):
    model_type = "{kind}"


class RankNAS{model}({model}):
    """{model} in which chains of smaller layers replace the layers of config.ranknas."""

    config_class = RankNASConfig

    def __init__(self, config):
        super().__init__(config)
        for path in config.ranknas["experts"]:
            self._put(path, Experts(self.get_submodule(path)))
        for path, sizes in config.ranknas["projections"].items():
            self._put(path, SplitProjection(self.get_submodule(path), **sizes))
        for layer in config.ranknas["layers"]:
            chain = nn.Sequential(*(_stage(**stage) for stage in layer["stages"]))
            for path in layer["paths"]:
                self._put(path, chain)

    def _put(self, path, module):
        place, _, name = path.rpartition(".")
        setattr(self.get_submodule(place), name, module)


class Experts(nn.Module):
    """The experts of a block, each with layers of its own."""

    def __init__(self, fused):
        super().__init__()
        self.count, bias, turned = len(fused.down_proj), fused.has_bias, fused.is_transposed
        hidden, middle = fused.down_proj.shape[1:]
        if turned:
            hidden, middle = middle, hidden
        for number in range(self.count):
            expert = nn.Module()
            expert.gate_proj = nn.Linear(hidden, middle, bias) if fused.has_gate else None
            expert.up_proj = nn.Linear(hidden, middle, bias)
            expert.down_proj = nn.Linear(middle, hidden, bias)
            self.add_module(str(number), expert)
        self.interleaved = not fused.is_concatenated
        fused._parameters.clear()
        self.activation = fused

    def forward(self, hidden_states, top_k_index, top_k_weights):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros_like(x)
        for number in range(self.count):
            tokens, places = torch.where(top_k_index == number)
            if len(tokens):
                y = self._expert(self.get_submodule(str(number)), x[tokens])
                y = y * top_k_weights[tokens, places].unsqueeze(-1)
                total.index_add_(0, tokens, y.to(total.dtype))
        return total.reshape(hidden_states.shape)

    def _expert(self, expert, x):
        if expert.gate_proj is None:
            return expert.down_proj(self.activation.act_fn(expert.up_proj(x)))
        both = expert.gate_proj(x), expert.up_proj(x)
        joined = torch.stack(both, -1).flatten(-2) if self.interleaved else torch.cat(both, -1)
        return expert.down_proj(self.activation._apply_gate(joined))


class SplitProjection(nn.Module):
    """Layers with the same input whose outputs are joined, perhaps head by head."""

    def __init__(self, fused, parts, bias, size):
        super().__init__()
        inputs = fused.weight.shape[0 if type(fused).__name__ == "Conv1D" else 1]
        self.names, self.size = [name for name, _ in parts], size
        for name, outputs in parts:
            self.add_module(name, nn.Linear(inputs, outputs, bias))

    def forward(self, x):
        parts = [self.get_submodule(name)(x) for name in self.names]
        if self.size is None:
            return torch.cat(parts, -1)
        return torch.stack([part.unflatten(-1, (-1, self.size)) for part in parts], -2).flatten(-3)


class GroupedLinear(nn.Module):
    """A block-diagonal linear layer; its weight is (groups, outputs / groups, inputs / groups)."""

    def __init__(self, inputs, outputs, groups, bias):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups, outputs // groups, inputs // groups))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        blocks = x.reshape(-1, self.groups, self.weight.shape[2]).transpose(0, 1)
        y = torch.bmm(blocks, self.weight.transpose(1, 2)).transpose(0, 1)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _stage(inputs, outputs, bias, groups=1, kernel_size=(), **options):
    if kernel_size:
        kind = nn.Conv1d if len(kernel_size) == 1 else nn.Conv2d
        options = {{n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}}
        return kind(inputs, outputs, tuple(kernel_size), groups=groups, bias=bias, **options)
    if groups > 1:
        return GroupedLinear(inputs, outputs, groups, bias)
    return nn.Linear(inputs, outputs, bias)
'''


def module_text(config: str, model: str, kind: str) -> str:
    """The text of the module.

    Args:
        config: The class of the configuration.
        model: The class of the model.
        kind: The name of the kind of model in the configuration of the folder.
    """
    return CODE.format(config=config, model=model, kind=kind)


def stage_arguments(shape: LayerShape) -> dict[str, Any]:
    """The arguments of ``_stage`` for one layer of a chain."""
    found: dict[str, Any] = {
        "inputs": shape.inputs,
        "outputs": shape.outputs,
        "bias": shape.bias,
        "groups": shape.groups,
    }
    if not shape.kernel:
        return found
    sizes = {
        "kernel_size": shape.kernel,
        "stride": shape.stride,
        "padding": shape.padding,
        "dilation": shape.dilation,
    }
    listed = {n: v if isinstance(v, str) else list(v) for n, v in sizes.items()}
    return found | listed | {"padding_mode": shape.padding_mode}
