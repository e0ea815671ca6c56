"""Models whose output is a container: used, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.exceptions import DataError

X = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(96) % 4


@dataclass
class Scores:
    scores: Tensor


@dataclass
class Logits:
    logits: Tensor
    hidden: Tensor


class Net(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.body(x))


def searched(form: Callable[[Tensor], Any], data: Any) -> rankNAS.Study:
    torch.manual_seed(0)
    settings = rankNAS.Settings(calibration=32, validation=32)
    return rankNAS.search(
        Net(form).eval(), data, budget={"macs": 0.6}, strategy="solve", settings=settings
    )


@pytest.mark.parametrize(
    "form", [lambda z: (z,), lambda z: [z], Scores, lambda z: Logits(z, 2 * z), lambda z: {"y": z}]
)
def test_one_tensor_in_a_container_is_the_prediction(form: Callable[[Tensor], Any]) -> None:
    whole = (TensorDataset(X, Y), TensorDataset(X, Y))
    plain, found = searched(lambda z: z, whole), searched(form, whole)
    assert found.task.name == "classification"
    assert found.best.metrics == pytest.approx(plain.best.metrics)
    assert type(found.materialise()(X[:2])) is type(form(X))


def test_several_tensors_are_refused_in_one_line() -> None:
    whole = (TensorDataset(X, Y), TensorDataset(X, Y))
    with pytest.raises(
        DataError, match=r"tuple of 2 tensors .*give a model that returns"
    ) as found:
        searched(lambda z: (z, z), whole)
    assert "\n" not in str(found.value)
    assert searched(lambda z: (z, z), X).task.describe().endswith("(distance)")
