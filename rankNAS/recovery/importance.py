"""The importance of samples for a training: scores by name, and a function of Python as a score.

A score reads what the network gives for a batch in evaluation mode (`Outcome`) and returns a
number for each sample; the samples with the largest numbers are the most important ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.data.samples import Samples
from rankNAS.exceptions import UsageError
from rankNAS.tasks.base import Prediction, Task, at_least_float32
from rankNAS.tasks.binary import Bernoulli
from rankNAS.tasks.categorical import Categorical
from rankNAS.tasks.checks import IGNORED
from rankNAS.tasks.classification import LIKELIHOOD
from rankNAS.tasks.continuous import Gaussian
from rankNAS.trees import is_batched, rows, size_of, tensors, tree_map

__all__ = ["SCORES", "Outcome", "Score", "check_score", "importance"]


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What a score reads: a batch and the network in evaluation mode.

    Args:
        network: The network.
        task: Reads batches and outputs.
        batch: The batch.
        generator: For scores that draw numbers.
    """

    network: nn.Module
    task: Task
    batch: Any
    generator: torch.Generator

    def __len__(self) -> int:
        """The number of samples."""
        return size_of(self.batch)

    @cached_property
    def output(self) -> Any:
        """The network's output for the batch, without gradients; computed when it is asked for."""
        return self.task.inputs_of(self.batch).run(self.network)

    @cached_property
    def prediction(self) -> Prediction:
        """The prediction that the output is."""
        return self.task.predict(self.output, self.batch)


Score: TypeAlias = Callable[[Outcome], Tensor]


def loss(outcome: Outcome) -> Tensor:
    """The task's loss of each sample (N,); of tokens or pixels, the mean over those that count."""
    found = outcome.prediction
    if isinstance(found, Categorical):
        assert found.targets is not None
        weights = None if found.weights is None else found.weights.to(found.logits)
        losses = functional.cross_entropy(
            at_least_float32(found.logits),
            found.targets,
            weight=None if weights is None else at_least_float32(weights),
            ignore_index=IGNORED,
            reduction="none",
        )
        return _mean(losses, _counted(found), len(outcome))
    if isinstance(found, Gaussian):
        return (found.mean - found.targets).square().mean(1)
    return torch.stack([_alone(outcome, number).loss() for number in range(len(outcome))])


def gradient(outcome: Outcome) -> Tensor:
    """The norm (N,) of the loss's gradient with respect to a sample's output.

    For cross-entropy it is the norm of the probabilities minus the one-hot label.

    References:
        Paul, Ganguli and Dziugaite, NeurIPS 2021 (EL2N).
    """
    with torch.enable_grad():
        output = tree_map(_leaf, outcome.output)
        prediction = outcome.task.predict(output, outcome.batch)
        leaves = [x for x in tensors(output) if x.requires_grad]
        found = torch.autograd.grad(prediction.loss(), leaves, allow_unused=True)
    total = torch.zeros(len(outcome))
    for part in found:
        if part is not None and is_batched(part, len(outcome)):
            total = total + at_least_float32(part).flatten(1).square().sum(1).cpu()
    return len(prediction) * total.sqrt()  # the loss is a mean over the batch


def entropy(outcome: Outcome) -> Tensor:
    """The entropy (N,) in nats of the predicted distribution."""
    found = outcome.prediction
    if isinstance(found, Bernoulli):
        p = at_least_float32(found.logits).sigmoid()
        return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean(1)
    assert isinstance(found, Categorical)
    p = at_least_float32(found.logits).softmax(-1)
    return _mean(-torch.xlogy(p, p).sum(-1), _counted(found), len(outcome))


def margin(outcome: Outcome) -> Tensor:
    """One minus the margin (N,) between the two largest probabilities."""
    found = outcome.prediction
    if isinstance(found, Bernoulli):
        return 1 - (2 * at_least_float32(found.logits).sigmoid() - 1).abs().mean(1)
    assert isinstance(found, Categorical)
    top = at_least_float32(found.logits).softmax(-1).topk(2).values
    return _mean(1 - (top[:, 0] - top[:, 1]), _counted(found), len(outcome))


def random(outcome: Outcome) -> Tensor:
    """Uniform random numbers (N,); the network does not run."""
    return torch.rand(len(outcome), generator=outcome.generator)


#: Scores by name.
SCORES: Mapping[str, Score] = {
    "loss": loss,
    "gradient": gradient,
    "entropy": entropy,
    "margin": margin,
    "random": random,
}
OF_LABELS, OF_CLASSES = ("loss", "gradient"), ("entropy", "margin")


def check_score(name: str, task: Task) -> None:
    """Raise a UsageError if a score does not fit a task."""
    if name in OF_LABELS and not task.labelled:
        raise UsageError(
            f"the score {name!r} needs labels, but the task {task.name!r} has none; take the "
            "score 'random', or give a function of an `Outcome`."
        )
    if name in OF_CLASSES and not LIKELIHOOD.keys() <= task.directions.keys():
        raise UsageError(
            f"the score {name!r} needs probabilities of classes, but the task {task.name!r} "
            "predicts none; take the score 'loss', 'gradient' or 'random'."
        )


@torch.no_grad()
def importance(
    network: nn.Module,
    samples: Samples,
    task: Task,
    score: Score,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """The scores of all samples, float32 (n,); the network ends in evaluation mode.

    Args:
        network: The network.
        samples: The samples, which are not augmented.
        task: Reads batches and outputs.
        score: The score.
        batch_size: Samples per batch.
        device: Where the network is.
        seed: The random seed of scores that draw numbers.

    Raises:
        UsageError: The score gives no finite number for each sample.
    """
    network.eval()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in _in_order(samples, batch_size, device):
        outcome = Outcome(network, task, batch, generator)
        values = score(outcome)
        if not isinstance(values, Tensor) or values.shape != (len(outcome),):
            shown = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UsageError(
                f"a score must return a tensor with a number for each of the {len(outcome)} "
                f"samples, but it returns {shown}."
            )
        found.append(values.detach().float().cpu())
    scores = torch.cat(found)
    if not bool(scores.isfinite().all()):
        row = int(scores.isfinite().logical_not().nonzero()[0])
        raise UsageError(
            f"the score of sample {row} is {float(scores[row])}; lower the learning rate, or "
            "mend the score."
        )
    return scores


def _in_order(samples: Samples, size: int, device: torch.device | str) -> Iterator[Any]:
    """Batches in the order of the samples; batches of unequal samples would have another one."""
    step = size if samples.uniform else 1
    for start in range(0, len(samples), step):
        positions = torch.arange(start, min(start + step, len(samples)))
        yield from samples.take(positions).batches(step, device=device)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def _alone(outcome: Outcome, number: int) -> Prediction:
    """The prediction for one sample of a batch."""
    wanted = slice(number, number + 1)
    parts = (rows(tree, wanted, len(outcome)) for tree in (outcome.output, outcome.batch))
    return outcome.task.predict(*parts)


def _counted(found: Categorical) -> Tensor:
    """Which predictions count, bool (M,)."""
    counted = torch.ones(len(found.logits), dtype=torch.bool, device=found.logits.device)
    if found.targets is not None:
        counted = counted & (found.targets != IGNORED)
    return counted if found.counts is None else counted & found.counts


def _mean(values: Tensor, counted: Tensor, samples: int) -> Tensor:
    """The mean (N,) of the values (M,) of each sample that count; 0 if none does."""
    values, kept = (values * counted).reshape(samples, -1), counted.reshape(samples, -1)
    return values.sum(1) / kept.sum(1).clamp_min(1)
