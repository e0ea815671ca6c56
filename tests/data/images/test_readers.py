"""Readers of images: digits, parquet files, folders and CIFAR-10; on generated data."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from image_sets import fill_folder, pixels, png, write_parquet
from PIL import Image

from rankNAS.data.base import Data
from rankNAS.data.images import readers
from rankNAS.data.images.decode import ImageDecoder, StoredPixels
from rankNAS.data.loading import load_data
from rankNAS.data.splits import split
from rankNAS.exceptions import DataError


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train.parquet", pixels(20), [i % 4 for i in range(20)])
    write_parquet(tmp_path / "test.parquet", pixels(6, seed=1), [i % 3 for i in range(6)])
    return tmp_path


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def test_digits(digits: Data) -> None:
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert digits.input_shape == (3, 32, 32)
    assert (digits.name, digits.num_classes, digits.flip) == ("digits", 10, False)
    x, y = digits.train[0]
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32
    assert y.dtype == torch.int64 and y.shape == ()


def test_digits_are_stratified_and_contain_every_image_once(digits: Data) -> None:
    from sklearn.datasets import load_digits

    train = torch.bincount(digits.train.source.targets)
    test = torch.bincount(digits.test.source.targets)
    assert (train + test).tolist() == np.bincount(load_digits().target).tolist()
    assert ((test / (train + test) - 0.2).abs() < 0.005).all()
    rows = torch.cat([digits.train.source._rows, digits.test.source._rows])
    assert rows.sort().values.tolist() == list(range(1797))


def test_digits_are_scaled_grey_and_upsampled() -> None:
    from sklearn.datasets import load_digits

    plain = load_data("digits", normalize="0,1", image_size=8)
    x, y = plain.train[3]
    row = int(plain.train.source._rows[3])
    grey = torch.from_numpy(load_digits().images[row]).float() / 16
    assert torch.equal(x, grey.expand(3, 8, 8)) and y == load_digits().target[row]
    larger = load_data("digits", normalize="0,1").train[3][0]
    wanted = torch.nn.functional.interpolate(grey[None, None], (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(larger, wanted.expand(3, 32, 32), atol=1e-5, rtol=0)


def test_digits_image_size() -> None:
    assert load_data("digits", image_size=12).input_shape == (3, 12, 12)


def test_parquet(parquet: Path) -> None:
    data = load_data(f"parquet:{parquet}", normalize="0.5,0.25")
    assert (len(data.train), len(data.test)) == (20, 6)
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
    assert torch.equal(shards.train.source.targets, whole.train.source.targets)
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
    monkeypatch.setattr(readers, "EAGER_BYTES", 20 * 3 * 8 * 8 - 1)
    lazy = load_data(f"parquet:{parquet}")
    assert isinstance(eager.train.source._fetch, StoredPixels)
    assert isinstance(lazy.train.source._fetch, ImageDecoder)
    assert isinstance(lazy.test.source._fetch, StoredPixels)
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


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_imagefolder(tmp_path: Path, test_name: str) -> None:
    fill_folder(tmp_path / "train", "abc")
    fill_folder(tmp_path / test_name, "abc", count=1)
    data = load_data(f"imagefolder:{tmp_path}", normalize="0,1")
    assert (data.input_shape, data.num_classes, data.flip) == ((3, 224, 224), 3, True)
    assert (len(data.train), len(data.test)) == (6, 3)
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
    assert data.test.source.targets.tolist() == [2, 2]


def test_imagefolder_without_hidden_folders_and_files(tmp_path: Path) -> None:
    """Copies that Jupyter and macOS make are neither classes nor images."""
    for split_name in ("train", "test"):
        fill_folder(tmp_path / split_name, "abc")
    expected = load_data(f"imagefolder:{tmp_path}", image_size=8)
    for name in (".ipynb_checkpoints", "__MACOSX", "a/.ipynb_checkpoints", ".cache/b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        copy = tmp_path / "train" / name / "0-checkpoint.png"
        copy.write_bytes((tmp_path / "train" / "a" / "0.png").read_bytes())
    (tmp_path / "train" / "b" / "._1.png").write_bytes(b"a resource fork")
    found = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert (len(found.train), found.num_classes) == (len(expected.train), 3)
    assert found.fingerprint == expected.fingerprint
    folder = tmp_path / "only" / "train" / ".hidden"
    folder.mkdir(parents=True)
    fill_folder(tmp_path / "only" / "test", "a")
    with pytest.raises(DataError, match="is not one folder of images per class"):
        load_data(f"imagefolder:{tmp_path / 'only'}")


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
    assert (data.input_shape, data.num_classes, len(data.test)) == ((3, 32, 32), 5, 4)
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
