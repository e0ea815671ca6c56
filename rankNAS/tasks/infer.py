"""The task of a model and its data: given by name, by an object, or found from a first batch."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.copies import evaluating
from rankNAS.data.base import Data, TextForm
from rankNAS.data.samples import Samples
from rankNAS.data.sizes import affordable_samples
from rankNAS.exceptions import DataError, RankNASError, UnknownNameError, UsageError
from rankNAS.lazy import load
from rankNAS.plugins import is_plugin, load_callable
from rankNAS.tasks import TASKS
from rankNAS.tasks.base import Task, named_logits, one_tensor
from rankNAS.tasks.checks import IGNORED, check_finite
from rankNAS.tasks.classification import Classification, MultiLabel
from rankNAS.tasks.language import CausalLanguageModelling, MaskedLanguageModelling
from rankNAS.tasks.layout import Layout
from rankNAS.tasks.matching import Matching
from rankNAS.tasks.regression import Regression
from rankNAS.tasks.segmentation import Segmentation
from rankNAS.tasks.slow_types import warn_of_slow_weights
from rankNAS.tasks.text import check_text
from rankNAS.trees import (
    Inputs,
    count_bytes,
    device_of,
    size_of,
    tensors,
    to_device,
    type_difference,
)

__all__ = ["examples", "infer_task", "make_task", "resolve_task"]

EXAMPLES = 64  # samples whose targets are looked at
LOOKED = 1024  # tokens of the texts among them whose outputs are large
OUTPUT_BYTES = 64 << 20  # of their outputs
SIZES = 5  # sizes of samples that the model is tried on
logger = logging.getLogger(__name__)


def make_task(given: str | Task) -> Task:
    """The task for a name, ``file.py:function`` (which returns a task), or a task itself.

    ``matching:kl`` is `Matching` by KL divergence.

    Raises:
        UnknownNameError: There is no such task.
        UsageError: The function cannot be loaded, or returns no task.

    >>> make_task("regression").name
    'regression'
    """
    if isinstance(given, Task):
        return given
    if not isinstance(given, str):
        raise UsageError(
            f"a task must be a name or a Task, got {type(given).__name__}; see rankNAS.tasks."
        )
    if is_plugin(given):
        found = load_callable(given, "task")()
        if not isinstance(found, Task):
            raise UsageError(f"{given} returned a {type(found).__name__} instead of a Task.")
        return found
    name, _, by = given.partition(":")
    if name not in TASKS or (by and (name, by) != ("matching", "kl")):
        raise UnknownNameError("task", given, TASKS, "Or path/to/file.py:function.")
    if by:
        return Matching(by="kl")
    made: Task = load(TASKS[name][0])()
    return made


def infer_task(model: nn.Module, batch: Any) -> Task:
    """The task of a model, from the form of a batch, its targets and the model's output.

    Args:
        model: The dense model, on the device of the batch.
        batch: A batch of at least two samples, if there are.

    Raises:
        DataError: Several tasks or none fit, or the model fails on the batch.

    Example:
        >>> batch = torch.zeros(4, 8), torch.tensor([0, 2, 1, 0])
        >>> infer_task(nn.Linear(8, 3), batch).describe()
        'classification of 3 classes'
    """
    return _inferred(model, batch)[0]


def _inferred(model: nn.Module, batch: Any, text: TextForm | None = None) -> tuple[Task, Any]:
    """The task, and the model's output for the batch, which may be of language data."""
    layout = Layout.of(batch, model)
    targets = layout.target_of(batch)
    output, changed = _run(model, layout.inputs_of(batch))
    if text is not None and _continues(model, output, text):
        task: Task = CausalLanguageModelling().bound(batch, model)
    elif targets is None:
        task = _unlabelled(model, output, layout, batch)
    else:
        found = _labelled(model, output, targets, layout.inputs_of(batch))
        task = found.bound(batch, model)
        task.predict(output, batch)  # raises an error if the two do not fit
    return replace(task, changes_inputs=changed), output


def resolve_task(given: str | Task | None, model: nn.Module, data: Data) -> Task:
    """The task of a model and its data, checked on the first samples and on stored targets.

    Args:
        given: A name, a task, or None to infer it.
        model: The dense model.
        data: The data.

    Raises:
        DataError: The data do not fit the model or the task.
        UnknownNameError: There is no such task.
    """
    if not isinstance(given, Task):  # else it was resolved before
        warn_of_slow_weights(model)
    given = None if given is None else make_task(given)
    check_text(model, data)
    batch = examples(model, data.train, given)
    if given is None:
        task, output = _inferred(model, batch, data.text)
    else:
        task = given.bound(batch, model)
        output, changed = _run(model, task.inputs_of(batch))
        task = replace(task, changes_inputs=changed or task.changes_inputs)
    first = Samples.of(iter([batch]))  # also where the others are not in memory
    for where, samples in (
        ("train", first),
        ("train", data.train),
        ("valid", data.valid),
        ("test", data.test),
    ):
        if samples is not None:
            task.check(samples, where, output)
    task.predict(output, batch).sums(None)  # raises an error for a target or metric of no use
    _check_sizes(model, task, data.train)
    logger.info("the task is %s", task.describe())
    return task


def examples(model: nn.Module, samples: Samples, task: Task | None = None) -> Any:
    """The first samples: `EXAMPLES`, or fewer where the model's outputs are large.

    Args:
        model: The dense model.
        samples: The training samples.
        task: The task, if it is known.

    Raises:
        DataError: A target is NaN or infinite, or the model fails.
    """
    device = device_of(model)
    few = samples.example(affordable_samples(2, samples, LOOKED), device)
    reader = Layout.of(few, model) if task is None else task.bound(few, model)
    output, _ = _run(model, reader.inputs_of(few))
    each = max(1, count_bytes(output) // size_of(few))
    batch = samples.example(min(EXAMPLES, max(size_of(few), OUTPUT_BYTES // each)), device)
    layout = reader if isinstance(reader, Layout) else reader.layout
    targets = None if layout is None else layout.target_of(batch)
    if isinstance(targets, Tensor):
        check_finite(targets, "of the train split")
    return batch


@torch.no_grad()
def _run(model: nn.Module, inputs: Inputs) -> tuple[Any, bool]:
    """The model's output, and whether it changes its inputs; those that are given stay intact."""
    own = inputs.copied()
    before = [(x, x._version) for x in tensors(own)]
    try:
        with evaluating(model):
            output = own.run(model)
    except RankNASError:
        raise
    except Exception as error:
        raise DataError(
            f"{type(model).__name__} fails on the first batch of the data: "
            f"{type_difference(model, inputs)}"
            f"{type(error).__name__}: {error}; check the order and the names of the inputs."
        ) from error
    after = tensors(own)  # a list or a dict may hold other tensors now
    same = len(after) == len(before) and all(
        x is y and y._version == version for y, (x, version) in zip(after, before, strict=True)
    )
    return output, not (same and _equal(own, inputs))


def _equal(a: Inputs, b: Inputs) -> bool:
    """Whether two arguments have equal values; NaN equals NaN."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in pairs)


def _check_sizes(model: nn.Module, task: Task, samples: Samples) -> None:
    """Raise a DataError if the model takes the first sample, but none of another size."""
    if samples.uniform:
        return
    (first, example), *others = samples.kinds(SIZES)
    for row, batch in others:
        inputs = task.inputs_of(batch)
        try:
            _run(model, to_device(inputs, device_of(model)))
        except DataError as error:
            raise DataError(
                f"{type(model).__name__} fails on item {row} of the train split, which has the "
                f"shape {_shapes(inputs)}, but runs on item {first} with "
                f"{_shapes(task.inputs_of(example))} ({error.__cause__}); make all items equal in "
                "size: resize and crop images, or pad."
            ) from error


def _shapes(inputs: Inputs) -> str:
    return " and ".join(str(tuple(tensor.shape[1:])) for tensor in tensors(inputs))


def _continues(model: nn.Module, output: Any, text: TextForm) -> bool:
    """Whether a model gives logits for each token of a text, and is no masked model."""
    logits = one_tensor(output)
    if logits is None or logits.dim() != 3 or "Masked" in type(model).__name__:
        return False
    return logits.shape[1] == text.context and text.largest < logits.shape[2]


def _unlabelled(model: nn.Module, output: Any, layout: Layout, batch: Any) -> Task:
    logits = one_tensor(output)
    name = type(model).__name__
    causal = "CausalLM" in name or "LMHead" in name
    if logits is not None and logits.dim() == 3 and causal:
        return CausalLanguageModelling(layout=layout)
    by_kl = not isinstance(output, Tensor) and named_logits(output) is not None
    return Matching(by="kl" if by_kl else "distance", layout=layout)


def _labelled(model: nn.Module, output: Any, targets: Any, inputs: Inputs) -> Task:
    logits = one_tensor(output)
    if logits is None or not isinstance(targets, Tensor):
        raise DataError(
            f"the task is unclear: the model returns a {type(output).__name__} of "
            f"{len(tensors(output))} tensors for targets that are a {type(targets).__name__}; "
            "give a model that returns its predictions alone or as `logits`, or "
            "task=Custom(loss, metrics), whose functions get the whole output."
        )
    targets = targets.long() if targets.dtype == torch.bool else targets
    if _are_classes(targets):
        return _of_classes(model, logits, targets, inputs)
    return MultiLabel() if _are_labels(logits, targets) else Regression()


def _of_classes(model: nn.Module, logits: Tensor, targets: Tensor, inputs: Inputs) -> Task:
    """The task of whole-number targets."""
    flat = targets[:, 0] if targets.dim() > 1 and targets.shape[1] == 1 else targets
    if flat.dim() == 1 and logits.dim() <= 2:
        binary = logits.dim() == 1 or logits.shape[-1] == 1
        classes = 1 if binary else logits.shape[-1]
        if _plausible(flat, max(2, classes)) or not (binary or targets.is_floating_point()):
            return Classification(classes=classes)
        return Regression()
    segmented = logits.dim() >= 3 and logits.shape[:1] + logits.shape[2:] == flat.shape
    tokens = logits.dim() == 3 and logits.shape[:2] == flat.shape
    if segmented and tokens:
        raise DataError(
            f"the task is unclear: logits {tuple(logits.shape)} for targets {tuple(flat.shape)} "
            "have their classes on axis 1 or on axis 2; give the task 'segmentation', 'causal_lm' "
            "or 'masked_lm'."
        )
    if segmented and (logits.shape[1] > 1 or _plausible(flat, 2)):
        return Segmentation()
    if tokens:
        masked = "Masked" in type(model).__name__ or "TokenClassification" in type(model).__name__
        causal = not masked and _continue(inputs, flat)
        return CausalLanguageModelling() if causal else MaskedLanguageModelling()
    if logits.shape == targets.shape and _between(targets, 0, 1):
        return MultiLabel()
    if logits.shape == targets.shape:
        return Regression()
    raise DataError(
        f"the task is unclear: the model returns {tuple(logits.shape)} for targets "
        f"{tuple(targets.shape)}; give the task by name, or Custom(loss, metrics)."
    )


def _plausible(targets: Tensor, classes: int) -> bool:
    """Whether whole numbers are class numbers."""
    return _between(targets, 0, classes - 1)


def _continue(inputs: Inputs, targets: Tensor) -> bool:
    """Whether most targets are the tokens of the inputs, or those one position later."""
    counts = targets != IGNORED
    for tokens in tensors(inputs):
        if tokens.shape == targets.shape and not tokens.is_floating_point():
            same = (targets == tokens)[counts]
            following = (targets[:, :-1] == tokens[:, 1:])[counts[:, :-1]]
            if max(same.sum(), following.sum()) > counts.sum() / 2:
                return True
    return False


def _are_classes(targets: Tensor) -> bool:
    """Whether targets are whole numbers."""
    if not targets.is_floating_point():
        return not targets.is_complex()
    return bool(targets.isfinite().all()) and bool((targets == targets.round()).all())


def _are_labels(logits: Tensor, targets: Tensor) -> bool:
    """Whether targets are probabilities of several labels, for logits of their shape."""
    several = targets.dim() == 2 and targets.shape[1] > 1
    if not several or logits.shape != targets.shape or not _between(targets, 0, 1):
        return False
    # Real targets may lie in [0, 1] as well: the model then predicts them without a sigmoid.
    counts = targets != IGNORED
    z, y = logits.float()[counts], targets.float()[counts]
    return bool((z.sigmoid() - y).square().sum() <= (z - y).square().sum())


def _between(targets: Tensor, low: float, high: float) -> bool:
    counted = targets[targets != IGNORED]
    return bool(((counted >= low) & (counted <= high)).all())
