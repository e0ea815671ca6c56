"""Hardware models: latency and energy of choices on a device. `HW_MODELS` lists the built-ins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.hw_models.devices import Device, device_names, read_device
from rankNAS.lazy import Catalogue, exports
from rankNAS.plugins import is_plugin, load_callable

if TYPE_CHECKING:
    from rankNAS.hw_models.base import (
        CallableModel,
        HardwareModel,
        LatencyTables,
        StageModel,
        compile_latency,
    )
    from rankNAS.hw_models.host import Host
    from rankNAS.hw_models.imc import ImcArray
    from rankNAS.hw_models.roofline import Roofline
    from rankNAS.hw_models.systolic import Systolic
    from rankNAS.hw_models.table import MeasuredTable
    from rankNAS.hw_models.validation import Agreement, agreement, validate

__all__ = [
    "CATALOGUE",
    "HW_MODELS",
    "Agreement",
    "CallableModel",
    "Device",
    "HardwareModel",
    "Host",
    "ImcArray",
    "LatencyTables",
    "MeasuredTable",
    "Roofline",
    "StageModel",
    "Systolic",
    "agreement",
    "compile_latency",
    "device_names",
    "make_hardware",
    "validate",
]

#: Name to (class, first line of its docstring). Listing imports nothing.
CATALOGUE: dict[str, tuple[str, str]] = {
    "host": (
        "rankNAS.hw_models.host:Host",
        "Latency on a device of this machine, random weights and inputs.",
    ),
    "systolic": (
        "rankNAS.hw_models.systolic:Systolic",
        "An analytical model of an array of processing elements; nothing of it is measured.",
    ),
    "imc": (
        "rankNAS.hw_models.imc:ImcArray",
        "Latency, and energy if the cost of a cycle is given, on in-memory-computing arrays.",
    ),
}
#: Name to class, imported on first use.
HW_MODELS: Mapping[str, Callable[[], HardwareModel]] = Catalogue(CATALOGUE)

_HOMES = {
    "base": ("CallableModel", "HardwareModel", "LatencyTables", "StageModel", "compile_latency"),
    "host": ("Host",),
    "imc": ("ImcArray",),
    "roofline": ("Roofline",),
    "systolic": ("Systolic",),
    "table": ("MeasuredTable",),
    "validation": ("Agreement", "agreement", "validate"),
}
__getattr__ = exports(
    __name__, {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}
)


def make_hardware(given: str | HardwareModel, *, strict: bool = False) -> HardwareModel:
    """The hardware model for a user's specification.

    Args:
        given: A model itself; a name of `HW_MODELS` or `device_names`; a device file
            (``FILE.toml``, or ``FILE.json`` from a profile); a table of measured layers
            (``FILE.csv``); or ``file.py:function`` (layer, choice -> seconds).
        strict: Whether tables raise an error for unseen choices instead of predicting them.

    Raises:
        UnknownNameError: There is no such model.
        UsageError: `given` is neither a name nor a hardware model, or its file is invalid.
    """
    from rankNAS.hw_models.base import CallableModel, HardwareModel
    from rankNAS.hw_models.host import Host
    from rankNAS.hw_models.table import MeasuredTable

    if isinstance(given, HardwareModel):
        return given
    if not isinstance(given, str):
        raise UsageError(
            f"`hardware` must be a name or a HardwareModel, got {type(given).__name__}; wrap a "
            "function as CallableModel(fn)."
        )
    if is_plugin(given):
        return CallableModel(load_callable(given, "hardware model"))
    if given in HW_MODELS:
        return HW_MODELS[given]()
    if given in device_names() or given.endswith(".toml"):
        return _from_device(given)
    if given.endswith(".json"):
        return Host(file=Path(given), measures=False, strict=strict, name=Path(given).stem)
    if given.endswith(".csv"):
        return MeasuredTable.read(given, strict=strict)
    names = [*HW_MODELS, *device_names()]
    hint = (
        "Or a device file (.toml, .json), a table of measured layers (.csv), or file.py:function."
    )
    raise UnknownNameError("hardware model", given, names, hint)


def _from_device(given: str) -> HardwareModel:
    from rankNAS.hw_models.imc import ImcArray
    from rankNAS.hw_models.roofline import Roofline
    from rankNAS.hw_models.systolic import Systolic

    kind, content = read_device(given)
    name = Path(given).stem
    if kind == "roofline":
        return Roofline(Device.of(content, repr(given)), name=name)
    analytical: dict[str, Any] = {"systolic": Systolic, "imc": ImcArray}
    if kind not in analytical:
        raise UsageError(
            f"device file {given!r} is of the kind {kind!r}; expected roofline, systolic or imc."
        )
    content.pop("sources", None)
    allowed = {field.name: field.type for field in fields(analytical[kind])}
    if unknown := [key for key in content if key not in allowed]:
        raise UsageError(
            f"device file {given!r} has {unknown[0]!r}; {kind} has {', '.join(allowed)}."
        )
    numbers = [k for k, t in allowed.items() if k in content and t.startswith(("int", "float"))]
    for key in numbers:
        if isinstance(content[key], bool) or not isinstance(content[key], int | float):
            raise UsageError(f"device file {given!r}: {key!r} must be a number.")
    model: HardwareModel = replace(analytical[kind](**content), name=content.get("name", name))
    return model
