"""Inputs, target and mask are found in every form of a batch."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rankNAS.exceptions import DataError
from rankNAS.tasks.layout import Layout
from rankNAS.trees import Inputs

A, B, Y = torch.rand(4, 3), torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
IDS, MASK = torch.tensor([[5, 6, 0]] * 4), torch.tensor([[1, 1, 0]] * 4)
NAMES = ["a", "b", "c", "d"]


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Text(nn.Module):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None
    ) -> Tensor:
        assert labels is None
        return input_ids


class Padded(nn.Module):
    def forward(self, tokens: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return tokens


class KeywordOnly(nn.Module):
    def forward(self, *, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


class Detector(nn.Module):
    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return images


class Whole(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"]


@dataclass
class Pair:
    a: Tensor
    b: Tensor
    label: Tensor


class Sample(NamedTuple):
    x: Tensor
    y: Tensor


def found(batch: Any, model: nn.Module, **given: Any) -> tuple[Inputs, Any, Tensor | None]:
    layout = Layout.of(batch, model, **given)
    return layout.inputs_of(batch), layout.target_of(batch), layout.mask_of(batch)


CASES: list[tuple[str, Any, Callable[[], nn.Module], tuple[Any, ...], dict[str, Any], Any]] = [
    ("pair", (A, Y), One, (A,), {}, Y),
    ("list", [A, Y], One, (A,), {}, Y),
    ("named tuple", Sample(A, Y), One, (A,), {}, Y),
    ("tensor", A, One, (A,), {}, None),
    ("tuple of one", (A,), One, (A,), {}, None),
    ("inner tuple", ((A, B), Y), Two, (A, B), {}, Y),
    ("inner list", [[A, B], Y], Two, (A, B), {}, Y),
    ("three", (A, B, Y), Two, (A, B), {}, Y),
    ("two inputs alone", (A, B), Two, (A, B), {}, None),
    ("inner tuple alone", ((A, B),), Two, (A, B), {}, None),
    ("dict alone", {"a": A, "b": B}, Two, (), {"a": A, "b": B}, None),
    ("dict and target", ({"a": A, "b": B}, Y), Two, (), {"a": A, "b": B}, Y),
    ("dataclass", Pair(A, B, Y), Two, (), {"a": A, "b": B}, Y),
    ("text", {"name": NAMES, "a": A, "b": B, "y": Y}, Two, (), {"a": A, "b": B}, Y),
    ("other key", {"image": A, "label": Y, "file": NAMES}, One, (A,), {}, Y),
    ("other key alone", {"image": A}, One, (A,), {}, None),
    ("keyword only", {"x": A, "scale": B, "target": Y}, KeywordOnly, (), {"x": A, "scale": B}, Y),
    ("anything by position", (A, B, Y), Anything, (A, B), {}, Y),
    ("anything by name", {"a": A, "b": B, "y": Y}, Anything, (), {"a": A, "b": B}, Y),
    ("ids", {"input_ids": IDS, "labels": Y}, Text, (), {"input_ids": IDS}, Y),
    ("images", ([A, B], [Y, Y]), Detector, ([A, B],), {}, [Y, Y]),
    ("a model that takes a dict", ({"x": A, "z": B}, Y), Whole, ({"x": A, "z": B},), {}, Y),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_inputs_and_target(case: Any) -> None:
    _, batch, model, args, kwargs, target = case
    inputs, y, mask = found(batch, model())
    assert mask is None
    assert _same(inputs.args, args)
    assert _same(inputs.kwargs, kwargs)
    assert _same(y, target)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first is second
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("labelled", [True, False])
def test_text_with_a_mask(kind: Callable[[Any], Any], labelled: bool) -> None:
    parts = {"labels": IDS} if labelled else {}
    batch = kind({**parts, "attention_mask": MASK, "input_ids": IDS, "length": NAMES})
    inputs, y, mask = found(batch, Text())
    assert set(inputs.kwargs) == {"input_ids", "attention_mask"}
    assert (y is IDS) == labelled
    assert torch.equal(mask, MASK.bool())
    assert inputs.run(Text()) is IDS


@pytest.mark.parametrize(
    "batch",
    [
        (IDS, MASK, Y),
        ((IDS, MASK), Y),
        ({"input_ids": IDS, "attention_mask": MASK}, Y),
        (IDS, MASK),
        {"input_ids": IDS, "attention_mask": MASK},
    ],
)
def test_masks_by_position_and_by_name(batch: Any) -> None:
    inputs, y, mask = found(batch, Text())
    assert inputs.run(Text()) is IDS
    assert y is (Y if isinstance(batch, tuple) and batch[-1] is Y else None)
    assert mask is not None
    assert torch.equal(mask, MASK.bool())


@pytest.mark.parametrize(
    "batch",
    [
        (IDS, MASK == 0, Y),
        ((IDS, MASK == 0), Y),
        {"tokens": IDS, "src_key_padding_mask": MASK == 0, "y": Y},
        ({"tokens": IDS, "src_key_padding_mask": MASK == 0}, Y),
    ],
)
def test_a_padding_mask_is_true_where_padded(batch: Any) -> None:
    _, y, mask = found(batch, Padded())
    assert y is Y
    assert mask is not None
    assert torch.equal(mask, MASK.bool())


def test_a_required_parameter_is_no_target() -> None:
    class Siamese(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    inputs, target, _ = found({"x": A, "y": B}, Siamese())
    assert list(inputs.kwargs) == ["x", "y"]
    assert target is None
    inputs, target, _ = found({"x": A, "y": B, "label": Y}, Siamese())
    assert list(inputs.kwargs) == ["x", "y"]
    assert target is Y


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_images_of_a_detector_are_one_argument_in_a_batch_of_any_size(count: int) -> None:
    images, boxes = [torch.rand(3, 8 + i, 9) for i in range(count)], [{"boxes": A}] * count
    inputs, target, _ = found((images, boxes), Detector(), labelled=True)
    assert inputs.args == (images,)
    assert target is boxes


def test_labels_are_left_out_where_the_task_has_none() -> None:
    inputs, target, _ = found((A, Y), One(), labelled=False)
    assert inputs.args == (A,)
    assert target is None
    inputs, target, _ = found({"a": A, "b": B, "label": Y}, Two(), labelled=False)
    assert list(inputs.kwargs) == ["a", "b"]
    assert target is None


@pytest.mark.parametrize(
    ("batch", "model", "said"),
    [
        ((), One, "empty tuple"),
        (3, One, "a batch is a int"),
        ({"u": A, "v": B, "y": Y}, One, "keys u, v, y, but the model's forward takes (x)"),
    ],
)
def test_batches_of_no_use(batch: Any, model: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(DataError) as error:
        Layout.of(batch, model())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_given_layout_passes_the_whole_batch() -> None:
    batch = {"x": A, "z": B, "y": Y}
    layout = Layout(inputs=None, target="y")
    assert layout.inputs_of(batch).run(Whole()) is A
    assert layout.target_of(batch) is Y
