"""Outputs on fixed inputs in the file of a network, and their comparison after loading.

The inputs are random and follow from their form alone. If another version of PyTorch draws other
numbers, nothing is compared.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from torch import Tensor, nn

from rankNAS.exceptions import RankNASError, WeightsError
from rankNAS.models.agreement import Sketches, fixed_pass, tolerance, watched
from rankNAS.models.inputs import InputSpec
from rankNAS.search_spaces.compiler import count_macs
from rankNAS.trees import Inputs, device_of, named_tensors, to_device

__all__ = ["CHECK", "compare", "sketched"]

logger = logging.getLogger(__name__)
CHECK = "outputs"  # the entry of a file's metadata
COUNT = 2  # samples
SAME = 1e-4  # relative difference of inputs that are the same


def sketched(network: nn.Module, spec: InputSpec | None) -> dict[str, Any] | None:
    """Outputs, outputs of layers, parameters and MACs of a network, as JSON values.

    Args:
        network: The network.
        spec: The form of its arguments; None if unknown.

    Returns:
        None if the network does not run on random arguments of this form, or its outputs differ
        from pass to pass.
    """
    if spec is None or device_of(network).type == "meta":
        logger.info("no outputs are stored with the network: its inputs are not known")
        return None
    try:
        given = spec.random(COUNT)
        found = _measured(network, given)
        again = Sketches.of(fixed_pass(network, given), found["rounding"])
    except Exception as error:
        logger.info("no outputs are stored: the network fails on random inputs: %s", error)
        return None
    if not again.agree(found["outputs"]):
        logger.info("no outputs are stored: those of the network differ from pass to pass")
        return None
    return found


def compare(network: nn.Module, text: str, spec: InputSpec | None, source: str) -> None:
    """Raise a WeightsError unless a network computes what `sketched` found when it was saved.

    Args:
        network: The network, in evaluation mode.
        text: The JSON text of `sketched`.
        spec: The form of its arguments.
        source: The name of its file in messages.
    """
    try:
        if spec is None:
            raise ValueError("the form of its inputs is missing")
        stored = json.loads(text)
        given = spec.random(COUNT)
        if not Sketches.of(_named(given), SAME).agree(stored["inputs"]):
            logger.warning("%s is not compared: this PyTorch draws other random inputs", source)
            return
        found = _rerun(network, given, source)
        reason = None if found is None else _difference(found, stored)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"the outputs in {source!r} are damaged: {error!r}") from None
    if reason is not None:
        raise _differs(source, reason)


def _rerun(network: nn.Module, given: Inputs, source: str) -> dict[str, Any] | None:
    """The measurements of a loaded network; None if it cannot run here.

    Raises:
        WeightsError: It fails for another reason.
    """
    try:
        return _measured(network, given)
    except Exception as error:
        if isinstance(error, NotImplementedError) or "not implemented" in str(error):
            logger.warning("%s is not compared: it does not run here: %s", source, error)
            return None
        raise _differs(source, f"it fails with {type(error).__name__}: {error}") from error


def _measured(network: nn.Module, given: Inputs) -> dict[str, Any]:
    layers: dict[str, Tensor] = {}
    names = {name for name, module in network.named_modules() if not any(module.children())}

    def see(name: str, output: Tensor) -> None:
        if name in names:
            layers.setdefault(name, output.double().norm())

    with watched(network, see):
        outputs = fixed_pass(network, given)
    rounding = tolerance(network, outputs)
    return {
        "inputs": Sketches.of(_named(given), SAME).to_json(),
        "outputs": Sketches.of(outputs, rounding).to_json(),
        "layers": {name: float(f"{float(norm):.6g}") for name, norm in layers.items()},
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "macs": _macs(network, given),
        "rounding": rounding,
    }


def _macs(network: nn.Module, given: Inputs) -> int | None:
    """MACs of one pass; None if they cannot be counted."""
    try:
        return count_macs(network, to_device(given, device_of(network)))
    except RankNASError as error:
        logger.info("MACs are not counted: %s", error)
        return None


def _difference(found: dict[str, Any], stored: Any) -> str | None:
    """What differs from the network that was saved, in words; None if nothing does."""
    for name in ("params", "macs"):
        if found[name] != stored[name] and None not in (found[name], stored[name]):
            return f"it has {found[name]} {name} instead of {stored[name]!r}"
    rounding = max(found["rounding"], min(1.0, float(stored["rounding"])))
    if Sketches(found["outputs"], rounding).agree(stored["outputs"]):
        return None
    for name, norm in stored["layers"].items():
        own = found["layers"].get(name, math.nan)
        if not abs(own - float(norm)) <= rounding * abs(float(norm)):
            return f"the output of layer {name!r} differs on the same inputs"
    return "its output differs on the same inputs, and that of no layer does"


def _named(given: Inputs) -> dict[str, Tensor]:
    return dict(named_tensors(given))


def _differs(source: str, reason: str) -> WeightsError:
    return WeightsError(
        f"the network of {source!r} is not the function that was saved: {reason}; load it with "
        "the model, and the versions of its packages, that it was made with."
    )
