"""Predictions of one class out of several: of samples, tokens or pixels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from rankNAS.exceptions import DataError
from rankNAS.tasks.base import Prediction, Sums, at_least_float32, held, number
from rankNAS.tasks.checks import IGNORED

__all__ = ["Categorical", "Logits", "TopClasses"]

CHUNK = 1 << 20  # logits that are read at once, in float64
CACHED = 1 << 16  # of these on a CPU: outside of its cache they take several times as long
FEWEST = 4  # classes of a compact reference


class Logits(Prediction):
    """Base of predictions whose logits are there, or can be computed."""

    @abstractmethod
    def logits_of(self, rows: slice) -> Tensor:
        """The logits (n, C) of some predictions."""


@final
@dataclass(frozen=True, eq=False)
class Categorical(Logits):
    """Logits of N predictions over C classes.

    Args:
        logits: (N, C).
        targets: Classes, int64 (N,), `IGNORED` for what does not count; None without labels.
        counts: Whether a prediction counts, bool (N,); None if all do that have a target.
        weights: Class weights of the loss (C,).
        confusion: Whether to sum a confusion matrix.
    """

    logits: Tensor
    targets: Tensor | None = None
    counts: Tensor | None = None
    weights: Tensor | None = None
    confusion: bool = False

    def __len__(self) -> int:
        return len(self.logits) if self._valid is None else int(self._valid.sum())

    @cached_property
    def _valid(self) -> Tensor | None:
        """Rows that count; None if all do."""
        valid = self.counts
        if self.targets is not None:
            found = self.targets != IGNORED
            valid = found if valid is None else valid & found
        return None if valid is None or bool(valid.all()) else valid

    def logits_of(self, rows: slice) -> Tensor:
        return self.logits[rows]

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross entropy in nats; 0 if no prediction counts."""
        logits, targets = _of(self.logits, self._valid), self._targets()
        if not len(logits):
            return self.logits.sum() * 0.0
        logits = at_least_float32(logits)
        return functional.cross_entropy(
            logits,
            _of(targets, self._valid),
            weight=self._weights(logits),
            label_smoothing=label_smoothing,
        )

    def sampled_loss(self, generator: torch.Generator) -> Tensor:
        logits = _of(self.logits, self._valid)
        sampled = []
        for chunk in _chunks(logits.detach()):
            probabilities = chunk.float().softmax(-1)
            uniform = torch.rand(len(chunk), 1, generator=generator).to(probabilities)
            labels = (probabilities.cumsum(-1) < uniform).sum(-1)
            sampled.append(labels.clamp_max(chunk.shape[-1] - 1))
        if not sampled:
            return logits.sum() * 0.0
        return functional.cross_entropy(
            at_least_float32(logits), torch.cat(sampled), reduction="sum"
        )

    def distillation(self, reference: Prediction, temperature: float = 1.0) -> Tensor:
        """``T² KL(teacher ‖ student)``: its gradients do not grow with T (Hinton et al. 2015).

        A compact reference must be that of logits divided by T.
        """
        student = at_least_float32(_of(self.logits, self._valid))
        if not len(student):
            return self.logits.sum() * 0.0
        log_q = functional.log_softmax(student / temperature, dim=-1)
        if isinstance(reference, TopClasses):
            log_p = _of(reference.log_probabilities, self._valid)
            log_q = _with_rest(log_q.gather(-1, _of(reference.classes, self._valid).long()))
        else:
            assert isinstance(reference, Categorical)
            teacher = at_least_float32(_of(reference.logits, self._valid))
            log_p = functional.log_softmax(teacher / temperature, dim=-1)
        divergence = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return temperature**2 * divergence

    @torch.no_grad()
    def sums(self, reference: Prediction | None) -> Sums:
        total: Sums = {}
        for start, logits in self._numbered():
            rows = slice(start, start + len(logits))
            valid = None if self._valid is None else self._valid[rows]
            q = _Softmax.of(_of(logits, valid))
            found: Sums = {"count": number(len(q.logits), logits.device)}
            if self.targets is not None:
                found |= self._labelled(q, _of(self.targets[rows], valid))
            if reference is not None:
                found |= _divergences(q, reference, rows, valid)
            total = {k: total[k] + v for k, v in found.items()} if total else found
        return total

    def kept(self, most_bytes: int) -> Prediction | None:
        if self.nbytes <= most_bytes:
            return Categorical(held(self.logits))
        logits = self.logits.detach()
        # An int32 and a float32 for each class, and a float32 for all others together.
        count = min((most_bytes // len(logits) - 4) // 8, logits.shape[-1])
        return TopClasses.of(logits, count) if count >= FEWEST else None

    @property
    def nbytes(self) -> int:
        return self.logits.nbytes

    def _labelled(self, q: _Softmax, y: Tensor) -> Sums:
        classes = q.logits.shape[-1]
        if len(y) and (int(y.max()) >= classes or int(y.min()) < 0):
            wrong = y[(y < 0) | (y >= classes)][0]
            raise DataError(
                f"a target is the class {int(wrong)}, but the model has {classes} classes; number "
                f"the classes from 0, and mark what does not count by {IGNORED}."
            )
        nll = -q.log_probabilities_of(y[:, None])[:, 0]
        weights = self._weights(q.logits)
        w = torch.ones_like(nll) if weights is None else weights[y]
        found = {"loss": (w * nll).sum(), "weight": w.sum()}
        found["correct"] = (q.likeliest == y).double().sum()
        if self.confusion:
            cells = torch.bincount(y * classes + q.likeliest, minlength=classes**2)
            found["confusion"] = cells.reshape(classes, classes).double()
        return found

    def _numbered(self) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for chunk in _chunks(self.logits, CACHED if self.logits.device.type == "cpu" else CHUNK):
            yield start, chunk
            start += len(chunk)

    def _targets(self) -> Tensor:
        if self.targets is None:
            raise DataError("the batch has no targets; train with a teacher alone (distill=1).")
        return self.targets

    def _weights(self, like: Tensor) -> Tensor | None:
        return None if self.weights is None else self.weights.to(like)


@final
@dataclass(frozen=True, eq=False)
class TopClasses(Prediction):
    """The k most likely classes of N predictions: a compact reference.

    Divergences from it are those of the distributions over these classes and all others together,
    a lower bound of the exact ones.

    Args:
        classes: int32 (N, k).
        log_probabilities: float32 (N, k + 1), the last one of all other classes together.
    """

    classes: Tensor
    log_probabilities: Tensor

    @classmethod
    def of(cls, logits: Tensor, count: int) -> TopClasses:
        """The top classes of logits (N, C)."""
        classes, values = [], []
        for chunk in _chunks(logits):
            top = functional.log_softmax(chunk.double(), -1).topk(count)
            classes.append(top.indices.int())
            values.append(_with_rest(top.values).float())
        return cls(torch.cat(classes), torch.cat(values))

    def __len__(self) -> int:
        return len(self.classes)

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        raise _reference_only()

    def sampled_loss(self, generator: torch.Generator) -> Tensor:
        raise _reference_only()

    def distillation(self, reference: Prediction, temperature: float = 1.0) -> Tensor:
        raise _reference_only()

    def sums(self, reference: Prediction | None) -> Sums:
        raise _reference_only()

    def kept(self, most_bytes: int) -> Prediction | None:
        return self

    @property
    def nbytes(self) -> int:
        return self.classes.nbytes + self.log_probabilities.nbytes


def _reference_only() -> NotImplementedError:
    return NotImplementedError("a compact prediction is a reference and nothing else")


@final
@dataclass(frozen=True, eq=False)
class _Softmax:
    """Probabilities in float64. Only some of their logarithms are computed: they take long.

    Args:
        logits: (n, C).
        scaled: The probabilities (n, C) times `total`.
        total: (n,).
        log_total: The logits minus the logarithms of the probabilities, (n,).
        likeliest: The classes with the largest probabilities, (n,).
    """

    logits: Tensor
    scaled: Tensor
    total: Tensor
    log_total: Tensor
    likeliest: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _Softmax:
        """The probabilities of logits (n, C)."""
        largest, likeliest = logits.max(-1)  # faster in the given type
        logits, largest = logits.double(), largest.double()
        scaled = (logits - largest[:, None]).exp_()
        total = scaled.sum(-1)
        return cls(logits, scaled, total, largest + total.log(), likeliest)

    def log_probabilities_of(self, classes: Tensor) -> Tensor:
        """The logarithms (n, k) of the probabilities of some classes (n, k)."""
        return self.logits.gather(-1, classes) - self.log_total[:, None]

    def summed_mean(self, values: Tensor) -> Tensor:
        """The sum over rows of the means of values (n, C); probabilities of 0 contribute 0."""
        products: Tensor = torch.linalg.vecdot(self.scaled, values)
        if not bool(products.isfinite().all()):
            products = torch.where(self.scaled > 0, self.scaled * values, 0.0).sum(-1)
        return (products / self.total).sum()


def _divergences(q: _Softmax, reference: Prediction, rows: slice, valid: Tensor | None) -> Sums:
    """The summed KL divergences between a reference p and q in the counted rows."""
    if isinstance(reference, TopClasses):
        log_p = _of(reference.log_probabilities[rows], valid).double()
        log_q = q.log_probabilities_of(_of(reference.classes[rows], valid).long())
        log_q = _with_rest(log_q)
        return {"kl": _kl(log_p, log_q), "reverse_kl": _kl(log_q, log_p)}
    assert isinstance(reference, Logits)
    p = _Softmax.of(_of(reference.logits_of(rows), valid))
    ratios = (p.logits - q.logits).sub_((p.log_total - q.log_total)[:, None])  # log p / q
    return {"kl": p.summed_mean(ratios), "reverse_kl": 0.0 - q.summed_mean(ratios)}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The sum over rows of KL(p || q); classes of probability 0 under p contribute 0."""
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    return terms.sum()


def _with_rest(log_p: Tensor) -> Tensor:  # (n, k) -> (n, k + 1)
    """Log probabilities with that of all other classes together."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-15)
    return torch.cat([log_p, rest.log()], -1)


def _chunks(logits: Tensor, elements: int = CHUNK) -> tuple[Tensor, ...]:
    """Rows in parts of at most so many elements."""
    found: tuple[Tensor, ...] = logits.split(max(1, elements // max(1, logits.shape[-1])))
    return found


def _of(rows: Tensor, valid: Tensor | None) -> Tensor:
    return rows if valid is None else rows[valid]
