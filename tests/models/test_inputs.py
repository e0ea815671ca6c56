"""Descriptions of a model's arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rankNAS.exceptions import UsageError
from rankNAS.models.inputs import InputSpec
from rankNAS.trees import Inputs, named_tensors, tensors


def example() -> Inputs:
    ids = torch.tensor([[3, 7, 1], [2, 2, 5], [4, 3, 3], [1, 6, 2]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    return Inputs(
        (ids, [torch.randn(4, 2).half(), (torch.randn(4), None)]),
        {"mask": mask, "table": torch.randn(9, 2), "scale": 0.5, "step": torch.tensor(3)},
    )


def test_random_arguments_have_the_form_of_the_example() -> None:
    given = example()
    spec = InputSpec.from_json(json.loads(json.dumps(InputSpec.of(given).to_json())))
    assert spec == InputSpec.of(given)
    for count in (1, 4, 6):
        found = spec.random(count)
        pairs = list(zip(named_tensors(found), named_tensors(given), strict=True))
        for (place, x), (expected, y) in pairs:
            assert (place, x.dtype) == (expected, y.dtype)
            batched = y.dim() and len(y) == 4
            assert x.shape == ((count, *y.shape[1:]) if batched else y.shape)
        assert found.kwargs["scale"] == 0.5 and found.args[1][1][1] is None


def test_integers_stay_in_their_range() -> None:
    found = InputSpec.of(example()).random(100)
    ids = found.args[0]
    assert (int(ids.min()), int(ids.max())) == (1, 7)
    assert int(found.kwargs["step"]) == 3


def test_no_row_of_a_mask_is_empty() -> None:
    mask: Tensor = InputSpec.of(example()).random(200).kwargs["mask"]
    assert bool(mask.any(1).all()) and not bool(mask.all(1).any())
    full = InputSpec.of({"mask": torch.ones(2, 4, dtype=torch.int64)}).random(3)
    assert bool((full.kwargs["mask"] == 1).all())


def test_equal_seeds_give_equal_arguments() -> None:
    spec = InputSpec.of(example())
    for x, y in zip(tensors(spec.random(3)), tensors(spec.random(3)), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(spec.random(3).args[0], spec.random(3, seed=1).args[0])


def test_other_objects_are_refused() -> None:
    @dataclass
    class Part:
        x: Tensor

    with pytest.raises(UsageError, match="an argument of the model is a Part; only tensors"):
        InputSpec.of(Inputs((Part(torch.zeros(2)),), {}))
    damaged: list[Any] = [None, {"args": []}, {"args": [{"what": 1}], "kwargs": {}}, {"args": 1}]
    for wrong in damaged:
        with pytest.raises(UsageError, match="description of a model's inputs is damaged"):
            InputSpec.from_json(wrong)
