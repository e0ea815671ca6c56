"""Device files: figures of a device in TOML, each with its source.

The entry ``kind`` names the kind of model: ``roofline`` (the default), ``systolic`` or ``imc``.
`device_names` lists the files of this package.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rankNAS.exceptions import UsageError

__all__ = ["Device", "device_names", "read_device"]


@dataclass(frozen=True)
class Device:
    """Figures of a device for a roofline model.

    Args:
        name: Name of the device, for display.
        bandwidth: Bandwidth of main memory, bytes per second.
        launch: Overhead of one kernel launch, seconds.
        peak: Peak FLOP per second by dtype; a multiply-add counts as two.
        tile: Multiples to which [outputs, reduction] of a matrix product are rounded up, by dtype.
        energy: Joules per multiply-add by dtype, and under ``byte`` per byte of main memory; may
            be empty.
        sources: The source of each figure, by its path.
    """

    name: str
    bandwidth: float
    launch: float
    peak: Mapping[str, float]
    tile: Mapping[str, tuple[int, int]]
    energy: Mapping[str, float]
    sources: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str) -> Device:
        """The device that a parsed file describes.

        Raises:
            UsageError: A figure is missing, not a number, or not positive.
        """
        peak = {k: positive(v, f"peak.{k}", where) for k, v in _table(content, "peak", where)}
        if not peak:
            raise UsageError(f"{where} has no [peak]; give FLOP a second by dtype.")
        tile = dict.fromkeys(peak, (1, 1))
        for dtype, sizes in _table(content, "tile", where):
            if not isinstance(sizes, list) or len(sizes) != 2:
                raise UsageError(f"{where}: tile.{dtype} must be two numbers, got {sizes!r}.")
            first, second = (int(positive(s, f"tile.{dtype}", where)) for s in sizes)
            tile[dtype] = first, second
        return cls(
            str(content.get("name", where)),
            positive(content.get("bandwidth"), "bandwidth", where),
            positive(content.get("launch"), "launch", where, zero=True),
            peak,
            tile,
            {k: positive(v, f"energy.{k}", where) for k, v in _table(content, "energy", where)},
            dict(_table(content, "sources", where)),
        )


def device_names() -> tuple[str, ...]:
    """Names of the device files of this package."""
    folder = files("rankNAS.hw_models") / "devices"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def read_device(given: str | Path) -> tuple[str, dict[str, Any]]:
    """Kind and content of a device file, given by its path or by a name of `device_names`.

    Raises:
        UsageError: The file is missing or is not TOML, or its kind is not text.
    """
    path = Path(given)
    try:
        if str(given) in device_names():
            resource = files("rankNAS.hw_models") / "devices" / f"{given}.toml"
            content = tomllib.loads(resource.read_text("utf-8"))
        else:
            content = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"device file {str(path)!r} is not TOML: {error}.") from None
    except RecursionError:
        raise UsageError(f"device file {str(path)!r} is nested too deeply for TOML.") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise UsageError(f"device file {str(path)!r} cannot be read: {error}.") from None
    kind = content.pop("kind", "roofline")
    if not isinstance(kind, str):
        raise UsageError(f"device file {str(path)!r}: `kind` must be text, got {kind!r}.")
    return kind, content


def positive(value: Any, key: str, where: str, *, zero: bool = False) -> float:
    """A positive number of a device file.

    Raises:
        UsageError: It is missing, not a number, not finite, or not positive (or zero).
    """
    if value is None:
        raise UsageError(f"{where} has no {key!r}.")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise UsageError(f"{where}: {key!r} must be a positive number, got {value!r}.")
    return float(value)


def _table(content: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Any]]:
    table = content.get(key, {})
    if not isinstance(table, Mapping):
        raise UsageError(f"{where}: {key!r} must be a table, got {table!r}.")
    return list(table.items())
