"""The task is found from labels of every form, and bad input is one line that names its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.data.loading import load_data
from rankNAS.exceptions import DataError, RankNASError, UnknownNameError, UsageError
from rankNAS.tasks import Custom, Regression, Segmentation
from rankNAS.tasks.infer import infer_task, make_task, resolve_task

X = torch.rand(8, 3)
CLASSES = torch.tensor([0, 2, 1, 0, 1, 2, 0, 1])
BITS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
MANY = torch.tensor([[0, 1], [1, 1]] * 4)


class Returns(nn.Module):
    """A model that returns zeros of a shape for each sample."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), *self.shape)


IGNORING = CLASSES.clone()
IGNORING[:3] = -100

CASES = [
    ((3,), CLASSES, "classification of 3 classes"),
    ((3,), CLASSES[:, None], "classification of 3 classes"),
    ((3,), CLASSES.int(), "classification of 3 classes"),
    ((3,), CLASSES.float(), "classification of 3 classes"),
    ((3,), CLASSES.float()[:, None], "classification of 3 classes"),
    ((3,), IGNORING, "classification of 3 classes"),
    ((3,), IGNORING.float(), "classification of 3 classes"),
    ((3,), CLASSES.byte(), "classification of 3 classes"),
    ((2,), BITS.bool(), "classification of 2 classes"),
    ((2,), BITS.bool()[:, None], "classification of 2 classes"),
    *[
        (shape, y, "classification of 2 classes by one logit")
        for shape in ((), (1,))
        for y in (BITS, BITS[:, None], BITS.float(), BITS.float()[:, None], BITS.bool())
    ],
    ((2,), MANY, "several labels a sample"),
    ((2,), MANY.bool(), "several labels a sample"),
    ((2,), MANY.float(), "several labels a sample"),
    ((2,), MANY * 0.7, "several labels a sample"),
    ((), torch.rand(8), "regression"),
    ((1,), torch.rand(8), "regression"),
    ((1,), torch.rand(8, 1), "regression"),
    ((), CLASSES * 3, "regression"),
    ((1,), CLASSES.float() * 3, "regression"),
    ((2,), torch.rand(8, 2) * 3, "regression"),
    ((2,), MANY * 3, "regression"),
    ((4, 5, 6), torch.zeros(8, 5, 6).long(), "segmentation"),
    ((4, 5, 6), torch.zeros(8, 1, 5, 6), "segmentation"),
    ((2, 5, 6), torch.zeros(8, 5, 6).bool(), "segmentation"),
    ((1, 5, 6), torch.zeros(8, 5, 6).long(), "segmentation"),
    ((1, 5, 6), torch.zeros(8, 1, 5, 6), "segmentation"),
    ((1, 5, 6), torch.full((8, 1, 5, 6), 9), "regression"),
    ((3, 5, 6), torch.rand(8, 3, 5, 6), "regression"),
    ((4, 7), torch.zeros(8, 4).long(), "masked language modelling"),
    ((7, 4), torch.zeros(8, 4).long(), "segmentation"),
]


@pytest.mark.parametrize(("shape", "y", "said"), CASES)
def test_labels_of_every_form(shape: tuple[int, ...], y: Tensor, said: str) -> None:
    task = infer_task(Returns(*shape), (X, y))
    assert task.describe() == said
    prediction = task.predict(torch.zeros(8, *shape), (X, y))
    found = task.finish(prediction.sums(prediction))
    assert set(found) == set(task.directions)
    assert all(map(math.isfinite, found.values()))


def test_real_targets_in_the_unit_interval_are_told_from_probabilities() -> None:
    logits = 4 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert infer_task(nn.Identity(), (X, X + 1e-3)).name == "regression"
    assert infer_task(nn.Identity(), (logits, logits.sigmoid())).name == "multilabel"


@pytest.mark.parametrize("batch", [X, (X,), {"x": X}])
def test_without_labels_the_model_is_matched(batch: Any) -> None:
    assert infer_task(nn.Linear(3, 2), _named(batch)).name == "matching"


def _named(batch: Any) -> Any:
    return {"input": batch["x"]} if isinstance(batch, dict) else batch


@pytest.mark.parametrize(
    ("shape", "y", "said"),
    [
        ((4, 4), torch.zeros(8, 4).long(), "on axis 1 or on axis 2; give the task 'segmentation'"),
        ((3,), torch.zeros(8, 5).long(), "the task is unclear: the model returns (8, 3)"),
        ((3,), torch.rand(8, 2), "the model returns (8, 3) for targets (8, 2)"),
        ((3,), torch.rand(8), "the model returns (8, 3) for targets (8,)"),
        ((1,), torch.rand(8, dtype=torch.cfloat), "complex"),
    ],
)
def test_contradictions(shape: tuple[int, ...], y: Tensor, said: str) -> None:
    with pytest.raises(DataError) as error:
        infer_task(Returns(*shape), (X, y))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def items(y: Tensor) -> list[Any]:
    return list(zip(torch.rand(len(y), 3), y, strict=True))


def resolved(model: nn.Module, source: Any, task: Any = None) -> Any:
    return resolve_task(task, model, load_data((source, None)))


def bad(value: float, at: int = 70) -> Tensor:
    y = torch.rand(80)
    y[at] = value
    return y


@pytest.mark.parametrize("at", [2, 70])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", [None, "regression"])
def test_targets_that_are_not_finite_are_named(at: int, value: float, task: Any) -> None:
    with pytest.raises(DataError, match=f"item {at} of the train split has the target {value}"):
        resolved(Returns(), items(bad(value, at)), task)


@pytest.mark.parametrize("at", [2, 70])
@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("form", [list, dict])
def test_labels_outside_the_classes_are_named(at: int, label: int, form: Any) -> None:
    y = torch.arange(80) % 3
    y[at] = label
    source: Any = items(y)
    if form is dict:
        source = [{"input": x, "label": int(t)} for x, t in source]
    with pytest.raises(DataError) as error:
        resolved(nn.Linear(3, 3), source)
    assert "\n" not in str(error.value)
    assert str(label) in str(error.value)
    assert f"item {at} of the train split" in str(error.value) or at == 2


def test_items_of_unequal_length_are_named_in_the_order_of_the_data() -> None:
    source = [(torch.rand(3 + i % 2), torch.rand(3 + i % 2)) for i in range(9)]
    source[5][1][0] = math.nan

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(DataError, match="item 5 of the train split has the target nan"):
        resolved(Same(), source, "regression")


def test_pixels_outside_the_classes_are_named() -> None:
    y = torch.zeros(8, 4, 4).long()
    y[6, 1, 1] = 255
    source = list(zip(torch.rand(8, 3, 4, 4), y, strict=True))
    model = nn.Conv2d(3, 2, 1)
    with pytest.raises(DataError, match="255"):
        resolved(model, source)
    assert resolved(model, source, Segmentation(ignored=255)).name == "segmentation"


class Vast(nn.Module):
    """A model whose outputs are large."""

    most = 0

    def forward(self, x: Tensor) -> Tensor:
        Vast.most = max(Vast.most, len(x))
        return torch.zeros(1, 1, 1).expand(len(x), 3, 1 << 22)


def test_few_samples_are_run_where_outputs_are_large() -> None:
    source = [(torch.rand(3), torch.zeros(3).long()) for _ in range(80)]
    assert resolved(Vast(), source, "matching").name == "matching"
    assert Vast.most == 2


def scalar(output: Tensor, batch: Any) -> Tensor:
    return output.mean()


def raises(output: Tensor, batch: Any) -> Tensor:
    raise KeyError("boxes")


FUNCTIONS: list[tuple[Callable[..., Any], str]] = [
    (lambda o, b: torch.zeros(3), "a tensor of shape (3,)"),
    (lambda o, b: None, "None"),
    (lambda o, b: "0.5", "a str"),
    (lambda o, b: [1.0], "a list"),
    (lambda o, b: math.nan, "nan"),
    (lambda o, b: torch.tensor(math.inf), "inf"),
    (raises, "raised KeyError: 'boxes'"),
]


@pytest.mark.parametrize(("function", "said"), FUNCTIONS)
@pytest.mark.parametrize("where", ["loss", "score", "divergence"])
def test_functions_of_no_use_are_named(
    function: Callable[..., Any], said: str, where: str
) -> None:
    parts: dict[str, Any] = {"loss": scalar, "metrics": {"score": (scalar, "maximise")}}
    if where == "score":
        parts["metrics"] = {"score": (function, "maximise")}
    else:
        parts[where] = function
    task = Custom(**parts)
    with pytest.raises(DataError) as error:
        if where == "divergence":
            batch = (X, BITS)
            prediction = task.bound(batch, nn.Linear(3, 2)).predict(X, batch)
            prediction.sums(prediction)
        else:
            resolved(nn.Linear(3, 2), items(BITS), task)
    assert f"{where!r}" in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_custom_metrics_are_weighted_by_samples() -> None:
    def error(output: Tensor, batch: Any) -> Any:
        return (output[:, 0] - batch[1]).abs().mean().item()

    task = Custom(loss=scalar, metrics={"error": (error, "minimise")}).bound((X, BITS), Returns())
    output = torch.rand(8, 1)
    parts = [slice(0, 3), slice(3, 8)]
    sums: dict[str, Tensor] = {}
    for rows in parts:
        for name, value in task.predict(output[rows], (X[rows], BITS[rows])).sums(None).items():
            sums[name] = sums.get(name, torch.zeros(())) + value
    expected = (output[:, 0] - BITS).abs().mean()
    assert task.finish(sums)["error"] == pytest.approx(float(expected))


@pytest.mark.parametrize(
    "metrics",
    [
        {"a": scalar},
        {"a": (scalar, "up")},
        {"loss": (scalar, "minimise")},
        {"a": ("a", "minimise")},
    ],
)
def test_metrics_of_no_use(metrics: Any) -> None:
    with pytest.raises(UsageError):
        Custom(loss=scalar, metrics=metrics)


@pytest.mark.parametrize("task", ["classification", "segmentation", "masked_lm", "causal_lm"])
def test_all_targets_ignored_is_an_error(task: str) -> None:
    shape = {"classification": (8, 3)}.get(task, (8, 3, 3))
    y = torch.full((8,) if task == "classification" else (8, 3), -100)
    made = make_task(task).bound((X, y), Returns())
    prediction = made.predict(torch.zeros(shape), (X, y))
    assert float(prediction.loss()) == 0
    with pytest.raises(DataError, match=f"no target counts for the task {task!r}"):
        made.finish(prediction.sums(None))


def test_all_labels_ignored_is_an_error() -> None:
    for task, output, y in (
        ("multilabel", torch.zeros(8, 2), torch.full((8, 2), -100)),
        ("classification", torch.zeros(8, 1), torch.full((8,), -100)),
    ):
        made = make_task(task).bound((X, y), Returns())
        with pytest.raises(DataError, match="no target counts"):
            made.finish(made.predict(output, (X, y)).sums(None))


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "segmentation"])
def test_predictions_of_another_length(task: str) -> None:
    class Fewer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x) - 1, 2)

    with pytest.raises(DataError, match=r"the model returns \(7, 2\) for targets"):
        resolved(Fewer(), items(BITS), task)


@pytest.mark.parametrize(
    ("task", "y"),
    [
        ("segmentation", BITS),
        ("causal_lm", BITS),
        ("multilabel", BITS),
        ("multilabel", MANY * 3),
        ("regression", torch.rand(8, 3)),
        ("classification", torch.rand(8)),
        ("classification", MANY),
    ],
)
def test_a_task_that_does_not_fit_the_data(task: str, y: Tensor) -> None:
    with pytest.raises(RankNASError) as error:
        resolved(nn.Linear(3, 2), items(y), task)
    assert "\n" not in str(error.value)


def test_class_weights_of_another_number() -> None:
    from rankNAS.tasks import Classification

    with pytest.raises(UsageError, match="3 weights, but the model has 2 classes"):
        resolved(nn.Linear(3, 2), items(BITS), Classification(weights=(1, 2, 3)))


def test_tasks_by_name_and_from_files(tmp_path: Any) -> None:
    assert make_task("matching:kl").directions == {
        "kl_divergence": "minimize",
        "reverse_kl": "minimize",
    }
    assert make_task(task := Regression()) is task
    (tmp_path / "mine.py").write_text(
        "import rankNAS.tasks as t\ndef good(): return t.Regression()\ndef bad(): return 3\n"
    )
    assert make_task(f"{tmp_path}/mine.py:good").name == "regression"
    with pytest.raises(UsageError, match="returned a int instead of a Task"):
        make_task(f"{tmp_path}/mine.py:bad")
    with pytest.raises(UnknownNameError):
        make_task("regresion")
    with pytest.raises(UsageError):
        make_task(3)  # type: ignore[arg-type]


def test_a_model_that_fails_is_one_error() -> None:
    with pytest.raises(DataError, match="Linear fails on the first batch of the data"):
        infer_task(nn.Linear(5, 2), (X, BITS))


def test_an_iterable_without_length_works() -> None:
    def batches() -> Iterator[Any]:
        for start in (0, 3, 6):
            yield X[start : start + 3], BITS[start : start + 3]

    assert resolved(nn.Linear(3, 2), batches()).name == "classification"


def test_leaves_that_differ_in_length_are_named() -> None:
    with pytest.raises(DataError, match=r"\[0\] has 8, \[1\] has 7"):
        load_data(([(X, BITS[:7])].__iter__(), None))


# --------------------------------------------------------------------------- sizes of samples


def images(*sides: int) -> list[Any]:
    return [(torch.zeros(3, side, side), i % 2) for i, side in enumerate(sides)]


def test_a_model_of_one_size_refuses_images_of_others_by_name() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    with pytest.raises(
        DataError,
        match=r"Sequential fails on item 3 of the train split, which has the shape \(3, 6, 6\), "
        r"but runs on item 0 with \(3, 8, 8\) \(mat1 .*\); make all items equal in size: resize",
    ):
        resolve_task(None, flat, load_data(images(8, 8, 8, 6, 8)))
    resolve_task(None, flat, load_data(images(8, 8, 8)))
    pooled = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    resolve_task(None, pooled, load_data(images(8, 8, 8, 6, 9)))
