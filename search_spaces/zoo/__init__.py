"""The networks that can be compressed, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.lazy import Catalogue

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CATALOGUE", "SPACES", "SpaceEntry", "build_model", "family"]

_TORCHVISION = "rankNAS.search_spaces.zoo.external:torchvision_factory"
_CIFAR = "rankNAS.search_spaces.zoo.cifar"
#: Name to (factory of the network, description). Listing imports nothing.
CATALOGUE: dict[str, tuple[str, str]] = {
    "resnet18": (_TORCHVISION, "ResNet-18 for ImageNet (He et al. 2016)"),
    "resnet34": (_TORCHVISION, "ResNet-34 for ImageNet (He et al. 2016)"),
    "resnet50": (_TORCHVISION, "ResNet-50 for ImageNet (He et al. 2016)"),
    "mobilenet_v2": (_TORCHVISION, "MobileNetV2 (Sandler et al. 2018)"),
    "vgg16_bn": (
        _TORCHVISION,
        "VGG-16 with batch norm for ImageNet (Simonyan & Zisserman 2015)",
    ),
    "vit_b_16": (_TORCHVISION, "ViT-B/16, sides a multiple of 16 (Dosovitskiy et al. 2021)"),
    "resnet20": (f"{_CIFAR}:resnet20", "ResNet-20 for CIFAR, option A (He et al. 2016, 4.2)"),
    "resnet56": (f"{_CIFAR}:resnet56", "ResNet-56 for CIFAR, option A (He et al. 2016, 4.2)"),
    "vgg16_cifar": (f"{_CIFAR}:vgg16_cifar", "VGG-16 with batch norm and one linear layer"),
    "resnet9": (
        "rankNAS.search_spaces.zoo.resnet9:resnet9",
        "ResNet-9 with whitened patches, ghost batch norm and CELU (arXiv 2309.03965)",
    ),
    "vit_cifar": (
        "rankNAS.search_spaces.zoo.vit:vit_cifar",
        "ViT of 9 blocks of width 192, sides a multiple of 4 (Wu 2025)",
    ),
}

_GENERAL_FORMS = (
    "Other forms: torchvision:NAME, timm:NAME, hf:FOLDER for a model of transformers, or "
    "path/to/file.py:factory for your own network."
)


@dataclass(frozen=True)
class SpaceEntry:
    """A named network.

    Attributes:
        name: The name on the command line.
        description: One line for listings.
        factory: Builds the network with random weights from the number of classes and the shape
            (channels, height, width) of one input.
        family: The source of the network; pretrained weights exist for ``"torchvision"``.
    """

    name: str
    description: str
    factory: Callable[[int, tuple[int, ...]], nn.Module]
    family: Literal["torchvision", "cifar"]


def _entry(name: str, found: Callable[..., Any]) -> SpaceEntry:
    factory = found(name) if family(name) == "torchvision" else found
    return SpaceEntry(name, CATALOGUE[name][1], factory, family(name))


def family(name: str) -> Literal["torchvision", "cifar"]:
    """The source of a network of the `CATALOGUE`."""
    return "torchvision" if CATALOGUE[name][0] == _TORCHVISION else "cifar"


#: Name to entry, imported on first use.
SPACES: Mapping[str, SpaceEntry] = Catalogue(CATALOGUE, _entry)


def build_model(
    spec: str, *, num_classes: int | None, input_shape: tuple[int, ...] | None
) -> nn.Module:
    """The network that ``spec`` names, with random weights; that of a folder has its own.

    Args:
        spec: A key of ``SPACES``, ``torchvision:NAME``, ``timm:NAME``, ``hf:FOLDER`` or
            ``path/to/file.py:factory``.
        num_classes: The number of logits; None if unknown, for a network of a file or a folder.
        input_shape: The shape of one input, (channels, height, width) for images; None if there is
            no single one, for a network of a file or a folder.

    Raises:
        UnknownNameError: There is no such network.
        UsageError: The network does not accept inputs of this shape, its classes are unknown, or
            the form of ``spec`` needs a package that is not installed.
        WeightsError: The weights in a folder are missing or damaged.
    """
    from rankNAS.search_spaces.zoo.external import file_model, timm_model, torchvision_factory
    from rankNAS.search_spaces.zoo.huggingface import PREFIX, huggingface_model, is_huggingface

    if is_huggingface(spec):
        return huggingface_model(spec.removeprefix(PREFIX))
    if spec.rpartition(":")[0].endswith(".py"):
        return file_model(spec, num_classes, input_shape)
    form, colon, name = spec.partition(":")
    if spec not in SPACES and not (form in ("torchvision", "timm") and colon):
        raise UnknownNameError("search space", spec, SPACES, _GENERAL_FORMS)
    if num_classes is None:
        raise UsageError(
            f"{spec} is a classifier, but the labels of the data are no classes; give a network "
            "of your own as path/to/file.py:factory."
        )
    shape = _image_shape(spec, input_shape)
    if spec in SPACES:
        return SPACES[spec].factory(num_classes, shape)
    if form == "torchvision":
        return torchvision_factory(name)(num_classes, shape)
    return timm_model(name, num_classes, shape)


def _image_shape(spec: str, input_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of one image, checked."""
    if input_shape is None or len(input_shape) != 3:
        raise UsageError(
            f"{spec} was given inputs of shape {input_shape}, but it takes images "
            "(channels, height, width); choose a data set of images."
        )
    return input_shape
