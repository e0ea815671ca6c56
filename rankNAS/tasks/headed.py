"""Predictions from hidden states: the logits of a few positions exist at a time.

The logits of a window of 1,024 tokens over 49,152 words need 200 MB. A causal model of
``transformers`` ends with its output head. Without the head, it returns the last hidden states, of
which a prediction computes the logits of some positions, uses them and frees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from rankNAS.copies import evaluating
from rankNAS.exceptions import RankNASError
from rankNAS.tasks.base import Prediction, Sums, added, held, named_logits
from rankNAS.tasks.categorical import Categorical, Logits, TopClasses
from rankNAS.tasks.checks import IGNORED
from rankNAS.trees import Inputs

__all__ = ["Headed", "HiddenStates", "has_separate_head", "output_head", "without_head"]

#: Logits of one network that exist at a time, 32 MiB in float32; a dense reference has as many.
LOGITS = 1 << 23


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The output of a model without its head.

    Args:
        hidden: The head's input (N, T, h).
        head: The head, which gives logits (N, T, C).
    """

    hidden: Tensor
    head: nn.Module


@final
@dataclass(frozen=True, eq=False)
class Headed(Logits):
    """Predictions of one class out of several, whose logits are computed when they are needed.

    Gradients reach the hidden states and not the parameters of the head.

    Args:
        hidden: (N, h).
        head: Gives logits (N, C).
        targets: As for `Categorical`.
    """

    hidden: Tensor
    head: nn.Module
    targets: Tensor | None = None

    def __len__(self) -> int:
        if self.targets is None:
            return len(self.hidden)
        return int((self.targets != IGNORED).sum())

    def logits_of(self, rows: slice) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.head(self.hidden[rows])
        return found

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        return self._mean(lambda part, rows: part.loss(label_smoothing))

    def sampled_loss(self, generator: torch.Generator) -> Tensor:
        return self._total(lambda part, rows: part.sampled_loss(generator))

    def distillation(self, reference: Prediction, temperature: float = 1.0) -> Tensor:
        def divergence(part: Categorical, rows: slice) -> Tensor:
            return part.distillation(_part(reference, rows), temperature)

        return self._mean(divergence)

    @torch.no_grad()
    def sums(self, reference: Prediction | None) -> Sums:
        total: Sums = {}
        for rows in self._chunks():
            part = self._part(self.head(self.hidden[rows]), rows)
            total = added(total, part.sums(None if reference is None else _part(reference, rows)))
        return total

    def kept(self, most_bytes: int) -> Prediction | None:
        if self.nbytes > most_bytes:
            return None
        return replace(self, hidden=held(self.hidden), targets=None)

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes

    @cached_property
    def _rows(self) -> int:
        """The number of predictions whose logits exist at a time."""
        return max(1, LOGITS // max(1, self.logits_of(slice(0, 1)).numel()))

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), self._rows if len(self.hidden) else 1):
            yield slice(start, min(start + self._rows, len(self.hidden)))

    def _part(self, logits: Tensor, rows: slice) -> Categorical:
        return Categorical(logits, None if self.targets is None else self.targets[rows])

    def _mean(self, loss: Callable[[Categorical, slice], Tensor]) -> Tensor:
        """The mean over all predictions of a loss that is a mean."""
        count = max(1, len(self))
        return self._total(lambda part, rows: loss(part, rows) * (len(part) / count))

    def _total(self, loss: Callable[[Categorical, slice], Tensor]) -> Tensor:
        """The sum of a loss over all chunks; its gradient is known with its value."""
        graded = torch.is_grad_enabled() and self.hidden.requires_grad
        gradient = torch.zeros_like(self.hidden) if graded else None
        total = torch.zeros((), device=self.hidden.device)
        for rows in self._chunks():
            with torch.set_grad_enabled(graded):
                hidden = self.hidden[rows].detach().requires_grad_(graded)
                found = loss(self._part(self.head(hidden), rows), rows)
                if gradient is not None:
                    (gradient[rows],) = torch.autograd.grad(found, hidden)
            total = total + found.detach()
        if gradient is None:
            return total
        known: Tensor = _Known.apply(self.hidden, total, gradient)
        return known


class _Known(torch.autograd.Function):
    """A value whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None


def _part(reference: Prediction, rows: slice) -> Prediction:
    """Some predictions of a reference."""
    if isinstance(reference, TopClasses):
        return TopClasses(reference.classes[rows], reference.log_probabilities[rows])
    assert isinstance(reference, Logits)
    return Categorical(reference.logits_of(rows))


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that gives the logits of a model of ``transformers``; None if there is none."""
    try:
        found = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


@contextmanager
def without_head(model: nn.Module, *, strict: bool = False) -> Iterator[None]:
    """Context in which a model returns `HiddenStates`.

    A model whose head has hooks returns its logits: what the hooks observe needs the head.

    Args:
        model: The model.
        strict: Whether an error is raised for a model that changes the output of its head;
            otherwise that becomes a function of the hidden states.
    """
    head = output_head(model)
    if head is None or head._forward_hooks or head._forward_pre_hooks:
        yield
        return

    def returned(module: nn.Module, args: Any, output: Any) -> Any:
        hidden, separate = named_logits(output), len(given) == 1
        if hidden is not None and separate and hidden is given.pop():
            return HiddenStates(hidden, head)
        given.clear()
        if strict:
            raise RankNASError(f"{type(model).__name__} changes the output of its head.")
        return output

    def passed(x: Tensor) -> Tensor:
        given.append(x)
        return x

    given: list[Tensor] = []
    own = head.__dict__.get("forward")
    handle = model.register_forward_hook(returned)
    head.forward = passed
    try:
        yield
    finally:
        handle.remove()
        del head.forward
        if own is not None:
            head.forward = own


@torch.no_grad()
def has_separate_head(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the logits of a model are the output of its head, not scaled or capped after it."""
    if output_head(model) is None:
        return False
    try:
        with evaluating(model), without_head(model):
            output = inputs.copied().run(model)
    except Exception:  # whatever it is, an ordinary pass shows it
        return False
    return isinstance(output, HiddenStates) and output.hidden.dim() == 3
