"""Normalisation of images by the mean and standard deviation of each channel."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from rankNAS.exceptions import DataError

__all__ = ["Normalization", "normalization_from_metadata", "parse_normalization"]


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each of three channels, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def spec(self) -> str:
        """The canonical ``m/m/m,s/s/s``, as accepted by :func:`parse_normalization`."""
        return ",".join("/".join(map(repr, values)) for values in (self.mean, self.std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalised float32 pixels from pixels (..., 3, H, W): uint8, or float in [0, 1]."""
        # Two passes over the pixels: scaled constants save the third, the division by 255.
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
    """The normalisation for a user's specification; ImageNet's for None.

    Args:
        spec: ``imagenet``, ``cifar10``, ``MEAN,STD`` with one number each or three separated by
            ``/``, or six numbers ``m,m,m,s,s,s``; for pixels in [0, 1].

    Raises:
        DataError: The form is invalid, a mean is outside [0, 1] or a std is not positive.
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
    # Means near 100 are meant for pixels up to 255: every normalised input would be constant.
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
    """The normalisation recorded in a checkpoint's description, as a canonical specification.

    Args:
        text: For example ``RGB/255 normalised by mean (0.5,0.5,0.5), std (0.2,0.2,0.2)``.

    Returns:
        A string for ``load_data(normalize=...)``; None if ``text`` has no mean and std.

    Raises:
        DataError: It contains both, but with invalid numbers.
    """
    mean = re.search("means?" + _STATISTIC, text, re.IGNORECASE)
    std = re.search("(?:stds?|standard deviations?)" + _STATISTIC, text, re.IGNORECASE)
    if mean is None or std is None:
        return None
    lists = (re.findall(_NUMBER, match[1]) for match in (mean, std))
    return parse_normalization(",".join("/".join(values) for values in lists)).spec
