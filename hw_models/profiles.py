"""Latency profiles: measured stages, end-to-end networks and their conditions, in one file.

The file is rewritten after every few measurements, so an interrupted profile can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from rankNAS.decompositions import LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.io.files import read_json, write_json
from rankNAS.io.formats import FORMAT, current_format, upgraded

__all__ = ["Measurement", "NetworkFit", "Profile", "Terms"]

CHECKSUM = "sha256"  # of all other entries; files without it are read unchecked


@dataclass(frozen=True)
class Terms:
    """Conditions of a measurement other than shapes; shapes include dtype and batch size.

    Args:
        device: Type and name of the device.
        threads: Number of PyTorch threads on a CPU.
        memory_format: Memory format of images.
        version: PyTorch version; a different version is accepted.
    """

    device: str
    threads: int
    memory_format: str
    version: str

    @classmethod
    def here(cls, device: torch.device) -> Terms:
        """The conditions of this process."""
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        else:
            name = f"{device.type} {platform.machine()} {_processor()}".strip()
        return cls(name, torch.get_num_threads(), "channels_last", torch.__version__)


@dataclass(frozen=True)
class Measurement:
    """Latency of one stage in seconds, its standard deviation, and the number of runs."""

    seconds: float
    sigma: float
    rounds: int


@dataclass(frozen=True)
class NetworkFit:
    """Linear model of end-to-end latency: remainder + dense D + decomposed S.

    Args:
        remainder_cost: Seconds outside the layers.
        dense: Factor on the summed time D of dense layers.
        decomposed: Factor on the summed time S of the stages of decomposed layers.
        residual: Standard deviation of the residual, relative to the time.
        timed: Seconds of the dense network, measured together with its stages; 0 if not measured.
        places: In-network factors by `place`, applied before the other two.
    """

    remainder_cost: float = 0.0
    dense: float = 1.0
    decomposed: float = 1.0
    residual: float = 0.0
    timed: float = 0.0
    places: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Measurements under one set of conditions.

    Args:
        terms: The conditions.
        stages: Measurement by shape, each with a single call.
        networks: End-to-end fit by key of the space.
    """

    terms: Terms
    stages: Mapping[LayerShape, Measurement] = field(default_factory=dict)
    networks: Mapping[str, NetworkFit] = field(default_factory=dict)

    def with_stages(self, found: Mapping[LayerShape, Measurement]) -> Profile:
        """A profile with further stage measurements."""
        return replace(self, stages={**self.stages, **found})

    def with_network(self, key: str, fit: NetworkFit) -> Profile:
        """A profile with one more end-to-end fit."""
        return replace(self, networks={**self.networks, key: fit})

    def write(self, path: Path) -> None:
        """Write the profile as JSON."""
        stages = [{**asdict(shape), **asdict(m)} for shape, m in self.stages.items()]
        networks = {key: asdict(fit) for key, fit in self.networks.items()}
        content = {
            FORMAT: current_format("device"),
            "terms": asdict(self.terms),
            "stages": stages,
            "networks": networks,
        }
        write_json(path, content | {CHECKSUM: _checksum(content)})

    @classmethod
    def read(cls, path: Path) -> Profile:
        """The profile in a file.

        Raises:
            UsageError: It cannot be read, or a figure is missing or invalid. The message names it.
        """
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"device file {str(path)!r} cannot be read: {error}.") from None
        try:
            signed = {key: value for key, value in content.items() if key != CHECKSUM}
            current = upgraded("device", content, f"device file {str(path)!r}")
            terms = Terms(**current["terms"])
            stages = dict(_stage(row) for row in current["stages"])
            networks = {key: NetworkFit(**fit) for key, fit in current["networks"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"device file {str(path)!r} is damaged or incomplete: {error!r}; profile again."
            ) from None
        for key, fit in networks.items():
            figures = [*(v for k, v in asdict(fit).items() if k != "places"), *fit.places.values()]
            if not all(_is_number(v) and v >= 0 for v in figures):
                raise UsageError(
                    f"device file {str(path)!r}: network {key} has the figures {fit}; they must "
                    "be numbers from 0."
                )
        for shape, found in stages.items():
            if not (_is_number(found.seconds) and found.seconds > 0 and _is_number(found.sigma)):
                raise UsageError(
                    f"device file {str(path)!r}: {shape} takes {found.seconds} ± {found.sigma} "
                    "seconds; expected positive numbers."
                )
        if content.get(CHECKSUM, expected := _checksum(signed)) != expected:
            raise UsageError(
                f"device file {str(path)!r} does not match its checksum, so it was damaged or "
                f"edited; profile again, or remove {CHECKSUM!r} from it if it was you."
            )
        return cls(terms, stages, networks)

    def check(self, here: Terms, where: str) -> None:
        """Raise a UsageError that names the difference unless the conditions match."""
        for name in (f.name for f in fields(Terms)):
            there, now = getattr(self.terms, name), getattr(here, name)
            if there != now and name != "version":
                raise UsageError(
                    f"{where} was measured with {name} {there!r}, but now it is {now!r}; measure "
                    "again, or set it as it was."
                )


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stage(row: Mapping[str, Any]) -> tuple[LayerShape, Measurement]:
    names = {f.name for f in fields(LayerShape)}
    given = {k: _tuples(v) for k, v in row.items() if k in names}
    return LayerShape(**given), Measurement(row["seconds"], row["sigma"], int(row["rounds"]))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
