"""Checks of language data against a model: vocabulary, context, and the position of targets."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.copies import evaluating
from rankNAS.data.base import Data, TextForm
from rankNAS.data.samples import Samples
from rankNAS.exceptions import DataError
from rankNAS.tasks.base import Task, main_output
from rankNAS.tasks.checks import IGNORED
from rankNAS.tasks.headed import HiddenStates
from rankNAS.tasks.language import CausalLanguageModelling
from rankNAS.trees import device_of

__all__ = ["check_text", "config_number", "target_losses", "warn_of_targets"]

logger = logging.getLogger(__name__)
#: Names in the configurations of models for the largest number of tokens of a window.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
CHANCE = 1.0  # nats above the loss of a guess, before it is worth a word
POSITIONS_AT_ONCE = 128  # whose logits are computed by a separate head
MARGIN = 0.5  # nats by which another position of the targets is better before it is worth a word


def check_text(model: nn.Module, data: Data) -> None:
    """Raise a DataError unless a model takes the windows and the token ids of language data.

    Nothing is run.
    """
    text = data.text
    if text is None:
        return
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(
            f"{type(model).__name__} is an encoder-decoder, which has no perplexity of a running "
            "text; give pairs by a file.py:factory, with the keys input_ids and labels."
        )
    most = config_number(config, *POSITIONS)
    if most is not None and text.context > most:
        raise DataError(
            f"the windows of {data.name} have {text.context} tokens, but {type(model).__name__} "
            f"takes {most}; give --context {most} or less."
        )
    _check_vocabulary(model, data.name, text)


def _check_vocabulary(model: nn.Module, name: str, text: TextForm) -> None:
    rows = _embedding_rows(model)
    if rows is None:
        return
    if text.vocabulary is not None and text.vocabulary > rows:
        raise DataError(
            f"the tokenizer {text.tokenizer!r} has {text.vocabulary} token ids, but the embedding "
            f"of {type(model).__name__} has {rows} rows; give the tokenizer of the model, by "
            "?tokenizer=FOLDER."
        )
    if text.largest >= rows:
        raise DataError(
            f"{name} has the token id {text.largest}, but the embedding of "
            f"{type(model).__name__} has {rows} rows; give ids of the model's own tokenizer."
        )


def _embedding_rows(model: nn.Module) -> int | None:
    """The rows of the embedding of tokens, or of the largest one; None if there is none."""
    try:
        known: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):  # no model of transformers
        known = None
    if isinstance(known, nn.Embedding):
        return known.num_embeddings
    found = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(found, default=None)


def config_number(config: object, *names: str) -> int | None:
    """The first positive number of these names in a model's configuration."""
    found = (getattr(config, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def warn_of_targets(model: nn.Module, task: Task, samples: Samples) -> None:
    """Warn if a causal model predicts a token at another position than that of its target.

    Labels that are not shifted, or shifted twice, otherwise give a perplexity that means nothing.
    So does the tokenizer of another model, which shows in a loss above that of a guess.

    Args:
        model: The trained dense model.
        task: Its task; others than causal language modelling pass.
        samples: Some samples.
    """
    if not isinstance(task, CausalLanguageModelling):
        return
    losses, classes = target_losses(model, task, samples.example(1, device_of(model)))
    if not losses:
        return
    best = min(losses, key=lambda move: losses[move])
    if losses[best] + MARGIN < losses[0]:
        logger.warning(
            "%s has a loss of %.2f nats at its targets, and of %.2f at those %d position%s %s: "
            "the labels may be unshifted, or shifted twice, or the model may be a masked one; "
            "check them, or give data without labels.",
            type(model).__name__,
            losses[0],
            losses[best],
            abs(best),
            "s" * (abs(best) > 1),
            "before" if best < 0 else "after",
        )
    elif losses[0] > math.log(classes) + CHANCE:
        logger.warning(
            "%s has a loss of %.2f nats, more than that of a guess among its %d tokens; check "
            "that its weights are trained and that the tokenizer is its own.",
            type(model).__name__,
            losses[0],
            classes,
        )


@torch.no_grad()
def target_losses(
    model: nn.Module, task: CausalLanguageModelling, batch: Any
) -> tuple[dict[int, float], int]:
    """The mean loss in nats with the targets moved by -2 to 1 positions, and the classes.

    Two back is where labels belong that the data shift once and the task once more. A position
    without a target is left out.
    """
    with evaluating(model), task.compact(model):
        output = task.inputs_of(batch).run(model)
    targets = task.targets_of(batch).long()
    shift = 0 if task.shifted else 1
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    classes = 0
    for start, logits in _windows(output, task.name):
        classes = logits.shape[-1]
        for move in (-2, -1, 0, 1):
            z, y = _moved(logits, targets, start, shift + move)
            counted = (y != IGNORED).nonzero(as_tuple=True)
            if len(counted[0]):
                loss = functional.cross_entropy(z[counted].float(), y[counted], reduction="sum")
                sums[move] = sums.get(move, 0.0) + float(loss)
                counts[move] = counts.get(move, 0) + len(counted[0])
    found = {move: sums[move] / counts[move] for move in sums}
    return found if 0 in found and math.isfinite(found[0]) else {}, classes


def _windows(output: Any, name: str) -> Iterator[tuple[int, Tensor]]:
    """The logits (N, t, C) of some positions at a time, with the number of the first."""
    if not isinstance(output, HiddenStates):
        yield 0, main_output(output, name)
        return
    for start in range(0, output.hidden.shape[1], POSITIONS_AT_ONCE):
        yield start, output.head(output.hidden[:, start : start + POSITIONS_AT_ONCE])


def _moved(logits: Tensor, targets: Tensor, start: int, by: int) -> tuple[Tensor, Tensor]:
    """Logits (N, t, C) of the positions from `start` on, with the targets `by` positions later."""
    length = targets.shape[1]
    first, last = max(start, -by), min(start + logits.shape[1], length - by)
    if first >= last:
        return logits[:, :0], targets[:, :0]
    return logits[:, first - start : last - start], targets[:, first + by : last + by]
