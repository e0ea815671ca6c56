"""Sources of data, splits, batches, labels and augmentation; on generated data only."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from rankNAS.data import sources as data_sources
from rankNAS.data.loading import (
    Data,
    augment,
    batches,
    check_labels,
    len_of,
    load_data,
    normalization_from_metadata,
    split,
    subset,
)
from rankNAS.data.sources import Images, parse_normalization
from rankNAS.exceptions import DataError, UnknownNameError, UsageError

# ---------------------------------------------------------------------------- generated data


def pixels(count: int, seed: int = 0, height: int = 8, width: int = 8) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3))
    return values.astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path, images: Any, labels: list[Any], *, image: str = "image", label: str = "label"
) -> None:
    encoded = [{"bytes": png(one), "path": None} for one in images]
    pd.DataFrame({image: encoded, label: labels}).to_parquet(path)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train.parquet", pixels(20), [i % 4 for i in range(20)])
    write_parquet(tmp_path / "test.parquet", pixels(6, seed=1), [i % 3 for i in range(6)])
    return tmp_path


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def fill_folder(
    folder: Path, classes: str, count: int = 2, size: tuple[int, int] = (40, 30)
) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = np.full((size[1], size[0], 3), 50 * number + index, dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{index}.png")


class Labelled(Dataset[tuple[torch.Tensor, Any]]):
    """Items with the given targets; counts how often inputs are read."""

    def __init__(self, targets: list[Any], attribute: list[Any] | None = None) -> None:
        self.values = targets
        self.reads = 0
        if attribute is not None:
            self.targets = attribute

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        self.reads += 1
        return torch.full((2, 3), float(index)), self.values[index]


def tensors(count: int = 10, seed: int = 0, targets: torch.Tensor | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 4, 4, generator=generator)
    return TensorDataset(x, torch.arange(count) % 5 if targets is None else targets)


# ---------------------------------------------------------------------------- digits


def test_digits(digits: Data) -> None:
    assert (len_of(digits.train), len_of(digits.test)) == (1438, 359)
    assert digits.input_shape == (3, 32, 32)
    assert (digits.name, digits.num_classes, digits.flip) == ("digits", 10, False)
    x, y = digits.train[0]
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32
    assert y.dtype == torch.int64 and y.shape == ()


def test_digits_are_stratified_and_contain_every_image_once(digits: Data) -> None:
    from sklearn.datasets import load_digits

    train = torch.bincount(digits.train.targets)
    test = torch.bincount(digits.test.targets)
    assert (train + test).tolist() == np.bincount(load_digits().target).tolist()
    assert ((test / (train + test) - 0.2).abs() < 0.005).all()
    rows = torch.cat([digits.train._rows, digits.test._rows])
    assert rows.sort().values.tolist() == list(range(1797))


def test_digits_are_scaled_grey_and_upsampled() -> None:
    from sklearn.datasets import load_digits

    plain = load_data("digits", normalize="0,1", image_size=8)
    x, y = plain.train[3]
    row = int(plain.train._rows[3])
    grey = torch.from_numpy(load_digits().images[row]).float() / 16
    assert torch.equal(x, grey.expand(3, 8, 8)) and y == load_digits().target[row]
    larger = load_data("digits", normalize="0,1").train[3][0]
    wanted = torch.nn.functional.interpolate(grey[None, None], (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(larger, wanted.expand(3, 32, 32), atol=1e-5, rtol=0)


def test_digits_image_size() -> None:
    assert load_data("digits", image_size=12).input_shape == (3, 12, 12)


# ---------------------------------------------------------------------------- parquet


def test_parquet(parquet: Path) -> None:
    data = load_data(f"parquet:{parquet}", normalize="0.5,0.25")
    assert (len_of(data.train), len_of(data.test)) == (20, 6)
    assert (data.input_shape, data.num_classes, data.flip) == ((3, 8, 8), 4, True)
    assert data.normalize == "0.5/0.5/0.5,0.25/0.25/0.25"
    x, y = data.train[7]
    wanted = torch.from_numpy(pixels(20)[7]).permute(2, 0, 1) / 255
    torch.testing.assert_close(x, (wanted - 0.5) / 0.25)
    assert y.item() == 7 % 4 and y.dtype == torch.int64


def test_parquet_uses_imagenet_statistics_by_default(parquet: Path) -> None:
    x = load_data(f"parquet:{parquet}").train[0][0]
    unit = torch.from_numpy(pixels(20)[0]).permute(2, 0, 1) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    torch.testing.assert_close(x, (unit - mean) / std)


def test_parquet_accepts_img_and_plain_bytes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", pixels(5), [0] * 5, image="img")
    frame = pd.DataFrame({"image": [png(one) for one in pixels(5)], "label": [1] * 5})
    frame.to_parquet(tmp_path / "test.parquet")
    data = load_data(f"parquet:{tmp_path}")
    assert torch.equal(data.train[2][0], data.test[2][0])


def test_parquet_converts_grey_to_rgb(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", pixels(3)[..., 0], [0, 1, 2])
    x = load_data(f"parquet:{tmp_path}", normalize="0,1").train[0][0]
    assert x.shape == (3, 8, 8) and torch.equal(x[0], x[2])


def test_parquet_shards_are_the_same_as_one_file(parquet: Path, tmp_path: Path) -> None:
    whole = load_data(f"parquet:{parquet}")
    (parquet / "train.parquet").unlink()
    labels = [i % 4 for i in range(20)]
    write_parquet(parquet / "train-00000-of-00002.parquet", pixels(20)[:13], labels[:13])
    write_parquet(parquet / "train-00001-of-00002.parquet", pixels(20)[13:], labels[13:])
    shards = load_data(f"parquet:{parquet}")
    assert torch.equal(shards.train.targets, whole.train.targets)
    assert torch.equal(shards.train[15][0], whole.train[15][0])
    assert shards.fingerprint == whole.fingerprint


def test_parquet_missing_shard(parquet: Path) -> None:
    (parquet / "train.parquet").rename(parquet / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"1 shards of train, but .*-of-00002.* there are 00002"):
        load_data(f"parquet:{parquet}")


def test_parquet_decodes_on_demand_what_is_too_large(
    parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = load_data(f"parquet:{parquet}")
    monkeypatch.setattr(data_sources, "EAGER_BYTES", 20 * 3 * 8 * 8 - 1)
    lazy = load_data(f"parquet:{parquet}")
    assert isinstance(eager.train._fetch, data_sources._Memory)
    assert isinstance(lazy.train._fetch, data_sources._Decoder)
    assert isinstance(lazy.test._fetch, data_sources._Memory)
    assert all(torch.equal(lazy.train[i][0], eager.train[i][0]) for i in range(20))
    assert lazy.fingerprint == eager.fingerprint


def mix_sizes(folder: Path, split_name: str) -> None:
    images = [*pixels(5), *pixels(1, height=10, width=12)]
    write_parquet(folder / f"{split_name}.parquet", images, [0] * 6)


@pytest.mark.parametrize("split_name", ["train", "test"])
def test_parquet_of_different_sizes_needs_an_image_size(parquet: Path, split_name: str) -> None:
    mix_sizes(parquet, split_name)
    with pytest.raises(
        DataError,
        match=rf"row 5 of .*{split_name}\.parquet is 12x10, .* is 8x8; pass --image-size",
    ):
        load_data(f"parquet:{parquet}")
    data = load_data(f"parquet:{parquet}", image_size=6)
    assert data.input_shape == (3, 6, 6) == tuple(getattr(data, split_name)[5][0].shape)


def test_parquet_resizes_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    image = np.zeros((8, 16, 3), dtype=np.uint8)
    image[:, 4:12] = 255  # exactly the centre square
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", [image], [0])
    x = load_data(f"parquet:{tmp_path}", normalize="0,1", image_size=8).train[0][0]
    assert torch.equal(x, torch.ones(3, 8, 8))


@pytest.mark.parametrize("missing", ["train", "test"])
def test_parquet_missing_file(parquet: Path, missing: str) -> None:
    (parquet / f"{missing}.parquet").unlink()
    with pytest.raises(DataError, match=rf"has neither {missing}\.parquet nor shards"):
        load_data(f"parquet:{parquet}")


def test_parquet_unreadable(parquet: Path) -> None:
    (parquet / "test.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"cannot read .*test\.parquet as parquet"):
        load_data(f"parquet:{parquet}")


@pytest.mark.parametrize("names", [{"image": "picture"}, {"label": "fine_label"}])
def test_parquet_missing_column(parquet: Path, names: dict[str, str]) -> None:
    write_parquet(parquet / "train.parquet", pixels(3), [0, 1, 2], **names)
    name = next(iter(names.values()))
    with pytest.raises(
        DataError, match=rf"train\.parquet has the columns .*{name}.* needs 'image'"
    ):
        load_data(f"parquet:{parquet}")


def test_parquet_column_of_another_type(parquet: Path) -> None:
    pd.DataFrame({"image": [1, 2], "label": [0, 1]}).to_parquet(parquet / "train.parquet")
    with pytest.raises(DataError, match=r"image column of .*train\.parquet has the type int64"):
        load_data(f"parquet:{parquet}")


def test_parquet_undecodable_image(parquet: Path) -> None:
    rows = [{"bytes": png(pixels(1)[0])}, {"bytes": b"no image"}]
    pd.DataFrame({"image": rows, "label": [0, 1]}).to_parquet(parquet / "test.parquet")
    with pytest.raises(DataError, match=r"cannot decode row 1 of .*test\.parquet \(Unidentified"):
        load_data(f"parquet:{parquet}")


def test_parquet_without_bytes(parquet: Path) -> None:
    rows = [{"bytes": png(pixels(1)[0])}, {"bytes": None}]
    pd.DataFrame({"image": rows, "label": [0, 1]}).to_parquet(parquet / "test.parquet")
    with pytest.raises(DataError, match=r"row 1 of .*test\.parquet has no image bytes"):
        load_data(f"parquet:{parquet}")


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([0, -1, 2], "-1"),
        ([0.0, 1.5, 2.0], r"0\.0"),
        (["a", "b", "c"], "'a'"),
        (pd.array([0, 1, None], dtype="Int64"), "None"),
    ],
)
def test_parquet_bad_labels(parquet: Path, labels: list[Any], shown: str) -> None:
    write_parquet(parquet / "test.parquet", pixels(3), labels)
    with pytest.raises(
        DataError, match=rf"label of row \d of .*test\.parquet \(test split\) is ({shown}); labels"
    ):
        load_data(f"parquet:{parquet}")


def test_parquet_negative_label_names_its_row(parquet: Path) -> None:
    write_parquet(parquet / "train.parquet", pixels(3), [0, 1, -7])
    with pytest.raises(DataError, match=r"row 2 of .*train\.parquet \(train split\) is -7"):
        load_data(f"parquet:{parquet}")


def test_parquet_empty(parquet: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(parquet / "test.parquet")[:0], parquet / "test.parquet")
    with pytest.raises(DataError, match="the test split has no images"):
        load_data(f"parquet:{parquet}")


# ---------------------------------------------------------------------------- image folders


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_imagefolder(tmp_path: Path, test_name: str) -> None:
    fill_folder(tmp_path / "train", "abc")
    fill_folder(tmp_path / test_name, "abc", count=1)
    data = load_data(f"imagefolder:{tmp_path}", normalize="0,1")
    assert (data.input_shape, data.num_classes, data.flip) == ((3, 224, 224), 3, True)
    assert (len_of(data.train), len_of(data.test)) == (6, 3)
    x, y = data.train[3]
    assert y == 1 and torch.allclose(x, torch.tensor(51 / 255))
    assert load_data(f"imagefolder:{tmp_path}", image_size=16).input_shape == (3, 16, 16)


def test_imagefolder_crops_with_a_margin(tmp_path: Path) -> None:
    image = np.zeros((256, 300, 3), dtype=np.uint8)
    image[16:240, 38:262] = 255
    for name in ("train/a", "test/a"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / name / "0.png")
    x = load_data(f"imagefolder:{tmp_path}", normalize="0,1").train[0][0]
    assert torch.equal(x, torch.ones(3, 224, 224))


def test_imagefolder_keeps_labels_when_the_test_set_lacks_a_class(tmp_path: Path) -> None:
    fill_folder(tmp_path / "train", "abc")
    fill_folder(tmp_path / "test", "c")
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert data.test.targets.tolist() == [2, 2]


def test_imagefolder_unknown_class(tmp_path: Path) -> None:
    fill_folder(tmp_path / "train", "ab")
    fill_folder(tmp_path / "test", "bz")
    with pytest.raises(DataError, match=r"test has the class 'z', which the training images lack"):
        load_data(f"imagefolder:{tmp_path}")


def test_imagefolder_missing_parts(tmp_path: Path) -> None:
    fill_folder(tmp_path / "train", "a")
    with pytest.raises(DataError, match="lacks a folder train, or one called test or val"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"test is not one folder of images per class"):
        load_data(f"imagefolder:{tmp_path}")


def test_imagefolder_undecodable_image_is_named_when_read(tmp_path: Path) -> None:
    for name in ("train", "test"):
        fill_folder(tmp_path / name, "a", count=7)
    (tmp_path / "train" / "a" / "4.png").write_bytes(b"broken")
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    with pytest.raises(DataError, match=r"cannot decode .*train.a.4\.png"):
        split(data)


# ---------------------------------------------------------------------------- CIFAR-10


def write_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A folder as torchvision reads it, with its checksums turned off."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    base = folder / "cifar-10-batches-py"
    base.mkdir()
    images = pixels(12, height=32, width=32)
    flat = images.transpose(0, 3, 1, 2).reshape(12, -1)
    for name, part in (("data_batch_1", slice(0, 8)), ("test_batch", slice(8, 12))):
        labels = [i % 5 for i in range(12)][part]
        content = {"data": flat[part], "labels": labels}
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return images


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_cifar10(tmp_path, monkeypatch)
    data = load_data(f"cifar10:{tmp_path}", normalize="cifar10")
    assert (data.input_shape, data.num_classes, len_of(data.test)) == ((3, 32, 32), 5, 4)
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    std = torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None]
    wanted = (torch.from_numpy(images[9]).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(data.test[1][0].float(), wanted.float())
    resized = load_data(f"cifar10:{tmp_path}", image_size=16, normalize="0,1").test[1][0]
    assert resized.shape == (3, 16, 16) and 0 <= resized.min() and resized.max() <= 1


def test_cifar10_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no intact cifar-10-batches-py"):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("kind", ["parquet", "imagefolder", "cifar10"])
def test_missing_folder(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder '.*/nowhere'; give the folder that"):
        load_data(f"{kind}:{tmp_path}/nowhere")
    with pytest.raises(DataError, match="there is no folder ''"):
        load_data(f"{kind}:")


@pytest.mark.parametrize("source", ["digit", "digits:", "parquet", "csv:/tmp", "", "a.py"])
def test_unknown_source(source: str) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown data source .* Known: cifar10:DIR, digits"
    ):
        load_data(source)


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_bad_image_size(size: Any) -> None:
    with pytest.raises(DataError, match=f"the image size is {size}; give a positive integer"):
        load_data("digits", image_size=size)


# ---------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        (None, "0.485/0.456/0.406,0.229/0.224/0.225"),
        ("ImageNet", "0.485/0.456/0.406,0.229/0.224/0.225"),
        ("cifar10", "0.4914/0.4822/0.4465,0.247/0.2435/0.2616"),
        ("0.5,0.25", "0.5/0.5/0.5,0.25/0.25/0.25"),
        ("0.1/0.2/0.3,0.4", "0.1/0.2/0.3,0.4/0.4/0.4"),
        ("0.1/0.2/0.3, 0.4/0.5/0.6", "0.1/0.2/0.3,0.4/0.5/0.6"),
        ("0.1,0.2,0.3,0.4,0.5,0.6", "0.1/0.2/0.3,0.4/0.5/0.6"),
    ],
)
def test_normalisations(spec: str | None, canonical: str) -> None:
    assert parse_normalization(spec).spec == canonical
    assert parse_normalization(canonical).spec == canonical


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "imagnet",
        "0.5",
        "0.5,0",
        "0.5,-1",
        "nan,1",
        "0.5,inf",
        "0.1/0.2,0.5",
        "1,2,3",
        "a,b",
        "120,60",
    ],
)
def test_bad_normalisations(spec: str) -> None:
    with pytest.raises(
        DataError, match=rf"the normalisation '{spec}' is none of imagenet, cifar10"
    ):
        load_data("digits", normalize=spec)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        (
            "RGB/255 normalised by mean (0.485,0.456,0.406), std (0.229,0.224,0.225)",
            "0.485/0.456/0.406,0.229/0.224/0.225",
        ),
        ('{"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}', "0.5/0.4/0.3,0.2/0.2/0.1"),
        ("mean=0.5 std=2.5e-1", "0.5/0.5/0.5,0.25/0.25/0.25"),
        ("means .5/.4/.3, standard deviation .2", "0.5/0.4/0.3,0.2/0.2/0.2"),
        ("RGB/255", None),
        ("mean (0.5,0.5,0.5)", None),
        ("the meaning of std is unknown", None),
        ("", None),
    ],
)
def test_normalisation_from_metadata(text: str, spec: str | None) -> None:
    assert normalization_from_metadata(text) == spec
    assert spec is None or parse_normalization(spec).spec == spec


def test_normalisation_from_metadata_for_other_pixels_is_refused() -> None:
    with pytest.raises(DataError, match="give means in"):
        normalization_from_metadata("mean (123.7,116.3,103.5), std (58.4,57.1,57.4)")


# ---------------------------------------------------------------------------- the user's datasets


def test_a_pair_of_datasets() -> None:
    data = load_data((tensors(10), tensors(4, seed=1, targets=torch.tensor([1, 0, 6, 2]))))
    assert (data.input_shape, data.num_classes) == ((3, 4, 4), 7)
    assert (data.normalize, data.flip) == (None, False)


def test_data_passes_through(digits: Data) -> None:
    assert load_data(digits) is digits


@pytest.mark.parametrize(
    "targets", [torch.rand(10), torch.zeros(10, 2, dtype=torch.int64), torch.ones(10).bool()]
)
def test_no_classes_without_integer_labels(targets: torch.Tensor) -> None:
    data = load_data((tensors(targets=targets), tensors(targets=targets)))
    assert data.num_classes is None
    check_labels(data, 1)  # nothing to check


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_labels_of_any_integer_kind(kind: Callable[[int], Any]) -> None:
    dataset = Labelled([kind(i) for i in (0, 3, 1)])
    assert load_data((dataset, dataset)).num_classes == 4


def test_stored_labels_save_reading_the_items() -> None:
    targets = [0, 1, 2, 3] * 100
    dataset = Labelled(targets, targets)
    data = load_data((dataset, Subset(dataset, [1, 2, 5])))
    assert data.num_classes == 4 and dataset.reads < 100
    unlabelled = Labelled(targets)
    assert load_data((unlabelled, dataset)).num_classes == 4 and unlabelled.reads > 400


def test_stored_labels_that_items_do_not_have_are_not_believed() -> None:
    renumbered = Labelled([2, 1, 0], attribute=[7, 8, 9])
    assert load_data((renumbered, renumbered)).num_classes == 3


def test_pair_with_negative_label() -> None:
    bad = tensors(4, targets=torch.tensor([0, 1, -2, 3]))
    with pytest.raises(DataError, match="item 2 of the test split has the label -2, but labels"):
        load_data((tensors(), bad))
    with pytest.raises(DataError, match="item 1 of the train split has the label -1"):
        load_data((Labelled([0, -1]), Labelled([0])))


def test_pair_with_mixed_labels() -> None:
    with pytest.raises(DataError, match=r"item 2 of the train split has the label 0\.5, unlike"):
        load_data((Labelled([0, 1, 0.5]), Labelled([0])))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        yield 1


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ([tensors(), tensors()], "datasets: got list; give a Data or a tuple"),
        ((tensors(),), "datasets: got tuple; give a Data or a tuple"),
        (3, "datasets: got int"),
        ((tensors(), Stream()), "the test dataset is a Stream without len"),
        ((tensors(0), tensors()), "the train split has no items"),
        ((tensors(), Labelled([0])), r"shape \(3, 4, 4\) in the train .* \(2, 3\) in the test"),
        ((TensorDataset(torch.ones(2)), tensors()), r"item 0 of the train .* tuple of \(Tensor\)"),
        (([(1, 2)], tensors()), r"item 0 of the train split is a tuple of \(int, int\), not"),
        ((tensors(), [5]), r"item 0 of the test split is a int of \(\), not"),
        ((Labelled(["cat"]), Labelled([0])), "item 0 of the train split has the target 'cat'"),
    ],
)
def test_unusable_pairs(pair: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(pair)


@pytest.mark.parametrize("options", [{"normalize": "0.5,0.5"}, {"image_size": 8}])
def test_options_that_have_no_effect_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="a given dataset prepares its inputs itself"):
        load_data((tensors(), tensors()), **options)
    with pytest.raises(DataError, match="x.py:make prepares its inputs itself"):
        load_data("x.py:make", **options)


FACTORY = """
import torch
from torch.utils.data import TensorDataset
from rankNAS.data import load_data

def pair():
    return tuple(TensorDataset(torch.ones(n, 2), torch.arange(n)) for n in (6, 3))
def data():
    return load_data(pair())
def nothing():
    return None
def failing():
    raise RuntimeError("no network")
def wrong():
    return load_data("parquet:/not/there")
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FACTORY)
    return path


@pytest.mark.parametrize("name", ["pair", "data"])
def test_factory(factory: Path, name: str) -> None:
    data = load_data(f"{factory}:{name}")
    assert data.name == f"{factory}:{name}"
    assert (data.input_shape, data.num_classes, len_of(data.train)) == ((2,), 6, 6)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", DataError, r"mine\.py:nothing: got NoneType; give a Data"),
        ("failing", DataError, r"mine\.py:failing raised RuntimeError: no network"),
        ("wrong", DataError, "there is no folder '/not/there'"),
        ("pare", UnknownNameError, "unknown data factory 'pare'. Did you mean 'pair'"),
    ],
)
def test_factory_errors(factory: Path, name: str, error: type[UsageError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_data(f"{factory}:{name}")


# ---------------------------------------------------------------------------- fingerprints


def test_fingerprint_does_not_depend_on_the_folder(parquet: Path) -> None:
    here = load_data(f"parquet:{parquet}").fingerprint
    moved = parquet.rename(parquet.parent / f"{parquet.name}-moved")
    assert load_data(f"parquet:{moved}").fingerprint == here
    assert len(here) == 16 and int(here, 16) >= 0


def test_fingerprint_of_digits_is_fixed(digits: Data) -> None:
    # Caches and studies are keyed by it, on any machine: it may only change with the data.
    assert digits.fingerprint == "2143a9aab137d43b"


def test_fingerprint_tells_preprocessing_and_content_apart(parquet: Path) -> None:
    source = f"parquet:{parquet}"
    keys = [
        load_data(source).fingerprint,
        load_data(source, normalize="cifar10").fingerprint,
        load_data(source, image_size=6).fingerprint,
    ]
    write_parquet(parquet / "test.parquet", pixels(6, seed=1), [i % 2 for i in range(6)])
    keys.append(load_data(source).fingerprint)
    write_parquet(parquet / "test.parquet", pixels(6, seed=2), [i % 2 for i in range(6)])
    keys.append(load_data(source).fingerprint)
    assert len(set(keys)) == 5
    assert load_data(source, normalize="imagenet", image_size=8).fingerprint == keys[-1]


def test_fingerprint_of_image_folders(tmp_path: Path) -> None:
    for name in ("train", "test"):
        fill_folder(tmp_path / name, "ab")
    source = f"imagefolder:{tmp_path}"
    keys = [load_data(source).fingerprint, load_data(source).fingerprint]
    (tmp_path / "test" / "b" / "1.png").rename(tmp_path / "test" / "a" / "7.png")
    keys.append(load_data(source).fingerprint)
    fresh = np.zeros((30, 40, 3), dtype=np.uint8)
    Image.fromarray(fresh).save(tmp_path / "train" / "b" / "1.png")
    keys.append(load_data(source).fingerprint)
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_fingerprint_of_pairs() -> None:
    def key(train: Any, test: Any) -> str:
        return load_data((train, test)).fingerprint

    base = key(tensors(200), tensors(5))
    assert base == key(tensors(200), tensors(5))
    changed = tensors(200)
    changed.tensors[0][199, 0, 0, 0] += 1  # the last item is always looked at
    others = [
        key(changed, tensors(5)),
        key(tensors(199), tensors(5)),
        key(tensors(200), tensors(5, seed=1)),
        key(tensors(200), tensors(5, targets=torch.zeros(5, dtype=torch.int64))),
        key(tensors(5), tensors(200)),
    ]
    assert len({base, *others}) == 6


def test_fingerprint_does_not_depend_on_random_transforms() -> None:
    class Noisy(Labelled):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
            return torch.rand(2, 3), self.values[index]

    made = [load_data((Noisy([0, 1], [0, 1]), Labelled([0]))).fingerprint for _ in range(2)]
    assert made[0] == made[1]


def test_fingerprint_of_bfloat16_inputs() -> None:
    pair = [TensorDataset(torch.ones(3, 2, dtype=torch.bfloat16), torch.arange(3))] * 2
    assert load_data((pair[0], pair[1])).fingerprint


# ---------------------------------------------------------------------------- labels


def test_check_labels(parquet: Path) -> None:
    data = load_data(f"parquet:{parquet}")
    check_labels(data, 4)
    with pytest.raises(
        DataError, match="item 3 of the train split has the label 3, but the network has 3 outputs"
    ):
        check_labels(data, 3)
    with pytest.raises(DataError, match="item 2 of the test split has the label 2, .* 2 outputs"):
        check_labels(replace(data, train=subset(data.train, torch.tensor([0, 1]))), 2)


def test_check_labels_of_images_reads_no_image() -> None:
    def fetch(rows: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an image was read")

    images = Images(fetch, torch.tensor([0, 1, 2]), parse_normalization(None))
    data = Data("mine", images, images.subset(torch.tensor([2, 1])), (3, 1, 1), 3, "0")
    check_labels(data, 3)
    with pytest.raises(DataError, match="item 2 of the train split has the label 2"):
        check_labels(data, 2)


# ---------------------------------------------------------------------------- splits


def numbered(count: int, test: int = 3) -> Data:
    """Inputs that tell which item they are; the test items are negative."""
    train = TensorDataset(torch.arange(count).float()[:, None], torch.arange(count))
    held = TensorDataset(-1 - torch.arange(test).float()[:, None], torch.arange(test))
    return Data("numbered", train, held, (1,), count, "0")


def ids(source: Any) -> set[int]:
    return {int(value) for x, _ in batches(source, 64) for value in x.flatten()}


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(5, 400),
    calibration=st.integers(1, 300),
    validation=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_splits_are_disjoint_and_bounded(
    count: int, calibration: int, validation: int, seed: int
) -> None:
    data = numbered(count)
    parts = split(data, calibration=calibration, validation=validation, seed=seed)
    assert len(parts.validation[0]) == min(validation, count // 5)
    assert len(parts.calibration[0]) == min(calibration, count * 2 // 5)
    held_out, calibrating, training = map(
        ids, (parts.validation, parts.calibration, parts.training)
    )
    assert len(held_out) == len(parts.validation[0]) > 0
    assert len(calibrating) == len(parts.calibration[0]) > 0
    assert not held_out & calibrating and not held_out & training
    assert calibrating <= training
    assert held_out | training == set(range(count))
    assert len_of(parts.training) == len(training)
    assert parts.test is data.test
    for inputs, targets in (parts.validation, parts.calibration):
        assert torch.equal(inputs[:, 0].long(), targets)


def test_split_depends_on_the_seed_only() -> None:
    parts = [split(numbered(100), calibration=10, validation=10, seed=s) for s in (0, 0, 1)]
    assert torch.equal(parts[0].calibration[0], parts[1].calibration[0])
    assert not torch.equal(parts[0].calibration[0], parts[2].calibration[0])
    # Results of studies depend on these items: the choice must not change between versions.
    assert parts[0].validation[1].tolist() == [44, 19, 93, 90, 71, 69, 37, 95, 53, 91]


def test_split_of_images(digits: Data) -> None:
    parts = split(digits, calibration=100, validation=50)
    assert parts.calibration[0].shape == (100, 3, 32, 32)
    assert parts.calibration[1].shape == (100,)
    assert isinstance(parts.training, Images) and len(parts.training) == 1388


def test_split_errors() -> None:
    with pytest.raises(DataError, match="numbered has 4 training items; at least 5"):
        split(numbered(4))
    with pytest.raises(DataError, match="0 calibration and 1024 validation items were asked for"):
        split(numbered(10), calibration=0)
    with pytest.raises(DataError, match="1024 calibration and -1 validation"):
        split(numbered(10), validation=-1)


# ---------------------------------------------------------------------------- batches


def test_batches_of_images_equal_item_by_item(parquet: Path) -> None:
    data = load_data(f"parquet:{parquet}")
    some = subset(data.train, torch.tensor([4, 2, 19]))
    nested = Subset(Subset(data.train, [5, 4, 2, 19]), [1, 2, 3])
    for dataset, size in ((data.train, 20), (some, 3), (nested, 3)):
        made = list(batches(dataset, 8))
        x, y = (torch.cat(part) for part in zip(*made, strict=True))
        assert torch.equal(x, torch.stack([dataset[i][0] for i in range(size)]))
        assert torch.equal(y, torch.stack([dataset[i][1] for i in range(size)]))
    assert torch.equal(next(batches(some, 3))[0], next(batches(nested, 3))[0])


def test_resized_batches_equal_item_by_item(digits: Data) -> None:
    x, y = next(batches(digits.train, 16))
    torch.testing.assert_close(x, torch.stack([digits.train[i][0] for i in range(16)]))
    assert y.tolist() == [int(digits.train[i][1]) for i in range(16)]


def test_batches_of_images_normalise_a_batch_at_once(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Images, "__getitem__", lambda *_: pytest.fail("read item by item"))
    for dataset in (digits.train, Subset(digits.train, range(100))):
        assert len(next(batches(dataset, 10))[0]) == 10


@pytest.mark.parametrize(
    "source",
    [
        tensors(7),
        tensors(7).tensors,
        Subset(tensors(9), list(range(7))),
        [tensors(7)[i] for i in range(7)],
    ],
)
def test_batches_of_any_form(source: Any) -> None:
    made = list(batches(source, 3))
    assert [len(x) for x, _ in made] == [3, 3, 1] == [len(y) for _, y in made]
    wanted = tensors(9)[:7] if isinstance(source, Subset) else tensors(7)[:]
    assert torch.equal(torch.cat([x for x, _ in made]), wanted[0])
    assert torch.equal(torch.cat([y for _, y in made]), wanted[1])


def test_batches_of_plain_numbers_have_tensor_targets() -> None:
    x, y = next(batches(Labelled([4, 5]), 2))
    assert x.shape == (2, 2, 3) and y.tolist() == [4, 5] and y.dtype == torch.int64


def test_shuffled_batches() -> None:
    source = numbered(50).train
    orders = [
        [int(y) for _, part in batches(source, 8, shuffle_seed=seed) for y in part]
        for seed in (None, 0, 0, 1)
    ]
    assert orders[0] == list(range(50)) == sorted(orders[1])
    assert orders[1] == orders[2] and orders[1] not in (orders[0], orders[3])
    assert all(torch.equal(x[:, 0].long(), y) for x, y in batches(source, 8, shuffle_seed=0))


def test_batches_are_moved_to_the_device(digits: Data) -> None:
    for source in (digits.train, tensors(4), tensors(4).tensors, Labelled([0, 1])):
        x, y = next(batches(source, 2, device="meta"))
        assert x.device.type == y.device.type == "meta"


def test_batches_errors() -> None:
    with pytest.raises(DataError, match="the batch size is 0"):
        batches(tensors(), 0)
    with pytest.raises(DataError, match="3 inputs have 2 targets"):
        batches((torch.ones(3), torch.ones(2)), 1)


def test_images_are_indexed_like_a_sequence(digits: Data) -> None:
    some = digits.train.subset(torch.tensor([3, 1]))
    assert torch.equal(some[-1][0], digits.train[1][0])
    with pytest.raises(IndexError):
        some[2]
    assert len(list(some)) == 2


# ---------------------------------------------------------------------------- augmentation


def coordinates(count: int, height: int, width: int) -> torch.Tensor:
    """Images whose two channels hold row and column, from 1; padding is 0."""
    rows, columns = torch.meshgrid(
        torch.arange(1.0, height + 1), torch.arange(1.0, width + 1), indexing="ij"
    )
    return torch.stack([rows, columns]).expand(count, 2, height, width)


@pytest.mark.parametrize("flip", [True, False])
def test_augment_shifts_and_mirrors(flip: bool) -> None:
    x = coordinates(200, 16, 24)
    made = augment(x, torch.Generator().manual_seed(0), flip=flip)
    assert made.shape == x.shape
    shifts, mirrored = set(), 0
    for image in made:
        row, column = int(image[0, 8, 12]) - 9, int(image[1, 8, 12])
        step = int(image[1, 8, 13]) - column
        mirrored += step == -1
        offset = column - (13 if step == 1 else 12)
        shifts.add((row, offset))
        inside = image[0] > 0
        assert abs(step) == 1 and torch.equal(inside, image[1] > 0)
        assert inside.sum() == (16 - abs(row)) * (24 - abs(offset))
    assert {row for row, _ in shifts} == set(range(-2, 3))
    assert {column for _, column in shifts} == set(range(-3, 4))
    assert 60 < mirrored < 140 if flip else mirrored == 0


def test_augment_is_reproducible_and_leaves_its_input(digits: Data) -> None:
    x, _ = next(batches(digits.train, 8))
    before = x.clone()
    first, second = (augment(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(x, before)
    assert not torch.equal(first, x)


def test_augment_of_what_is_no_image() -> None:
    x = torch.ones(4, 7)
    assert augment(x, torch.Generator()) is x


def test_augment_of_tiny_images_only_mirrors() -> None:
    x = coordinates(20, 4, 4)
    made = augment(x, torch.Generator().manual_seed(0))
    assert all(
        torch.equal(new, old) or torch.equal(new, old.flip(-1))
        for new, old in zip(made, x, strict=True)
    )
