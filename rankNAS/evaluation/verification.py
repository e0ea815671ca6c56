"""Verification: a network that is handed out is the function that was measured.

The compressed network is built from thin layers, while trials are measured on a network with their
products as dense weights. A model can tell the two apart, for example by reading a layer's weight
outside its call. A check on a few samples finds this before anyone uses or trains the network.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from rankNAS.allocation import Choice
from rankNAS.exceptions import NetworkError
from rankNAS.models.agreement import fixed_pass, relative_difference, tolerance, watched
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import count_macs
from rankNAS.trees import Inputs, tensors

__all__ = ["SAMPLES", "verify_costs", "verify_outputs"]

logger = logging.getLogger(__name__)
SAMPLES = 4  # on which outputs are compared
NEXT = "leave the layer dense (`exclude` of compile_space, or --exclude) and report the model."


def verify_outputs(network: nn.Module, reference: nn.Module, inputs: Inputs) -> None:
    """Raise a NetworkError unless two networks have equal outputs within rounding.

    Args:
        network: The network that is handed out.
        reference: The network that was measured.
        inputs: Arguments for a few samples.
    """
    expected = fixed_pass(reference, inputs)
    try:
        found = fixed_pass(network, inputs)
    except Exception as error:
        raise NetworkError(
            "the compressed network does not run on the validation samples, although the network "
            f"that was measured does: {type(error).__name__}: {error}; a module may read a layer "
            f"other than by calling it: {NEXT}"
        ) from error
    most = tolerance(reference, expected)
    if _agree(found, expected, most):
        return
    if not _agree(fixed_pass(reference, inputs), expected, most):
        logger.warning(
            "the compressed network is not compared with the measured one, because the outputs of "
            "the model differ from pass to pass."
        )
        return
    raise NetworkError(
        f"the compressed network differs from the one that was measured: "
        f"{_first_difference(network, reference, inputs, most)} by more than rounding "
        f"({most:.1g} of its norm); {NEXT}"
    )


def verify_costs(
    network: nn.Module,
    space: SearchSpace,
    allocation: Mapping[str, Choice],
    dense: nn.Module,
    inputs: Inputs,
) -> None:
    """Raise a NetworkError unless a network has the counted costs of its allocation.

    Args:
        network: The network.
        space: Its space.
        allocation: Its allocation.
        dense: The dense model.
        inputs: The arguments that costs refer to, on the device of the network.
    """
    cost = space.cost(allocation)
    params = sum(parameter.numel() for parameter in network.parameters())
    if params != cost.params:
        raise NetworkError(
            f"the compressed network has {params} parameters, but its allocation costs "
            f"{cost.params}{_resized(network, space, allocation)}; {NEXT}"
        )
    shapes = [tuple(tensor.shape) for tensor in tensors(inputs)]
    if space.input_shape and space.input_shape not in shapes:
        logger.info("MACs are not counted again: costs are for inputs %s", space.input_shape)
        return
    counted = count_macs(network, inputs)
    if counted == cost.macs:
        return
    if count_macs(dense, inputs) != space.dense_cost.macs:
        logger.info("MACs are not compared: those of the dense model depend on its inputs")
        return
    raise NetworkError(
        f"the compressed network has {counted} MACs, but its allocation costs {cost.macs}; {NEXT}"
    )


def _agree(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], most: float) -> bool:
    return found.keys() == expected.keys() and all(
        relative_difference(x, expected[name]) <= most for name, x in found.items()
    )


def _first_difference(
    network: nn.Module, reference: nn.Module, inputs: Inputs, most: float
) -> str:
    """The first layer whose output differs, in words."""
    calls: dict[str, list[Tensor]] = {}
    with watched(reference, lambda name, x: calls.setdefault(name, []).append(x.clone())):
        fixed_pass(reference, inputs)
    different: list[str] = []

    def compare(name: str, x: Tensor) -> None:
        if waiting := calls.get(name):
            expected = waiting.pop(0)
            if not different and relative_difference(x, expected) > most:
                different.append(name)

    with watched(network, compare):
        fixed_pass(network, inputs)
    if not different or different == [""]:
        return "its output differs, and that of no layer does,"
    return f"the output of layer {different[0]!r} differs"


def _resized(network: nn.Module, space: SearchSpace, allocation: Mapping[str, Choice]) -> str:
    """The first layer with another number of parameters, in words."""
    for name, choice in allocation.items():
        params = sum(parameter.numel() for parameter in network.get_submodule(name).parameters())
        if params != space.layers[name][choice].params:
            expected = space.layers[name][choice].params
            return f", and layer {name!r} has {params} instead of {expected}"
    return ""
