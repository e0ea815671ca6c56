"""The networks that can be compressed, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.search_spaces.zoo.cifar import resnet20, resnet56, vgg16_cifar
from rankNAS.search_spaces.zoo.external import file_model, timm_model, torchvision_factory

__all__ = ["SPACES", "SpaceEntry", "build_model"]

_GENERAL_FORMS = (
    "Other forms: torchvision:NAME, timm:NAME, or path/to/file.py:factory for your own network."
)


@dataclass(frozen=True)
class SpaceEntry:
    """A network with a name.

    Attributes:
        name: What the user types.
        description: One line for listings.
        factory: Makes the network, with random weights, from the number of classes and the shape
            (channels, height, width) of one input.
        family: Where the network comes from; pretrained weights exist for ``"torchvision"``.
    """

    name: str
    description: str
    factory: Callable[[int, tuple[int, ...]], nn.Module]
    family: Literal["torchvision", "cifar"]


def _torchvision(name: str, description: str) -> SpaceEntry:
    return SpaceEntry(name, description, torchvision_factory(name), "torchvision")


SPACES: dict[str, SpaceEntry] = {
    "resnet18": _torchvision("resnet18", "ResNet-18 for ImageNet (He et al. 2016)"),
    "resnet34": _torchvision("resnet34", "ResNet-34 for ImageNet (He et al. 2016)"),
    "resnet50": _torchvision("resnet50", "ResNet-50 for ImageNet (He et al. 2016)"),
    "mobilenet_v2": _torchvision("mobilenet_v2", "MobileNetV2 (Sandler et al. 2018)"),
    "vgg16_bn": _torchvision(
        "vgg16_bn", "VGG-16 with batch norm for ImageNet (Simonyan & Zisserman 2015)"
    ),
    "vit_b_16": _torchvision(
        "vit_b_16", "ViT-B/16, sides a multiple of 16 (Dosovitskiy et al. 2021)"
    ),
    "resnet20": SpaceEntry(
        "resnet20", "ResNet-20 for CIFAR, option A (He et al. 2016, 4.2)", resnet20, "cifar"
    ),
    "resnet56": SpaceEntry(
        "resnet56", "ResNet-56 for CIFAR, option A (He et al. 2016, 4.2)", resnet56, "cifar"
    ),
    "vgg16_cifar": SpaceEntry(
        "vgg16_cifar", "VGG-16 with batch norm and one linear layer", vgg16_cifar, "cifar"
    ),
}


def build_model(spec: str, *, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """The network that ``spec`` names, with random weights.

    Args:
        spec: A key of ``SPACES``, ``torchvision:NAME``, ``timm:NAME`` or
            ``path/to/file.py:factory``.
        num_classes: The number of logits.
        input_shape: The shape of one input, (channels, height, width) for images.

    Raises:
        UnknownNameError: There is no such network.
        UsageError: The network can not take inputs of this shape, or the form of ``spec`` needs a
            package that is not installed.
    """
    if spec in SPACES:
        _check_image(spec, input_shape)
        return SPACES[spec].factory(num_classes, input_shape)
    form, colon, name = spec.partition(":")
    if form == "torchvision" and colon:
        return torchvision_factory(name)(num_classes, input_shape)
    if form == "timm" and colon:
        _check_image(spec, input_shape)
        return timm_model(name, num_classes, input_shape)
    if spec.rpartition(":")[0].endswith(".py"):
        return file_model(spec, num_classes, input_shape)
    raise UnknownNameError("search space", spec, SPACES, _GENERAL_FORMS)


def _check_image(spec: str, input_shape: tuple[int, ...]) -> None:
    if len(input_shape) != 3:
        raise UsageError(
            f"{spec} was given inputs of shape {input_shape}, but it takes images "
            "(channels, height, width); choose a data set of images."
        )
