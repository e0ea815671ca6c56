"""Bounds on the description of a network in a file, checked before anything is allocated.

A file may have a right checksum and still describe a network that no search has made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.decompositions import OPERATORS
from rankNAS.decompositions.shapes import LayerShape, is_hf_conv1d
from rankNAS.exceptions import UsageError, WeightsError
from rankNAS.plugins import is_plugin
from rankNAS.search_spaces.zoo.huggingface import is_huggingface

__all__ = ["check_choices", "check_sizes"]

MOST_ENTRIES = 1 << 26  # of one input
PARTS = {"svd": 1, "spatial_svd": 1, "tucker2": 2, "group_svd": 2}  # numbers of a rank


def check_sizes(model: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """Raise a WeightsError if a built-in model's classes or input sizes cannot be those of a file.

    Args:
        model: The description of the model.
        state: The tensors of the file.
        source: The file's name in messages.
    """
    if "space" not in model or is_plugin(model["space"]) or is_huggingface(model["space"]):
        return  # the caller's factory does not read them
    classes, shape = model["num_classes"], model["input_shape"]
    if not 1 <= classes or all(classes not in tensor.shape for tensor in state.values()):
        raise WeightsError(
            f"the metadata of {source!r} asks for {classes} classes, but no tensor of the file "
            "has so many entries along an axis; fetch the file again."
        )
    if any(size < 1 for size in shape) or math.prod(shape) > MOST_ENTRIES:
        raise WeightsError(
            f"the metadata of {source!r} asks for inputs of shape {shape}; expected positive "
            f"sizes and at most {MOST_ENTRIES} entries."
        )


def check_choices(model: nn.Module, allocation: Allocation, source: str) -> None:
    """Raise a UsageError unless every choice of an allocation is one for a layer of the model.

    Args:
        model: The dense model, with separate attention projections.
        allocation: The allocation.
        source: The file's name in messages.
    """
    for name, choice in allocation.items():
        if choice == DENSE:
            continue
        try:
            module = model.get_submodule(name) if name else None
        except AttributeError:
            module = None
        if module is None:
            raise UsageError(f"the model has no layer {name!r}; is it another model?")
        if reason := _refused(module, choice):
            raise WeightsError(
                f"the metadata of {source!r} has the choice {str(choice)!r} for layer {name!r}: "
                f"{reason}; fetch the file again."
            )


def _refused(module: nn.Module, choice: Choice) -> str | None:
    """Why a choice cannot be one of a layer; None if it can."""
    if not (isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or is_hf_conv1d(module)):
        return f"a {type(module).__name__} cannot be decomposed"
    if choice.operator not in OPERATORS:
        return f"there is no operator {choice.operator!r}"
    operator, shape = OPERATORS[choice.operator], LayerShape.of(module)
    if reason := operator.refuses(shape):
        return reason
    if len(choice.rank) != PARTS.get(choice.operator, len(choice.rank)):
        return f"expected {PARTS[choice.operator]} numbers"
    most = max(shape.inputs, shape.outputs) * math.prod(shape.kernel)
    if not choice.rank or not all(1 <= rank <= most for rank in choice.rank):
        return f"a rank must be between 1 and {most}"
    try:
        stages = operator.stages(shape, choice.rank)
    except (ValueError, IndexError, ZeroDivisionError, ArithmeticError) as error:
        return f"the operator has no such rank: {error}"
    for stage in stages:
        sizes = (stage.inputs, stage.outputs, stage.groups)
        if min(sizes) < 1 or stage.inputs % stage.groups or stage.outputs % stage.groups:
            return "the rank does not divide the channels of the layer"
    return None
