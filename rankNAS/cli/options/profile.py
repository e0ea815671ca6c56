"""The options of ``ranknas profile`` and ``ranknas compile``."""

from __future__ import annotations

from dataclasses import dataclass

from rankNAS.cli.options.common import STUDIES, JsonOptions, SpaceOptions
from rankNAS.cli.options.fields import HARDWARE, MODEL, OUTPUT, RUNNING, option
from rankNAS.exceptions import UsageError

__all__ = ["CompileOptions", "ProfileOptions"]


@dataclass(frozen=True, kw_only=True)
class CompileOptions(JsonOptions, SpaceOptions):
    """A space to print."""

    num_classes: int = option(1000, "Number of classes of the model.", MODEL)


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(SpaceOptions):
    """A profile: the measurements and their validation."""

    hw: str = option(
        "host", "`host` to measure this machine; or any hardware model to --validate.", HARDWARE
    )
    batch: int = option(1, "Batch size of the forward pass.", HARDWARE, min=1)
    tokens: int | None = option(
        None, "Tokens of each text, 1 for decoding. Default: a whole window.", HARDWARE, min=1
    )
    threads: int | None = option(
        None, "PyTorch's CPU threads. Default: PyTorch's own number.", RUNNING, min=1
    )
    out: str | None = option(
        None, "Device file (.json) to write, for --hardware. Default: in the cache.", OUTPUT
    )
    shapes: int = option(
        320,
        "Minimum number of layer shapes to time; more if there is time.",
        HARDWARE,
        min=1,
    )
    general: bool = option(False, "Also time common shapes, for other spaces.", HARDWARE)
    validate: int = option(
        0, "Number of random allocations to measure end to end.", HARDWARE, min=0
    )
    seconds: float = option(600.0, "Time limit of --validate in seconds.", HARDWARE, min=0)
    study: str | None = option(
        None, "Also validate on the best allocations of this study.", HARDWARE
    )
    studies: str = option(STUDIES, "Folder that contains the studies' folders.", HARDWARE)
    seed: int = option(0, "Random seed of the allocations.", HARDWARE, min=0, max=2**32 - 1)
    num_classes: int = option(10, "Number of classes of the model.", MODEL)
    device: str = option("cpu", "Device, for example cuda.", RUNNING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and not self.out.endswith(".json"):
            raise UsageError(f"`--out` must end in .json, got {self.out!r}.")
        if self.out is not None and self.hw != "host":
            raise UsageError(f"`--out` is for --hw host; {self.hw!r} measures nothing.")
