"""The contract of a task: how to read batches and outputs, and what to measure.

A batch is any container of tensors. A task gives the model's arguments for a batch, and makes a
`Prediction` of the model's output. Loss, Fisher sampling, distillation, divergence and metrics are
all derived from predictions. Metrics are sums over predictions, so that no output is ever kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn

from rankNAS.data.samples import Samples
from rankNAS.exceptions import DataError
from rankNAS.tasks.checks import check_finite
from rankNAS.tasks.layout import Layout
from rankNAS.trees import Inputs, size_of, tensors

__all__ = [
    "HALF",
    "Direction",
    "Prediction",
    "Sums",
    "Task",
    "added",
    "at_least_float32",
    "held",
    "main_output",
    "named_logits",
    "number",
    "one_tensor",
    "summed",
]

HALF = (torch.float16, torch.bfloat16)
CHECKED = 1024  # samples whose targets are checked at a time
Direction = Literal["maximize", "minimize"]
#: Sums over predictions by name, float64 tensors of any shape; see `Task.finish`.
Sums: TypeAlias = dict[str, Tensor]


class Prediction(ABC):
    """What a model predicts for one batch, with the batch's targets if there are any."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of predictions that count: of samples, tokens or pixels."""

    @abstractmethod
    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss against the targets, a scalar with gradients.

        Raises:
            DataError: The batch has no targets.
        """

    @abstractmethod
    def sampled_loss(self, generator: torch.Generator) -> Tensor:
        """The summed loss against targets sampled from the prediction itself, with gradients.

        The second moment of its gradients is the Fisher matrix (Martens and Grosse, ICML 2015).

        Args:
            generator: A generator on the CPU.
        """

    @abstractmethod
    def distillation(self, reference: Prediction, temperature: float = 1.0) -> Tensor:
        """The mean divergence from a teacher's prediction, a scalar with gradients."""

    @abstractmethod
    def sums(self, reference: Prediction | None) -> Sums:
        """Sums of all metrics, float64.

        Args:
            reference: The dense model's prediction for the same batch, perhaps compact; None
                leaves out the divergences.
        """

    @abstractmethod
    def kept(self, most_bytes: int) -> Prediction | None:
        """A reference that needs at most `most_bytes`; None if there is none."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The bytes of the full prediction."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What a model is for. A task pickles and has no state.

    Args:
        layout: Where inputs and targets are in a batch; found from the first batch if None.
        changes_inputs: Whether the model changes its arguments in place, by normalising or masking
            them, for example. Every pass then gets its own copy. Found from the first batch.

    Attributes:
        name: As given to ``--task``.
        directions: By metric, ``maximize`` or ``minimize``; the first is the default objective.
        divergence_name: The metric that compares a network with the dense model.
        labelled: Whether batches have targets.
        invariant: Whether a translated or mirrored image keeps its target.

    Example:
        >>> from rankNAS.tasks import Regression
        >>> task = Regression()
        >>> batch = torch.zeros(5, 3), torch.ones(5)
        >>> task = task.bound(batch, nn.Linear(3, 1))
        >>> prediction = task.predict(torch.zeros(5, 1), batch)
        >>> task.finish(prediction.sums(None))["loss"]
        1.0
    """

    name: ClassVar[str]
    divergence_name: ClassVar[str]
    labelled: ClassVar[bool] = True
    invariant: ClassVar[bool] = False
    layout: Layout | None = None
    # Not printed: what identifies a task in caches and studies does not depend on it.
    changes_inputs: bool = field(default=False, repr=False)

    @property
    @abstractmethod
    def directions(self) -> Mapping[str, Direction]:
        """By metric, its direction."""

    @property
    def main_metric(self) -> str:
        """The first metric: the default objective."""
        return next(iter(self.directions))

    @abstractmethod
    def predict(self, output: Any, batch: Any) -> Prediction:
        """The prediction that a model's output for a batch is.

        Raises:
            DataError: The output does not fit the task or the batch.
        """

    @abstractmethod
    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The metrics, from sums over all predictions."""

    @abstractmethod
    def describe(self) -> str:
        """The task in a few words, for example ``classification of 10 classes``."""

    def inputs_of(self, batch: Any) -> Inputs:
        """The model's arguments for a batch; a copy if the model changes them."""
        inputs = self._arguments(batch)
        return inputs.copied() if self.changes_inputs else inputs

    def _arguments(self, batch: Any) -> Inputs:
        """The model's arguments, perhaps the tensors of the batch themselves."""
        return self._layout.inputs_of(batch)

    def targets_of(self, batch: Any) -> Any:
        """The targets of a batch.

        Raises:
            DataError: It has none.
        """
        found = self._layout.target_of(batch)
        if found is None:
            raise DataError(
                f"the task {self.name!r} needs targets, but the batches have none; give labelled "
                "data, or the task 'matching', which needs none."
            )
        return found

    def mask_of(self, batch: Any) -> Tensor | None:
        """The positions (N, T) that count in statistics, bool; None if all do."""
        return None if self.layout is None else self.layout.mask_of(batch)

    def check(self, samples: Samples, where: str, output: Any) -> None:
        """Raise a DataError for a target that the task cannot use; called before any work.

        Samples in memory are all looked at, others are not.

        Args:
            samples: The samples.
            where: Their name in messages, such as ``train``.
            output: The model's output for some samples.
        """
        if not self.labelled or not samples.in_memory:
            return
        row = 0
        # Batches of unequal items are not in the order of the items.
        for batch in samples.batches(CHECKED) if samples.uniform else _one_by_one(samples):
            targets = self.targets_of(batch)
            if isinstance(targets, Tensor):
                self.check_targets(targets, output, f"of the {where} split", row)
            row += size_of(batch)

    def check_targets(self, targets: Tensor, output: Any, where: str, row: int) -> None:
        """Raise a DataError for a target that is NaN or infinite, or that the task cannot use.

        Args:
            targets: Targets of consecutive items.
            output: The model's output for some samples.
            where: Their name in messages.
            row: The number of the first item.
        """
        check_finite(targets, where, row)

    def compact(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which a model's output is in the smallest form that `predict` reads.

        By default it is the ordinary output.
        """
        return nullcontext()

    @property
    def identity(self) -> str:
        """What identifies the task in caches and studies."""
        return repr(self)

    def run(self, model: nn.Module, batch: Any) -> Prediction:
        """The model's prediction for a batch."""
        return self.predict(self.inputs_of(batch).run(model), batch)

    def bound(self, batch: Any, model: nn.Module) -> Self:
        """The task with the layout of a batch for a model; unchanged if it has one."""
        if self.layout is not None:
            return self
        return replace(self, layout=Layout.of(batch, model, labelled=self.labelled))

    @property
    def _layout(self) -> Layout:
        if self.layout is None:
            raise DataError(
                f"the task {self.name!r} does not know where inputs and targets are in a batch; "
                "call `task.bound(batch, model)` first."
            )
        return self.layout


def _one_by_one(samples: Samples) -> Iterator[Any]:
    return (samples.take(torch.tensor([row])).batch() for row in range(len(samples)))


def added(first: Sums, second: Sums) -> Sums:
    """The sums over both sets of predictions."""
    if not first:
        return second
    return {name: first[name] + value for name, value in second.items()}


def summed(parts: Iterable[Sums]) -> Sums:
    """The sums over all sets of predictions."""
    total: Sums = {}
    for part in parts:
        total = added(total, part)
    return total


def number(value: float, device: torch.device | str = "cpu") -> Tensor:
    """A number as one of the `Sums`."""
    return torch.tensor(float(value), dtype=torch.float64, device=device)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision, which overflows in sums, as float32; other tensors unchanged."""
    return x.float() if x.dtype in HALF else x


def held(x: Tensor) -> Tensor:
    """The tensor without its graph, and without the rest of a larger storage."""
    x = x.detach()
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def named_logits(output: Any) -> Tensor | None:
    """The ``logits`` of an output; None if it has none."""
    found = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    )
    return found if isinstance(found, Tensor) else None


def one_tensor(output: Any) -> Tensor | None:
    """The one tensor of an output, or its ``logits``; None if it has several without that name."""
    if isinstance(output, Tensor):
        return output
    found, several = named_logits(output), tensors(output)
    return several[0] if found is None and len(several) == 1 else found


def main_output(output: Any, task: str) -> Tensor:
    """The one tensor of an output, or its ``logits``.

    Raises:
        DataError: The output has several tensors and none is called ``logits``.
    """
    found = one_tensor(output)
    if found is not None:
        return found
    raise DataError(
        f"the task {task!r} reads one tensor, but the model returns a {type(output).__name__} of "
        f"{len(tensors(output))} tensors; give a model that returns its predictions alone, or "
        "Custom(loss, metrics), whose functions get the whole output."
    )
