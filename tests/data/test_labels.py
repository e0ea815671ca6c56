from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import Labelled, pixels, tensors, write_parquet
from torch import nn
from torch.utils.data import Subset

from rankNAS.data.base import Data
from rankNAS.data.images.dataset import Images
from rankNAS.data.images.normalise import parse_normalization
from rankNAS.data.labels import check_labels, count_classes
from rankNAS.data.loading import load_data
from rankNAS.data.samples import Samples
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.exceptions import DataError
from rankNAS.tasks.infer import infer_task, resolve_task


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train.parquet", pixels(20), [i % 4 for i in range(20)])
    write_parquet(tmp_path / "test.parquet", pixels(6, seed=1), [i % 3 for i in range(6)])
    return tmp_path


@pytest.mark.parametrize(
    "targets", [torch.rand(10), torch.zeros(10, 2, dtype=torch.int64), torch.ones(10).bool()]
)
def test_no_classes_without_integer_labels(targets: torch.Tensor) -> None:
    data = load_data((tensors(targets=targets), tensors(targets=targets)))
    assert data.num_classes is None
    assert count_classes(data.train) is None
    check_labels(data.train, "train", 1)  # nothing to check


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_labels_of_any_integer_kind(kind: Callable[[int], Any]) -> None:
    dataset = Labelled([kind(i) for i in (0, 3, 1)])
    assert load_data((dataset, dataset)).num_classes is None  # not without reading all items
    assert count_classes(Samples.of(dataset)) == 4


def test_stored_labels_save_reading_the_items() -> None:
    targets = [0, 1, 2, 3] * 100
    dataset = Labelled(targets, targets)
    data = load_data((dataset, Subset(dataset, [1, 2, 5])))
    assert data.num_classes == count_classes(data.train) == 4 and dataset.reads < 100
    unlabelled = Labelled(targets)
    data = load_data((unlabelled, dataset))
    assert data.num_classes is None and unlabelled.reads < 100
    assert count_classes(data.train) == 4 and unlabelled.reads > 400


def test_stored_labels_that_items_do_not_have_are_not_believed() -> None:
    renumbered = Labelled([2, 1, 0], attribute=[7, 8, 9])
    data = load_data((renumbered, renumbered))
    assert data.num_classes is None and count_classes(data.train) == 3


def test_pair_with_negative_label() -> None:
    bad = tensors(4, targets=torch.tensor([0, 1, -2, 3]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    with pytest.raises(DataError, match="item 2 of the test split has the label -2, but labels"):
        resolve_task(None, model, load_data((tensors(), bad)))
    items = [(torch.zeros(2, 3), 0), (torch.ones(2, 3), -1)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5))
    with pytest.raises(DataError, match="item 1 of the train split has the label -1"):
        resolve_task(None, model, load_data((items, items[:1])))
    unread = Samples.of(Labelled([0, -1]))
    task = infer_task(model, unread.example(2))
    with pytest.raises(DataError, match="a target is the class -1, but the model has 5 classes"):
        network_metrics(model, unread, task)


def test_pair_with_mixed_labels() -> None:
    mixed = Samples.of(Labelled([0, 1, 0.5]))
    assert count_classes(mixed) is None
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5))
    task = infer_task(model, mixed.example(2))
    with pytest.raises(DataError, match=r"a target is 0\.5, but the task 'classification' takes"):
        network_metrics(model, mixed, task)


def test_check_labels(parquet: Path) -> None:
    data = load_data(f"parquet:{parquet}")
    assert data.test is not None
    check_labels(data.train, "train", 4)
    check_labels(data.test, "test", 4)
    with pytest.raises(
        DataError, match="item 3 of the train split has the label 3, but the network has 3 outputs"
    ):
        check_labels(data.train, "train", 3)
    with pytest.raises(DataError, match="item 2 of the test split has the label 2, .* 2 outputs"):
        check_labels(data.test, "test", 2)
    check_labels(data.train.take(torch.tensor([0, 1])), "train", 2)


def test_check_labels_of_images_reads_no_image() -> None:
    def fetch(rows: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an image was read")

    images = Images(fetch, torch.tensor([0, 1, 2]), parse_normalization(None))
    test = Samples.of(images.subset(torch.tensor([2, 1])))
    data = Data("mine", Samples.of(images), test, (3, 1, 1), 3, "0")
    check_labels(data.train, "train", 3)
    check_labels(test, "test", 3)
    with pytest.raises(DataError, match="item 2 of the train split has the label 2"):
        check_labels(data.train, "train", 2)
    with pytest.raises(DataError, match="item 0 of the test split has the label 2"):
        check_labels(test, "test", 2)
