"""Pixels of images by row: stored in memory, or decoded on access."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rankNAS.exceptions import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EncodedImage", "ImageDecoder", "StoredPixels"]


@dataclass(frozen=True, eq=False)
class StoredPixels:
    """Pixels (N, 3, h, w) in memory, resized on access to ``size`` x ``size`` if given."""

    pixels: Tensor
    size: int | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        pixels = self.pixels.index_select(0, rows)
        if self.size is None or pixels.shape[-2:] == (self.size, self.size):
            return pixels
        size = (self.size, self.size)
        return functional.interpolate(_unit(pixels), size, mode="bilinear", antialias=True)


class EncodedImage(NamedTuple):
    """An encoded image (bytes, or the path of its file) and its name for error messages."""

    content: bytes | str
    name: str


@dataclass(frozen=True, eq=False)
class ImageDecoder:
    """Images that are decoded on access.

    Args:
        encoded: The images.
        size: Height and width after resizing and cropping; None leaves images unchanged.
        margin: The shorter side before the crop, relative to the crop.
        expected: The required shape of every image; None for any shape.
    """

    encoded: Sequence[EncodedImage]
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

    def in_memory(self) -> StoredPixels:
        """All images, decoded now."""
        pixels = torch.empty((len(self.encoded), *self.decode(0).shape), dtype=torch.uint8)
        for row in range(len(self.encoded)):
            pixels[row] = self.decode(row)
        return StoredPixels(pixels)


def _decode(encoded: EncodedImage, size: int | None, margin: float) -> Tensor:
    """RGB pixels, uint8 (3, H, W)."""
    import numpy as np
    from PIL import Image

    content, name = encoded
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            pixels = np.array(_fit(rgb, size, margin))
    except Exception as error:  # decoders raise arbitrary errors
        raise DataError(
            f"cannot decode {name} ({type(error).__name__}: {error}); "
            "replace or remove this image."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _fit(image: Image, size: int | None, margin: float) -> Image:
    """The image with its shorter side resized to ``margin * size`` and its centre cropped."""
    if size is None or (margin == 1 and image.size == (size, size)):
        return image
    from torchvision.transforms import functional as transforms

    resized = transforms.resize(image, [round(size * margin)])
    cropped: Image = transforms.center_crop(resized, [size, size])
    return cropped


def _unit(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1]; floats are unchanged."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
