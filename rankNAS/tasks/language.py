"""Language modelling: the next token, or the token at masked positions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeVar, final

import torch
from torch import Tensor, nn

from rankNAS.exceptions import DataError
from rankNAS.tasks.base import Direction, Prediction, Task, main_output
from rankNAS.tasks.categorical import Categorical
from rankNAS.tasks.checks import IGNORED, check_length, check_some, whole_numbers
from rankNAS.tasks.classification import LIKELIHOOD, likelihood_metrics
from rankNAS.tasks.headed import Headed, HiddenStates, has_separate_head, without_head
from rankNAS.tasks.layout import MASKS, PADDINGS, Layout
from rankNAS.trees import rows, sample_count, tensors

__all__ = ["CausalLanguageModelling", "LanguageModelling", "MaskedLanguageModelling"]

LM = TypeVar("LM", bound="LanguageModelling")
MOST = 700.0  # the largest loss in nats whose exponential is finite


@dataclass(frozen=True, kw_only=True)
class LanguageModelling(Task):
    """Base of language models: logits (N, T, C), tokens (N, T), -100 for what does not count.

    Perplexity is exp of the mean loss over all tokens that count.

    Args:
        separate_head: Whether the model can run without its head, so that the logits of a few
            positions are computed at a time. Found from the first batch.
    """

    divergence_name: ClassVar[str] = "kl_divergence"
    separate_head: bool = field(default=False, repr=False)

    @property
    def directions(self) -> Mapping[str, Direction]:
        return {"perplexity": "minimize", "accuracy": "maximize", **LIKELIHOOD}

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        check_some(sums, self.name)
        found = likelihood_metrics(sums)
        accuracy = float(sums["correct"] / sums["count"])
        perplexity = math.exp(min(found["loss"], MOST))
        return {"perplexity": perplexity, "accuracy": accuracy, **found}

    def bound(self, batch: Any, model: nn.Module) -> Self:
        """The task with the layout of a batch; finds out whether the model has a head apart."""
        if self.layout is not None:
            return self
        return _with_head(super().bound(batch, model), batch, model)

    def compact(self, model: nn.Module) -> AbstractContextManager[None]:
        return without_head(model, strict=True) if self.separate_head else nullcontext()

    def predict(self, output: Any, batch: Any) -> Prediction:
        headed = isinstance(output, HiddenStates)
        logits = output.hidden if headed else main_output(output, self.name)
        targets = whole_numbers(self.targets_of(batch), self.name)
        check_length(logits, targets, self.name)
        if logits.dim() != 3 or logits.shape[:2] != targets.shape:
            raise DataError(
                f"the task {self.name!r} takes logits (N, T, C) for tokens (N, T), but the model "
                f"returns {tuple(logits.shape)} for tokens {tuple(targets.shape)}."
            )
        logits, targets = self._aligned(logits, targets)
        if headed:
            return Headed(logits.flatten(0, 1), output.head, targets.flatten())
        return Categorical(logits.flatten(0, 1), targets.flatten())

    def targets_of(self, batch: Any) -> Any:
        """The targets; -100 where the inputs are padded."""
        tokens, mask = super().targets_of(batch), self.mask_of(batch)
        if mask is None or not isinstance(tokens, Tensor) or mask.shape != tokens.shape:
            return tokens
        return tokens.where(mask, IGNORED)

    @abstractmethod
    def _aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and their targets."""


@final
@dataclass(frozen=True, kw_only=True)
class CausalLanguageModelling(LanguageModelling):
    """The next token at each position.

    Without labels, the inputs are the targets, but for padded positions.

    Args:
        shifted: Whether targets are already the next tokens, as in (x[:-1], x[1:]).
    """

    name: ClassVar[str] = "causal_lm"
    shifted: bool = False

    def describe(self) -> str:
        return "causal language modelling"

    def bound(self, batch: Any, model: nn.Module) -> Self:
        """The task with the layout of a batch; finds out whether targets are shifted."""
        if self.layout is not None:
            return self
        layout = Layout.of(batch, model)
        found = _with_head(replace(self, layout=layout), batch, model)
        x, y = _first(found, batch), layout.target_of(batch)
        if isinstance(y, Tensor) and x is not None and x.shape == y.shape and y.shape[-1] > 1:
            return replace(found, shifted=_are_shifted(x, y))
        return found

    def targets_of(self, batch: Any) -> Any:
        """The labels, or the tokens themselves without labels; -100 where they are padded."""
        if self._layout.target_of(batch) is not None:
            return super().targets_of(batch)
        tokens, mask = _first(self, batch), self.mask_of(batch)
        if tokens is None:
            raise DataError("a batch has no tokens (integers) among the model's inputs.")
        return tokens if mask is None else torch.where(mask, tokens, IGNORED)

    def _aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (logits, targets) if self.shifted else (logits[:, :-1], targets[:, 1:])


@final
@dataclass(frozen=True, kw_only=True)
class MaskedLanguageModelling(LanguageModelling):
    """The token at each position whose label is not -100."""

    name: ClassVar[str] = "masked_lm"

    def describe(self) -> str:
        return "masked language modelling"

    def _aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits, targets


def _with_head(task: LM, batch: Any, model: nn.Module) -> LM:
    """The task that knows whether the model runs without its head."""
    count = sample_count(batch)
    if count is None:
        return task
    one = task.inputs_of(rows(batch, slice(0, 1), count))
    return replace(task, separate_head=has_separate_head(model, one))


def _first(task: Task, batch: Any) -> Tensor | None:
    """The tokens among the model's inputs: ``input_ids``, or else the first integers."""
    inputs = task.inputs_of(batch)
    named = inputs.kwargs.get("input_ids")
    if isinstance(named, Tensor):
        return named
    others = [value for name, value in inputs.kwargs.items() if name not in (*MASKS, *PADDINGS)]
    found = (x for x in tensors([*inputs.args, *others]) if not x.is_floating_point())
    return next((x for x in found if x.dtype != torch.bool), None)


def _are_shifted(tokens: Tensor, targets: Tensor) -> bool:
    """Whether targets are the tokens one position later, rather than the tokens themselves."""
    counts = targets != IGNORED
    same = ((targets == tokens) & counts).sum()
    following = ((targets[..., :-1] == tokens[..., 1:]) & counts[..., :-1]).sum()
    return bool(following > same)
