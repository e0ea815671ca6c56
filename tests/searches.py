"""A search that takes no time, the records that go on with it, and evaluators of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.compression.factorisation import Factorisation
from rankNAS.data.samples import Samples
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.storage.store import StudyStore
from rankNAS.tasks.infer import infer_task


def linear_search(**options: Any) -> rankNAS.Study:
    """One random trial on six linear layers; its factors and tables serve further ones."""
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(64, 64), nn.ReLU())]
    x, y = torch.randn(120, 64), torch.randint(0, 4, (120,))
    return rankNAS.search(
        nn.Sequential(*layers, nn.Linear(64, 4)).eval(),
        (TensorDataset(x[:100], y[:100]), TensorDataset(x[100:], y[100:])),
        budget={"macs": 0.5},
        strategy="random",
        n_trials=1,
        settings=rankNAS.Settings(calibration=32, validation=32),
        **options,
    )


def evaluator_of(factors: Factorisation, x: Tensor, y: Tensor, **options: Any) -> Evaluator:
    """An evaluator that calibrates and measures on the same samples; they tell its task."""
    samples = Samples.of((x, y))
    return Evaluator(factors, infer_task(factors.model, (x, y)), samples, samples, **options)


def opened(study: rankNAS.Study, storage: str | None) -> StudyStore:
    """A record of trials of a study, without those that the study has, in a storage."""
    return StudyStore.open(
        storage,
        "study",
        configuration={},
        choices=study.problem.labels(),
        directions=study.problem.directions,
        resume=True,
    )
