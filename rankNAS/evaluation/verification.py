"""Verification: a network that is handed out is the function that was measured.

The compressed network is built from thin layers, while trials are measured on a network with their
products as dense weights. A model can tell the two apart, for example by reading a layer's weight
outside its call. A check on a few samples finds this before anyone uses or trains the network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.allocation import Choice
from rankNAS.exceptions import NetworkError
from rankNAS.models.agreement import fixed_pass, relative_difference, tolerance, watched
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.tracing import trace
from rankNAS.tasks.headed import output_head, without_head
from rankNAS.trees import Inputs, tensors

__all__ = ["SAMPLES", "verify_costs", "verify_outputs", "verify_plain"]

logger = logging.getLogger(__name__)
SAMPLES = 4  # on which outputs are compared
POSITIONS = 64  # of a language model whose logits are compared
EXCESS = 4.0  # times the change by rounding: two networks may differ so much
NEXT = "leave the layer dense (`exclude` of compile_space, or --exclude) and report the model."


def verify_outputs(network: nn.Module, reference: nn.Module, inputs: Inputs) -> None:
    """Raise a NetworkError unless two networks have equal outputs within rounding.

    Args:
        network: The network that is handed out.
        reference: The network that was measured.
        inputs: Arguments for a few samples.
    """
    expected = _pass(reference, inputs)
    try:
        found = _pass(network, inputs)
    except Exception as error:
        raise NetworkError(
            "the compressed network does not run on the validation samples, although the network "
            f"that was measured does: {type(error).__name__}: {error}; a module may read a layer "
            f"other than by calling it: {NEXT}"
        ) from error
    most = tolerance(reference, expected)
    if _agree(found, expected, most):
        return
    if not _agree(_pass(reference, inputs), expected, most):
        logger.warning(
            "the compressed network is not compared with the measured one, because the outputs of "
            "the model differ from pass to pass."
        )
        return
    rounding = _rounding(reference, inputs, expected)
    if rounding > most and _agree(found, expected, EXCESS * rounding):
        logger.warning(
            "rounding changes the outputs of the compressed network by %.1g of their norm, so its "
            "metrics may differ from those that were measured; a type with more digits helps.",
            rounding,
        )
        return
    raise NetworkError(
        f"the compressed network differs from the one that was measured: "
        f"{_first_difference(network, reference, inputs, most)} by more than rounding "
        f"({most:.1g} of its norm); {NEXT}"
    )


def verify_plain(plain: nn.Module, model: nn.Module, inputs: Inputs) -> None:
    """Raise a NetworkError unless a model and that with plain layers have equal outputs.

    Args:
        plain: From `with_plain_layers`.
        model: What it was made from.
        inputs: Arguments for a few samples.
    """
    if plain is model:
        return
    expected, found = fixed_pass(model, inputs), fixed_pass(plain, inputs)
    most = tolerance(model, expected)
    if _agree(found, expected, most) or not _agree(fixed_pass(model, inputs), expected, most):
        return
    raise NetworkError(
        f"{type(model).__name__} computes something else once its layers are plain ones: "
        f"{_first_difference(plain, model, inputs, most)}; if the forward method of a layer's "
        "class depends on the size of its input, let the class derive from nn.Module, so that it "
        "stays as it is."
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
    layers = {space.layers[name].paths: space.layers[name][c] for name, c in allocation.items()}
    if params != cost.params:
        costs = {paths: c.params for paths, c in layers.items()}
        where = _unequal(_params(network), _params(dense), costs)
        raise NetworkError(
            f"the compressed network has {params} parameters, but its allocation costs "
            f"{cost.params}{where}; {NEXT}"
        )
    shapes = [tuple(tensor.shape) for tensor in tensors(inputs)]
    if space.input_shape and space.input_shape not in shapes:
        logger.info("MACs are not counted again: costs are for inputs %s", space.input_shape)
        return
    found = trace(network, inputs)
    if found.total == cost.macs:
        return
    whole = trace(dense, inputs)
    if whole.total != space.dense_cost.macs:
        logger.info("MACs are not compared: those of the dense model depend on its inputs")
        return
    where = _unequal(found.macs, whole.macs, {paths: c.macs for paths, c in layers.items()})
    raise NetworkError(
        f"the compressed network has {found.total} MACs, but its allocation costs {cost.macs}"
        f"{where}; {NEXT}"
    )


def _pass(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The floating-point tensors of a network's output; of a language model few logits."""
    head = output_head(network)
    with without_head(network):
        found = fixed_pass(network, inputs)
    if head is not None and found.keys() == {"hidden"}:
        with torch.no_grad():
            found["logits"] = head(found["hidden"].flatten(0, -2)[:POSITIONS])
    return found


def _rounding(network: nn.Module, inputs: Inputs, expected: Mapping[str, Tensor]) -> float:
    """The relative change of a network's outputs when each layer's output is rounded once more.

    Rounding is imitated by noise of the machine epsilon times the norm of an output's last axis.
    """
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        eps = torch.finfo(output.dtype).eps
        noise = torch.randn(output.shape, generator=generator).to(output)
        size = output.square().mean(-1, keepdim=True).sqrt() if output.dim() else output.abs()
        return output + eps * size * noise

    weighted = {path.rpartition(".")[0] for path, _ in network.named_parameters()}
    leaves = [network.get_submodule(path) for path in weighted]
    handles = [leaf.register_forward_hook(disturb) for leaf in leaves]
    try:
        found = _pass(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return max(relative_difference(x, expected[name]) for name, x in found.items())


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
        _pass(reference, inputs)
    different: list[str] = []

    def compare(name: str, x: Tensor) -> None:
        if waiting := calls.get(name):
            expected = waiting.pop(0)
            if not different and relative_difference(x, expected) > most:
                different.append(name)

    with watched(network, compare):
        _pass(network, inputs)
    if not different or different == [""]:
        return "its output differs, and that of no layer does,"
    return f"the output of layer {different[0]!r} differs"


def _params(network: nn.Module) -> dict[str, int]:
    """The number of own parameters by path of a module; a shared one counts for the first."""
    counted: set[int] = set()
    found = {}
    for path, module in network.named_modules():
        new = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted.update(map(id, new))
        found[path] = sum(p.numel() for p in new)
    return found


def _unequal(
    found: Mapping[str, int], whole: Mapping[str, int], costs: Mapping[tuple[str, ...], int]
) -> str:
    """The first layer, or else the first other module, of another cost, in words.

    Args:
        found: The cost of each module itself by path, in the network.
        whole: That in the dense model.
        costs: The costs of the layers by their paths.
    """
    for paths, expected in costs.items():
        cost = sum(c for p, c in found.items() if _within(p, paths))
        if cost != expected:
            return f", and layer {paths[0]!r} has {cost} instead of {expected}"
    layers = tuple(path for paths in costs for path in paths)
    for path in dict.fromkeys((*whole, *found)):
        cost, expected = found.get(path, 0), whole.get(path, 0)
        if cost != expected and not _within(path, layers):
            name = repr(path) if path else "the model itself"
            return f", and {name} has {cost} instead of {expected}"
    return ""


def _within(path: str, layers: Iterable[str]) -> bool:
    """Whether a module is a layer or inside one."""
    return any(path == layer or path.startswith(f"{layer}.") for layer in layers)
