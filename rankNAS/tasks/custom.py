"""Tasks from the user's own functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor

from rankNAS.data.samples import Samples
from rankNAS.exceptions import DataError, RankNASError, UsageError
from rankNAS.tasks.base import Direction, Prediction, Sums, Task, held, number
from rankNAS.tasks.checks import check_some
from rankNAS.tasks.continuous import Outputs
from rankNAS.tasks.matching import distance_of, outputs_of
from rankNAS.trees import Inputs, size_of, tensors, tree_map

__all__ = ["Custom"]

DIRECTIONS = {"minimise": "minimize", "maximise": "maximize"}
RESERVED = ("loss", "distance")


@final
@dataclass(frozen=True, kw_only=True)
class Custom(Task):
    """A task from functions of the model's output and the batch.

    Metrics and loss are means over the samples of the data: a function's value for a batch is
    weighted by the number of its samples.

    Args:
        loss: Takes (output, batch); returns a scalar with gradients, the mean over the batch.
            None if there is no loss: networks can then only be trained with a teacher.
        metrics: By name, a function of (output, batch) that returns a number, and ``minimise`` or
            ``maximise``.
        divergence: Takes (output, dense output); returns a scalar that is 0 for equal outputs.
            By default, the distance of the floating-point tensors, relative to their variance.
        inputs: Takes a batch; returns the model's arguments, a tuple or a mapping. By default, the
            form of the batch decides.

    Raises:
        UsageError: A metric has no direction, or the name of another one.

    Example:
        >>> def loss(output, batch):
        ...     return (output - batch[1]).abs().mean()
        >>> def largest(output, batch):
        ...     return (output - batch[1]).abs().max()
        >>> task = Custom(loss=loss, metrics={"largest": (largest, "minimise")})
        >>> list(task.directions)
        ['largest', 'loss', 'distance']
    """

    name: ClassVar[str] = "custom"
    divergence_name: ClassVar[str] = "distance"
    loss: Callable[[Any, Any], Tensor] | None = None
    metrics: Mapping[str, tuple[Callable[[Any, Any], Any], str]] = field(default_factory=dict)
    divergence: Callable[[Any, Any], Any] | None = None
    inputs: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name, given in self.metrics.items():
            if not isinstance(given, tuple) or len(given) != 2 or not callable(given[0]):
                raise UsageError(
                    f"the metric {name!r} must be (function, 'minimise' or 'maximise'), got "
                    f"{given!r}."
                )
            direction = DIRECTIONS.get(given[1], given[1])
            if direction not in ("minimize", "maximize"):
                raise UsageError(
                    f"the direction of the metric {name!r} must be 'minimise' or 'maximise', got "
                    f"{given[1]!r}."
                )
            if name in RESERVED:
                raise UsageError(f"a metric must not be called {name!r}; give it another name.")

    @property
    def directions(self) -> Mapping[str, Direction]:
        found = {
            name: cast("Direction", DIRECTIONS.get(direction, direction))
            for name, (_, direction) in self.metrics.items()
        }
        if self.loss is not None:
            found["loss"] = "minimize"
        return {**found, "distance": "minimize"}

    def _arguments(self, batch: Any) -> Inputs:
        return super()._arguments(batch) if self.inputs is None else Inputs.of(self.inputs(batch))

    def bound(self, batch: Any, model: torch.nn.Module) -> Custom:
        return self if self.inputs is not None else super().bound(batch, model)

    def predict(self, output: Any, batch: Any) -> Prediction:
        return _CustomPrediction(self, output, batch)

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        check_some(sums, self.name)
        names = [*self.metrics, *(["loss"] if "loss" in sums else [])]
        found = {name: float(sums[name] / sums["count"]) for name in names}
        if self.divergence is None:
            return found | distance_of(sums)
        if "divergence" in sums:
            found["distance"] = float(sums["divergence"] / sums["count"])
        return found

    def check(self, samples: Samples, where: str, output: Any) -> None:
        """Nothing: only the task's functions know which targets they accept."""

    @property
    def identity(self) -> str:
        functions: dict[str, Any] = {n: function for n, (function, _) in self.metrics.items()}
        functions |= {"loss": self.loss, "divergence": self.divergence, "inputs": self.inputs}
        named = {
            name: f"{getattr(f, '__module__', '')}.{getattr(f, '__qualname__', type(f).__name__)}"
            for name, f in functions.items()
            if f is not None
        }
        return f"custom {named} {dict(self.directions)} {self.layout}"

    def describe(self) -> str:
        return f"a custom task ({', '.join(self.directions)})"


@dataclass(frozen=True, eq=False)
class _CustomPrediction(Prediction):
    """The output of a model and its batch."""

    task: Custom
    output: Any
    batch: Any

    def __len__(self) -> int:
        return size_of(self.batch)

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        if self.task.loss is None:
            raise DataError("the custom task has no loss; train with a teacher alone (distill=1).")
        found: Tensor = _called("loss", self.task.loss, self.output, self.batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise DataError(
                f"the custom task's 'loss' returned {_kind(found)} instead of a tensor of one "
                "number; return the mean over the batch."
            )
        return found.squeeze()

    def sampled_loss(self, generator: torch.Generator) -> Tensor:
        """The outputs' distance from samples; the loss itself where outputs have no gradients."""
        found = [x for x in tensors(self.output) if x.is_floating_point() and x.requires_grad]
        if found:
            return Outputs(found).sampled_loss(generator)
        return self.loss() * len(self)

    def distillation(self, reference: Prediction, temperature: float = 1.0) -> Tensor:
        assert isinstance(reference, _CustomPrediction)
        if self.task.divergence is None:
            return outputs_of(self.output).distillation(outputs_of(reference.output))
        found: Tensor = _called("divergence", self.task.divergence, self.output, reference.output)
        return found

    @torch.no_grad()
    def sums(self, reference: Prediction | None) -> Sums:
        size = len(self)
        if self.task.divergence is None and any(
            x.is_floating_point() for x in tensors(self.output)
        ):
            inner = None if reference is None else outputs_of(reference.output)  # type: ignore[attr-defined]
            found = dict(outputs_of(self.output).sums(inner))
        else:
            found = {}
        found["count"] = number(size)
        for name, (function, _) in self.task.metrics.items():
            found[name] = number(size * _value(name, function, self.output, self.batch))
        if self.task.loss is not None:
            found["loss"] = number(size * _value("loss", self.task.loss, self.output, self.batch))
        if reference is not None and self.task.divergence is not None:
            assert isinstance(reference, _CustomPrediction)
            value = _value("divergence", self.task.divergence, self.output, reference.output)
            found["divergence"] = number(size * value)
        return {name: value.cpu() for name, value in found.items()}

    def kept(self, most_bytes: int) -> Prediction | None:
        if self.nbytes > most_bytes:
            return None
        return _CustomPrediction(self.task, tree_map(held, self.output), None)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in tensors(self.output))


def _value(name: str, function: Callable[[Any, Any], Any], output: Any, other: Any) -> float:
    """The finite number that a function of the task returns."""
    value = _called(name, function, output, other)
    if isinstance(value, str | bytes) or (isinstance(value, Tensor) and value.numel() != 1):
        raise DataError(f"the custom task's {name!r} returned {_kind(value)} instead of a number.")
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the custom task's {name!r} returned {_kind(value)} instead of a number."
        ) from error
    if not math.isfinite(found):
        raise DataError(f"the custom task's {name!r} returned {found}, not a finite number.")
    return found


def _called(name: str, function: Callable[[Any, Any], Any], output: Any, other: Any) -> Any:
    """What a function of the task returns; an error names the function."""
    try:
        return function(output, other)
    except RankNASError:
        raise
    except Exception as error:
        raise DataError(
            f"the custom task's {name!r} raised {type(error).__name__}: {error}."
        ) from error


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
