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
        for layer in config.ranknas["layers"]:
            chain = nn.Sequential(*(_stage(**stage) for stage in layer["stages"]))
            for path in layer["paths"]:
                place, _, name = path.rpartition(".")
                setattr(self.get_submodule(place), name, chain)


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
