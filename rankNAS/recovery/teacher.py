"""The dense network's predictions for batches that come again, kept in a file of bounded size.

Where the batches and their augmentations are a fixed set, the teacher runs once for each. Of
vocabularies, the most likely tokens are kept. What is not kept is computed again, and rounded in
the same way, so that a training does not depend on what is kept.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from typing import IO, Any, final

import torch
from torch import Tensor, nn

from rankNAS.io.files import cache_folder
from rankNAS.io.fingerprints import content_of
from rankNAS.recovery.loop import Place
from rankNAS.tasks.base import Prediction, Task
from rankNAS.tasks.categorical import Categorical, TopClasses
from rankNAS.trees import device_of

__all__ = ["Teacher"]

logger = logging.getLogger(__name__)
Kept = tuple[Prediction, dict[str, tuple[int, torch.dtype, torch.Size]]]


@final
class Teacher:
    """The dense network's predictions.

    Args:
        network: The dense network; it is put in evaluation mode.
        task: Reads batches and outputs.
        device: Where it runs.
        temperature: That of the distillation.
        most_bytes: Of the file of what is kept; 0 keeps nothing.
        top: Of more classes than this, so many of the most likely ones are kept.

    Attributes:
        passes: How often the network has run.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        device: torch.device,
        temperature: float,
        most_bytes: int = 0,
        top: int = 64,
    ) -> None:
        self.network = network.to(device).eval()
        self.task, self.temperature = task, temperature
        self.most_bytes, self.top = most_bytes, top
        self.passes, self._full = 0, False
        self._kept: dict[Place, Kept] = {}
        self._file: IO[bytes] | None = None
        self._size = 0

    def prediction(self, batch: Any, place: Place | None = None) -> Prediction:
        """The prediction for a batch.

        Args:
            batch: The batch.
            place: Equal for equal batches; None for one that does not come again.
        """
        if place is None or not self.most_bytes:
            return self._predicted(batch)
        if place in self._kept:
            return self._widened(self._read(*self._kept[place]))
        found = self._compact(self._predicted(batch))
        self._keep(place, found)
        return self._widened(found)

    def close(self) -> None:
        """Remove what is kept."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    @torch.no_grad()
    def _predicted(self, batch: Any) -> Prediction:
        self.passes += 1
        return self.task.run(self.network, batch)

    def _compact(self, found: Prediction) -> Prediction:
        if not isinstance(found, Categorical):
            return found
        if found.logits.shape[-1] > self.top:
            return TopClasses.of(found.logits.detach() / self.temperature, self.top)
        return Categorical(found.logits.detach().half())

    def _widened(self, found: Prediction) -> Prediction:
        if isinstance(found, Categorical) and found.logits.dtype == torch.float16:
            return replace(found, logits=found.logits.float())
        return found

    def _keep(self, place: Place, found: Prediction) -> None:
        """Write the tensors of a prediction to the file, if there is room."""
        own = _fields(found)
        written = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        needed = sum(value.nbytes for value in written.values())
        self._full = self._full or self._size + needed > self.most_bytes
        if not written or self._full:
            return
        places = {}
        try:
            if self._file is None:
                cache_folder().mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=cache_folder())  # gone with the process
            self._file.seek(self._size)
            for name, value in written.items():
                places[name] = self._file.tell(), value.dtype, value.shape
                self._file.write(content_of(value))
            self._file.flush()
        except OSError as error:  # the disk is full, for example
            logger.warning("no more of the teacher's outputs are kept: %s", error)
            self._full = True
            return
        self._size += needed
        empty = {name: value.new_empty(0).cpu() for name, value in written.items()}
        self._kept[place] = replace(found, **empty), places  # type: ignore[type-var]

    def _read(self, empty: Prediction, places: Any) -> Prediction:
        assert self._file is not None
        found = {}
        for name, (start, dtype, shape) in places.items():
            self._file.seek(start)
            content = bytearray(self._file.read(dtype.itemsize * shape.numel()))
            tensor = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0)
            found[name] = tensor.reshape(shape).to(device_of(self.network))
        read: Callable[..., Prediction] = replace
        return read(empty, **found)


def _fields(found: Any) -> dict[str, Any]:
    """The fields of a dataclass of tensors and simple values; empty for anything else."""
    if not hasattr(found, "__dataclass_fields__"):
        return {}
    own = {f.name: getattr(found, f.name) for f in fields(found)}
    plain = all(isinstance(value, Tensor | bool | int | float | None) for value in own.values())
    return own if plain else {}
