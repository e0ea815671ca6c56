"""Networks for 32 x 32 images.

Parameter names follow the common CIFAR checkpoints (``layer1.0.conv1`` … ``linear``), so that
these checkpoints load without renaming.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.exceptions import UsageError

__all__ = ["CifarResNet", "CifarVGG", "resnet20", "resnet56", "vgg16_cifar"]

_VGG16_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def resnet20(num_classes: int, input_shape: tuple[int, ...]) -> CifarResNet:
    """ResNet-20: three stages of 3 blocks (He et al. 2016, section 4.2)."""
    return CifarResNet(3, num_classes, input_shape[0])


def resnet56(num_classes: int, input_shape: tuple[int, ...]) -> CifarResNet:
    """ResNet-56: three stages of 9 blocks (He et al. 2016, section 4.2)."""
    return CifarResNet(9, num_classes, input_shape[0])


def vgg16_cifar(num_classes: int, input_shape: tuple[int, ...]) -> CifarVGG:
    """VGG-16 with batch norm and a single linear classifier.

    Raises:
        UsageError: The images are smaller than 32 x 32; five poolings would leave no pixel.
    """
    side = 2 ** len(_VGG16_STAGES)
    if min(input_shape[1:]) < side:
        raise UsageError(
            f"vgg16_cifar was given images of {input_shape[1]} x {input_shape[2]}, but it halves "
            f"them five times; give images of at least {side} x {side}."
        )
    return CifarVGG(num_classes, input_shape[0])


class CifarResNet(nn.Module):
    """The ResNet for CIFAR with parameter-free shortcuts (He et al. 2016, section 4.2).

    Maps images (N, channels, H, W) to logits (N, num_classes), with 6 ``blocks_per_stage`` + 2
    layers that have weights.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, 16, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks_per_stage)
        self.layer2 = _stage(16, 32, 2, blocks_per_stage)
        self.layer3 = _stage(32, 64, 2, blocks_per_stage)
        self.linear = nn.Linear(64, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, channels, H, W)."""
        features = functional.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = PadShortcut(outputs - inputs) if inputs != outputs else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, outputs, H / stride, W / stride) from features (N, inputs, H, W)."""
        residual = functional.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        return functional.relu(residual + self.shortcut(features))


class PadShortcut(nn.Module):
    """Option A shortcut: every second pixel, padded with zero channels (He et al. 2016, 3.3)."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C + new channels, H / 2, W / 2) from features (N, C, H, W)."""
        padding = (0, 0, 0, 0, self.before, self.after)
        return functional.pad(features[:, :, ::2, ::2], padding)


class CifarVGG(nn.Module):
    """VGG-16 (Simonyan & Zisserman 2015, configuration D) with batch norm, for small images.

    Maps images (N, channels, H, W) to logits (N, num_classes). The three wide classifier layers
    of the original are one ``Linear(512, num_classes)``.
    """

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(*_vgg_layers(channels))
        self.classifier = nn.Linear(512, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, channels, H, W)."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def _vgg_layers(channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width, depth in _VGG16_STAGES:
        for inputs, outputs in pairwise([channels] + [width] * depth):
            # The bias has no effect before a batch norm, but VGG checkpoints contain it.
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels = width
    return layers


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


@torch.no_grad()
def _initialise(network: nn.Module) -> None:
    """Kaiming initialisation: normal weights that keep the ReLU variance (He et al. 2015)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
