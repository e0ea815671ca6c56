"""Labelled images from the places they are kept in: files, folders and libraries.

Every reader returns a :class:`Source`: two :class:`Images`, which hold pixels (in memory as
uint8, or decoded when asked for) and labels, and normalise whole batches at once.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from rankNAS.exceptions import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "EAGER_BYTES",
    "READERS",
    "Images",
    "Normalization",
    "Source",
    "digest",
    "normalization_from_metadata",
    "parse_normalization",
]

#: Images that take at most this much as uint8 are decoded once and kept in memory.
EAGER_BYTES = 2 << 30

#: The shorter side before the crop, relative to the crop, as is usual for ImageNet.
FOLDER_MARGIN = 256 / 224


def digest(parts: Iterable[bytes]) -> str:
    """The SHA-256 of a sequence of byte strings, in hex; unlike that of their concatenation."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


# ---------------------------------------------------------------------------- normalisation


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each of three channels, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def spec(self) -> str:
        """The canonical ``m/m/m,s/s/s``; :func:`parse_normalization` reads it."""
        return ",".join("/".join(map(repr, values)) for values in (self.mean, self.std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise pixels (..., 3, H, W): uint8, or float in [0, 1]; float32 comes out."""
        # Two passes over the pixels: scaling the constants saves a third, of division by 255.
        scale = 255 if pixels.dtype == torch.uint8 else 1
        mean, std = (
            torch.tensor(values, device=pixels.device).reshape(3, 1, 1) * scale
            for values in (self.mean, self.std)
        )
        return (pixels - mean).div_(std)


_NAMED = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


def parse_normalization(spec: str | None) -> Normalization:
    """The normalisation that a user wrote; ImageNet's for None.

    Args:
        spec: ``imagenet``, ``cifar10``, ``MEAN,STD`` with one number or three with ``/``
            between them each, or six numbers ``m,m,m,s,s,s``; for pixels in [0, 1].

    Raises:
        DataError: If it has another form, a mean outside [0, 1] or a std that is not positive.
    """
    if spec is None:
        return _NAMED["imagenet"]
    if spec.strip().lower() in _NAMED:
        return _NAMED[spec.strip().lower()]
    parts = spec.split(",")
    if len(parts) == 6:
        parts = ["/".join(parts[:3]), "/".join(parts[3:])]
    if len(parts) != 2:
        _bad_normalization(spec)
    mean, std = (_channels(part, spec) for part in parts)
    # Means of 100 are for pixels up to 255: taken as they are, every input would be constant.
    if not all(0 <= value <= 1 for value in mean) or not all(value > 0 for value in std):
        _bad_normalization(spec)
    return Normalization(mean, std)


def _channels(text: str, spec: str) -> tuple[float, float, float]:
    """Three numbers from one or three."""
    try:
        values = [float(number) for number in text.split("/")]
    except ValueError:
        _bad_normalization(spec)
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        _bad_normalization(spec)
    return values[0], values[len(values) // 2], values[-1]


def _bad_normalization(spec: str) -> NoReturn:
    raise DataError(
        f"the normalisation {spec!r} is none of {', '.join(_NAMED)}, MEAN,STD and m,m,m,s,s,s; "
        "give means in [0, 1] and positive stds for pixels in [0, 1], one number or three with "
        "'/' between them, for example 0.49/0.48/0.45,0.25/0.24/0.26."
    ) from None


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_STATISTIC = rf"[\s=:\"']*[(\[]?\s*({_NUMBER}(?:\s*[,/\s]\s*{_NUMBER})*)"


def normalization_from_metadata(text: str) -> str | None:
    """The normalisation a checkpoint's description records, as a canonical specification.

    Args:
        text: For example ``RGB/255 normalised by mean (0.5,0.5,0.5), std (0.2,0.2,0.2)``.

    Returns:
        A string for ``load_data(normalize=...)``; None if ``text`` has no mean and std.

    Raises:
        DataError: If it has both but with unusable numbers.
    """
    mean = re.search("means?" + _STATISTIC, text, re.IGNORECASE)
    std = re.search("(?:stds?|standard deviations?)" + _STATISTIC, text, re.IGNORECASE)
    if mean is None or std is None:
        return None
    lists = (re.findall(_NUMBER, match[1]) for match in (mean, std))
    return parse_normalization(",".join("/".join(values) for values in lists)).spec


# ---------------------------------------------------------------------------- pixels


def _unit(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1]; floats are there already."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


@dataclass(frozen=True, eq=False)
class _Memory:
    """Pixels (N, 3, h, w) in memory, resized when fetched to ``size`` squared if given."""

    pixels: Tensor
    size: int | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        pixels = self.pixels.index_select(0, rows)
        if self.size is None or pixels.shape[-2:] == (self.size, self.size):
            return pixels
        size = (self.size, self.size)
        return functional.interpolate(_unit(pixels), size, mode="bilinear", antialias=True)


class _Encoded(NamedTuple):
    """An encoded image (its bytes, or the path of its file) and what errors call it."""

    content: bytes | str
    name: str


@dataclass(frozen=True, eq=False)
class _Decoder:
    """Images that are decoded when fetched."""

    encoded: Sequence[_Encoded]
    size: int | None
    margin: float = 1.0
    expected: torch.Size | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.stack([self.decode(row) for row in rows.tolist()])

    def decode(self, row: int) -> Tensor:
        """One image, uint8 (3, H, W)."""
        pixels = _decode(self.encoded[row], self.size, self.margin)
        if self.expected is not None and pixels.shape != self.expected:
            height, width = self.expected[1:]
            raise DataError(
                f"{self.encoded[row].name} is {pixels.shape[2]}x{pixels.shape[1]}, but the first "
                f"training image is {width}x{height}; pass --image-size to resize all images."
            )
        return pixels

    def in_memory(self) -> _Memory:
        """Decode all images now."""
        pixels = torch.empty((len(self.encoded), *self.decode(0).shape), dtype=torch.uint8)
        for row in range(len(self.encoded)):
            pixels[row] = self.decode(row)
        return _Memory(pixels)


def _decode(encoded: _Encoded, size: int | None, margin: float) -> Tensor:
    """RGB pixels, uint8 (3, H, W)."""
    import numpy as np
    from PIL import Image

    content, name = encoded
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            pixels = np.array(_fit(rgb, size, margin))
    except Exception as error:  # decoders raise whatever their format's code raises
        raise DataError(
            f"cannot decode {name} ({type(error).__name__}: {error}); "
            "replace or remove this image."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _fit(image: Image, size: int | None, margin: float) -> Image:
    """Resize the shorter side to ``margin * size``, then crop the centre."""
    if size is None or (margin == 1 and image.size == (size, size)):
        return image
    from torchvision.transforms import functional as transforms

    resized = transforms.resize(image, [round(size * margin)])
    cropped: Image = transforms.center_crop(resized, [size, size])
    return cropped


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images; items are (float32 (3, H, W), int64 scalar), normalised.

    Args:
        fetch: From row numbers (n,) to pixels (n, 3, H, W), uint8 or float in [0, 1].
        labels: int64, one for every row that ``fetch`` knows.
        normalization: Applied to whole batches.
        rows: The rows that are in this set, in order; all by default.
    """

    def __init__(
        self,
        fetch: Callable[[Tensor], Tensor],
        labels: Tensor,
        normalization: Normalization,
        rows: Tensor | None = None,
    ) -> None:
        self.normalization = normalization
        self._fetch = fetch
        self._labels = labels
        self._rows = torch.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batch(torch.tensor([index]))
        return inputs[0], targets[0]

    @property
    def targets(self) -> Tensor:
        """All labels, int64 (len,); no image is decoded."""
        return self._labels[self._rows]

    def subset(self, indices: Tensor) -> Images:
        """The set with these items only, in this order; pixels are shared, not copied."""
        return Images(self._fetch, self._labels, self.normalization, self._rows[indices])

    def batch(self, indices: Tensor, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Items ``indices`` (n,) at once: (n, 3, H, W) and (n,), normalised on ``device``."""
        rows = self._rows[indices]
        pixels = self._fetch(rows).to(device)
        return self.normalization(pixels), self._labels[rows].to(device)


# ---------------------------------------------------------------------------- sources


@dataclass(frozen=True, eq=False)
class Source:
    """What a reader found.

    Attributes:
        train: The training images.
        test: The test images.
        flip: Whether a mirrored image still shows the same class.
        content: A digest of everything that was read, before any preprocessing.
    """

    train: Images
    test: Images
    flip: bool
    content: str


def _labels(values: Sequence[Any], names: Callable[[int], str], split: str) -> Tensor:
    """Labels as int64 (n,), if there are some and all are integers from 0."""
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


def read_digits(_: str, normalization: Normalization, image_size: int | None) -> Source:
    """scikit-learn's digits as three equal channels, 32x32 unless told otherwise.

    A fifth of every class is the test set, always the same.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey, labels = torch.from_numpy(bunch.images), torch.from_numpy(bunch.target).long()
    pixels = (grey.float() / 16).unsqueeze(1).expand(-1, 3, -1, -1)
    images = Images(_Memory(pixels, image_size or 32), labels, normalization)
    train, test = _stratified(labels, fraction=0.2)
    content = digest([b"digits", _bytes_of(grey), _bytes_of(labels), _bytes_of(test)])
    return Source(images.subset(train), images.subset(test), False, content)


def _stratified(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Rows of the larger and of the smaller part, the latter a ``fraction`` of every class."""
    generator = torch.Generator().manual_seed(0)
    smaller = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=generator)
        smaller[rows[order[: round(fraction * len(rows))]]] = True
    return (~smaller).nonzero().flatten(), smaller.nonzero().flatten()


def _folder(name: str, content: str) -> Path:
    """The folder ``name``, which should hold ``content``."""
    path = Path(os.path.expanduser(name))  # unlike Path's, these take any text
    if not name or not os.path.isdir(path):
        raise DataError(f"there is no folder {name!r}; give the folder that has {content}.")
    return path


def read_cifar10(folder: str, normalization: Normalization, image_size: int | None) -> Source:
    """CIFAR-10's own Python files, as torchvision reads them."""
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
        sets.append(Images(_Memory(pixels, image_size), labels, normalization))
        contents += [_bytes_of(pixels), _bytes_of(labels)]
    return Source(sets[0], sets[1], True, digest(contents))


def read_imagefolder(folder: str, normalization: Normalization, image_size: int | None) -> Source:
    """``train/<class>/*`` and ``test/<class>/*`` (or ``val``), resized and cropped to 224."""
    root = _folder(folder, "train/<class> and test/<class> in it")
    tests = [name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise DataError(
            f"{root} lacks a folder train, or one called test or val; "
            "put one folder of images per class into each."
        )
    train, classes = _folder_images(root / "train", None)
    test, _ = _folder_images(root / tests[0], classes)
    sets, contents = [], []
    for split, found in (("train", train), ("test", test)):
        labels = _labels([label for _, label in found], lambda row: f"image {row}", split)
        fetch = _Decoder([image for image, _ in found], image_size or 224, FOLDER_MARGIN)
        sets.append(Images(fetch, labels, normalization))
        contents += [digest(_file_parts([image.name for image, _ in found], root))]
        contents += [str(labels.tolist())]
    return Source(sets[0], sets[1], True, digest(part.encode() for part in contents))


def _folder_images(
    folder: Path, classes: dict[str, int] | None
) -> tuple[list[tuple[_Encoded, int]], dict[str, int]]:
    """The images below ``folder`` with labels, and the label of each class.

    The labels are those of ``classes`` if given: numbering the classes of each folder by
    itself would shift them whenever one folder lacks a class.
    """
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is not one folder of images per class ({error}); "
            "add images or remove what is empty."
        ) from error
    known: dict[str, int] = found.class_to_idx if classes is None else classes
    unknown = sorted(set(found.classes) - set(known))
    if unknown:
        raise DataError(
            f"{folder} has the class {unknown[0]!r}, which the training images lack; "
            "both must use the same class names."
        )
    samples = [(_Encoded(path, path), known[found.classes[i]]) for path, i in found.samples]
    return samples, known


def _file_parts(paths: Sequence[str], root: Path) -> Iterable[bytes]:
    """Names and sizes of all files and the content of 64: reading all would take too long."""
    for path in paths:
        yield Path(path).relative_to(root).as_posix().encode()
        yield str(Path(path).stat().st_size).encode()
    for index in sorted({i * (len(paths) - 1) // 63 for i in range(64)}):
        yield Path(paths[index]).read_bytes()


def read_parquet(folder: str, normalization: Normalization, image_size: int | None) -> Source:
    """``train.parquet`` and ``test.parquet`` (or shards) with encoded images and labels.

    With ``image_size`` the shorter side is resized to it and the centre cropped.
    """
    root = _folder(folder, "train.parquet and test.parquet in it")
    sets, contents = [], []
    expected = None
    for split in ("train", "test"):
        encoded, labels = _parquet_rows(root, split)
        decoder = _Decoder(encoded, image_size, expected=expected)
        expected = decoder.decode(0).shape
        decoder = replace(decoder, expected=expected)
        eager = len(encoded) * expected.numel() <= EAGER_BYTES
        sets.append(Images(decoder.in_memory() if eager else decoder, labels, normalization))
        # The encoded bytes, since decoders of different versions differ in the last bit.
        images = (image.content for image in encoded if isinstance(image.content, bytes))
        contents += [digest(images).encode(), _bytes_of(labels)]
    return Source(sets[0], sets[1], True, digest(contents))


def _parquet_rows(root: Path, split: str) -> tuple[list[_Encoded], Tensor]:
    """Encoded images and labels of a split, from all its files."""
    encoded: list[_Encoded] = []
    values: list[Any] = []
    for path in _parquet_files(root, split):
        images, labels = _parquet_columns(path)
        for row, content in enumerate(images):
            if content is None:
                raise DataError(
                    f"row {row} of {path} has no image bytes; embed the images in the file."
                )
            encoded.append(_Encoded(content, f"row {row} of {path}"))
        values += labels
    return encoded, _labels(values, lambda row: encoded[row].name, split)


def _parquet_files(root: Path, split: str) -> list[Path]:
    """``split.parquet``, or every one of its numbered shards."""
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
    """The name of the column of images, in a file that has labels as well."""
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


#: From the word before the colon of a source to what reads the rest.
READERS: dict[str, Callable[[str, Normalization, int | None], Source]] = {
    "digits": read_digits,
    "parquet": read_parquet,
    "imagefolder": read_imagefolder,
    "cifar10": read_cifar10,
}
