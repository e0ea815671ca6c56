"""Readers of labelled images: files, folders and libraries.

Every reader returns a `Source` with two `Images`. They hold labels and pixels (in memory as uint8,
or decoded on access), and normalise whole batches at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankNAS.data.fingerprint import digest
from rankNAS.data.images import cache
from rankNAS.data.images.dataset import Images
from rankNAS.data.images.decode import EncodedImage, ImageDecoder, StoredPixels
from rankNAS.data.images.normalise import Normalization
from rankNAS.exceptions import DataError

__all__ = ["EAGER_BYTES", "READERS", "Source"]

#: Image sets of at most this size as uint8 are decoded once and kept in memory.
EAGER_BYTES = 2 << 30


#: The shorter side before the crop, relative to the crop; the usual value for ImageNet.
FOLDER_MARGIN = 256 / 224
SPLITS, WHAT = ("train", "test"), ("pixels", "labels")


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a reader.

    Attributes:
        train: The training images.
        test: The test images.
        flip: Whether a mirrored image still shows the same class.
        content: A digest of the content read, before any preprocessing.
    """

    train: Images
    test: Images
    flip: bool
    content: str


def read_digits(_: str, normalization: Normalization, image_size: int | None) -> Source:
    """scikit-learn's digits as three equal channels, 32 x 32 by default.

    The test set is a fixed fifth of every class.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey, labels = torch.from_numpy(bunch.images), torch.from_numpy(bunch.target).long()
    pixels = (grey.float() / 16).unsqueeze(1).expand(-1, 3, -1, -1)
    images = Images(StoredPixels(pixels, image_size or 32), labels, normalization)
    train, test = _stratified(labels, fraction=0.2)
    content = digest([b"digits", _bytes_of(grey), _bytes_of(labels), _bytes_of(test)])
    return Source(images.subset(train), images.subset(test), False, content)


def _stratified(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Rows of the larger and the smaller part; the latter holds ``fraction`` of every class."""
    generator = torch.Generator().manual_seed(0)
    smaller = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=generator)
        smaller[rows[order[: round(fraction * len(rows))]]] = True
    return (~smaller).nonzero().flatten(), smaller.nonzero().flatten()


def _folder(name: str, content: str) -> Path:
    """The path of folder ``name``; ``content`` describes its expected content in messages."""
    path = Path(os.path.expanduser(name))  # unlike Path's methods, these accept any text
    if not name or not os.path.isdir(path):
        raise DataError(f"there is no folder {name!r}; give the folder that has {content}.")
    return path


def read_cifar10(folder: str, normalization: Normalization, image_size: int | None) -> Source:
    """The Python files of CIFAR-10, read by torchvision."""
    from torchvision.datasets import CIFAR10

    root = _folder(folder, "cifar-10-batches-py in it")
    sets, contents = [], []
    for split in ("train", "test"):
        try:
            found = CIFAR10(str(root), train=split == "train", download=False)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{root} has no intact cifar-10-batches-py ({error}); "
                "unpack cifar-10-python.tar.gz there."
            ) from error
        labels = _labels(found.targets, lambda row: f"row {row} of {root}", split)
        pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        sets.append(Images(StoredPixels(pixels, image_size), labels, normalization))
        contents += [_bytes_of(pixels), _bytes_of(labels)]
    return Source(sets[0], sets[1], True, digest(contents))


def read_imagefolder(folder: str, normalization: Normalization, image_size: int | None) -> Source:
    """``train/<class>/*`` and ``test/<class>/*`` (or ``val``), resized and cropped to 224.

    Images that fit into memory are decoded once and kept on disk, see `rankNAS.data.images.cache`.
    """
    root = _folder(folder, "train/<class> and test/<class> in it")
    tests = [name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise DataError(
            f"{root} lacks a folder train, or one called test or val; "
            "put one folder of images per class into each."
        )
    train, classes = _folder_images(root / "train", None)
    test, _ = _folder_images(root / tests[0], classes)
    parts, side = {"train": train, "test": test}, image_size or 224
    sizes = [len(found) * 3 * side**2 for found in parts.values()]
    if max(sizes) > EAGER_BYTES or not cache.allows(sum(sizes)):
        return _folder_source(root, parts, normalization, side, eager=False)
    labels = [[label for _, label in found] for found in parts.values()]
    return _kept(
        [Path(image.name) for found in parts.values() for image, _ in found],
        ["imagefolder", labels, side],
        lambda: _decoded_folder(root, parts, normalization, side),
        normalization,
    )


def _decoded_folder(
    root: Path,
    parts: dict[str, list[tuple[EncodedImage, int]]],
    normalization: Normalization,
    side: int,
) -> Source:
    """The images of a folder, decoded now; on access if one of them cannot be decoded."""
    try:
        return _folder_source(root, parts, normalization, side, eager=True)
    except DataError:  # a search may never read that image
        return _folder_source(root, parts, normalization, side, eager=False)


def _folder_source(
    root: Path,
    parts: dict[str, list[tuple[EncodedImage, int]]],
    normalization: Normalization,
    side: int,
    eager: bool,
) -> Source:
    """The images of a folder, decoded now or on access."""
    sets, contents = [], []
    for split, found in parts.items():
        labels = _labels([label for _, label in found], lambda row: f"image {row}", split)
        decoder = ImageDecoder([image for image, _ in found], side, FOLDER_MARGIN)
        sets.append(Images(decoder.in_memory() if eager else decoder, labels, normalization))
        contents += [digest(_file_parts([image.name for image, _ in found], root))]
        contents += [str(labels.tolist())]
    return Source(sets[0], sets[1], True, digest(part.encode() for part in contents))


def _folder_images(
    folder: Path, classes: dict[str, int] | None
) -> tuple[list[tuple[EncodedImage, int]], dict[str, int]]:
    """The images below ``folder`` with labels, and the label of each class.

    Hidden folders and files, such as the copies in ``.ipynb_checkpoints``, are left out.

    ``classes`` fixes the labels if given. Separate numbering per folder would shift the
    labels if one folder lacks a class.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    def is_image(path: str) -> bool:
        shown = not any(map(_is_hidden, Path(path).relative_to(folder).parts))
        return shown and path.lower().endswith(IMG_EXTENSIONS)

    try:
        names = [name for name in find_classes(folder)[0] if not _is_hidden(name)]
        if not names:
            raise FileNotFoundError("all of its folders are hidden")
        found = make_dataset(folder, {n: i for i, n in enumerate(names)}, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is not one folder of images per class ({error}); "
            "add images or remove what is empty."
        ) from error
    known = {name: i for i, name in enumerate(names)} if classes is None else classes
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise DataError(
            f"{folder} has the class {unknown[0]!r}, which the training images lack; "
            "both must use the same class names."
        )
    samples = [(EncodedImage(path, path), known[names[i]]) for path, i in found]
    return samples, known


def _is_hidden(name: str) -> bool:
    """Whether programs make files and folders of this name beside those of the user."""
    return name.startswith(".") or name == "__MACOSX"


def _file_parts(paths: Sequence[str], root: Path) -> Iterable[bytes]:
    """Names and sizes of all files, and the content of 64 of them to limit the time."""
    for path in paths:
        yield Path(path).relative_to(root).as_posix().encode()
        yield str(Path(path).stat().st_size).encode()
    for index in sorted({i * (len(paths) - 1) // 63 for i in range(64)}):
        yield Path(paths[index]).read_bytes()


def read_parquet(folder: str, normalization: Normalization, image_size: int | None) -> Source:
    """``train.parquet`` and ``test.parquet`` (or shards) with encoded images and labels.

    With ``image_size``, the shorter side is resized to it and the centre is cropped. Decoded
    images that fit into memory are kept on disk, see `rankNAS.data.images.cache`.
    """
    root = _folder(folder, "train.parquet and test.parquet in it")
    files = {split: _parquet_files(root, split) for split in SPLITS}
    return _kept(
        [*files["train"], *files["test"]],
        ["parquet", len(files["train"]), image_size, EAGER_BYTES],
        lambda: _decoded_parquet(root, normalization, image_size),
        normalization,
    )


def _kept(
    files: Sequence[Path],
    options: Sequence[object],
    decode: Callable[[], Source],
    normalization: Normalization,
) -> Source:
    """The images that are kept on disk for these files and options, or else decoded and kept.

    Images that do not fit into memory are not kept.
    """
    path = cache.entry(files, options)
    kept = cache.read(path)
    if kept is not None and kept[0].keys() == {f"{s} {w}" for s in SPLITS for w in WHAT}:
        tensors, texts = kept
    else:
        found = decode()
        if not all(isinstance(images.fetch, StoredPixels) for images in (found.train, found.test)):
            return found
        tensors, texts = _tensors_of(found), {"content": found.content}
        cache.write(path, tensors, texts)
    train, test = (
        Images(StoredPixels(tensors[f"{s} pixels"]), tensors[f"{s} labels"], normalization)
        for s in SPLITS
    )
    return Source(train, test, True, texts["content"])


def _tensors_of(source: Source) -> dict[str, Tensor]:
    """Pixels and labels of images in memory, by split."""
    found: dict[str, Tensor] = {}
    for split, images in zip(SPLITS, (source.train, source.test), strict=True):
        assert isinstance(images.fetch, StoredPixels)
        found |= {f"{split} pixels": images.fetch.pixels, f"{split} labels": images.targets}
    return found


def _decoded_parquet(root: Path, normalization: Normalization, image_size: int | None) -> Source:
    """The images of parquet files, decoded now if they fit into memory."""
    sets, contents = [], []
    expected = None
    for split in ("train", "test"):
        encoded, labels = _parquet_rows(root, split)
        decoder = ImageDecoder(encoded, image_size, expected=expected)
        expected = decoder.decode(0).shape
        decoder = replace(decoder, expected=expected)
        eager = len(encoded) * expected.numel() <= EAGER_BYTES
        sets.append(Images(decoder.in_memory() if eager else decoder, labels, normalization))
        # Encoded bytes, because decoder versions differ in the last bit.
        images = (image.content for image in encoded if isinstance(image.content, bytes))
        contents += [digest(images).encode(), _bytes_of(labels)]
    return Source(sets[0], sets[1], True, digest(contents))


def _parquet_rows(root: Path, split: str) -> tuple[list[EncodedImage], Tensor]:
    """Encoded images and labels of a split, from all of its files."""
    encoded: list[EncodedImage] = []
    values: list[Any] = []
    for path in _parquet_files(root, split):
        images, labels = _parquet_columns(path)
        for row, content in enumerate(images):
            if content is None:
                raise DataError(
                    f"row {row} of {path} has no image bytes; embed the images in the file."
                )
            encoded.append(EncodedImage(content, f"row {row} of {path}"))
        values += labels
    return encoded, _labels(values, lambda row: encoded[row].name, split)


def _parquet_files(root: Path, split: str) -> list[Path]:
    """``split.parquet``, or all of its numbered shards."""
    if (root / f"{split}.parquet").is_file():
        return [root / f"{split}.parquet"]
    shards = sorted(root.glob(f"{split}-*-of-*.parquet"))
    if not shards:
        raise DataError(
            f"{root} has neither {split}.parquet nor shards {split}-00000-of-*.parquet; "
            "a parquet data set needs both a train and a test part."
        )
    total = shards[0].stem.rpartition("-")[2]
    if not total.isdigit() or len(shards) != int(total):
        raise DataError(
            f"{root} has {len(shards)} shards of {split}, but {shards[0].name} says there are "
            f"{total}; fetch the missing ones or remove those of another version."
        )
    return shards


def _parquet_columns(path: Path) -> tuple[list[bytes | None], list[Any]]:
    """The columns of encoded images and of labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            image = _image_column(file.schema_arrow.names, path)
            table = file.read(columns=[image, "label"])
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {path} as parquet ({error}); fetch or write the file again."
        ) from error
    return _image_bytes(table.column(image), path), table.column("label").to_pylist()


def _image_column(names: Sequence[str], path: Path) -> str:
    """The name of the image column, in a file that also has labels."""
    image = next((name for name in ("image", "img") if name in names), None)
    if image is None or "label" not in names:
        raise DataError(
            f"{path} has the columns {', '.join(names)}; "
            "it needs 'image' (or 'img') and 'label', so rename them."
        )
    return image


def _image_bytes(column: Any, path: Path) -> list[bytes | None]:
    """Encoded images from a column of structs {bytes, path} or of plain bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(
            f"the image column of {path} has the type {kind}; "
            "it must be a struct with 'bytes', or binary, holding encoded images."
        )
    values: list[bytes | None] = column.to_pylist()
    return values


def _labels(values: Sequence[Any], names: Callable[[int], str], split: str) -> Tensor:
    """Labels as int64 (n,); an error unless there are labels and all are integers from 0."""
    for row, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DataError(
                f"the label of {names(row)} ({split} split) is {value!r}; "
                "labels must be integers from 0, so renumber the classes."
            )
    if not values:
        raise DataError(f"the {split} split has no images; it needs at least one.")
    return torch.tensor(values, dtype=torch.int64)


def _bytes_of(tensor: Tensor) -> bytes:
    content: bytes = tensor.contiguous().numpy().tobytes()
    return content


#: Readers by the prefix of a source; each receives the text after the colon.
READERS: dict[str, Callable[[str, Normalization, int | None], Source]] = {
    "digits": read_digits,
    "parquet": read_parquet,
    "imagefolder": read_imagefolder,
    "cifar10": read_cifar10,
}
