"""Hardware models: what a choice costs on a device. `HW_MODELS` lists the built-in ones."""

from __future__ import annotations

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.hw_models.base import CallableModel, HardwareModel, latency_tables
from rankNAS.hw_models.host import Host
from rankNAS.plugins import is_plugin, load_callable

__all__ = [
    "HW_MODELS",
    "CallableModel",
    "HardwareModel",
    "Host",
    "latency_tables",
    "make_hardware",
]

HW_MODELS: dict[str, type[HardwareModel]] = {"host": Host}


def make_hardware(given: str | HardwareModel) -> HardwareModel:
    """A hardware model from its name, ``file.py:function`` (layer, choice -> seconds), or itself.

    Raises:
        UnknownNameError: No such model.
        UsageError: Neither a name nor a hardware model.
    """
    if isinstance(given, HardwareModel):
        return given
    if not isinstance(given, str):
        raise UsageError(
            f"`hardware` must be a name or a HardwareModel, got {type(given).__name__}; wrap a "
            "function as CallableModel(fn)."
        )
    if is_plugin(given):
        return CallableModel(load_callable(given, "hardware model"))
    if given not in HW_MODELS:
        raise UnknownNameError("hardware model", given, HW_MODELS, "Or file.py:function.")
    return HW_MODELS[given]()
