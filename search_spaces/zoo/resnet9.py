"""ResNet-9 for short trainings on small images: whitened patches, ghost batch norm, CELU.

References:
    arXiv 2309.03965, 2023: the network, in a competition at ICLR 2021.
    Hoffer, Hubara and Soudry, NeurIPS 2017: ghost batch norm.
    Barron, 2017, arXiv 1704.07483: CELU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.data.samples import Samples, Source
from rankNAS.exceptions import UsageError
from rankNAS.trees import floating_tensors

__all__ = ["GhostBatchNorm2d", "ResNet9", "Whitening", "resnet9", "whiten", "whitening_filters"]

WIDTH, GHOSTS, ALPHA, SCALE = 64, 16, 0.3, 1 / 16
SIDE, EPSILON = 3, 0.01  # of a patch; added to the variances
FITTED, CHUNK = 10_000, 256  # images of the whitening; of them at a time
POOLED = 8  # the least side of an image, which is halved three times


def resnet9(num_classes: int, input_shape: tuple[int, ...]) -> ResNet9:
    """ResNet-9 of width 64.

    Raises:
        UsageError: The images are smaller than 8 x 8.
    """
    channels, height, width = input_shape
    if min(height, width) < POOLED:
        raise UsageError(
            f"resnet9 was given images of {height} x {width}, but it halves them three times; "
            f"give images of at least {POOLED} x {POOLED}."
        )
    return ResNet9(num_classes, channels)


class ResNet9(nn.Module):
    """Two stages with a residual pair of convolutions, and one without between them.

    Maps images (N, channels, H, W) to logits (N, num_classes). The largest value of each feature
    map is pooled at the end; of images of 32 x 32, these are maps of 4 x 4.

    Args:
        num_classes: The number of logits.
        channels: Channels of the images.
        width: Channels of the first stage; they double in each of three stages.
        whitening: Whether the first layer whitens patches and is fixed. Otherwise it is a
            convolution of the same size that is trained.
        ghosts: Parts of a training batch that a batch norm normalises apart; 1 for batch norm.
        alpha: Of CELU; None for ReLU.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        width: int = WIDTH,
        *,
        whitening: bool = True,
        ghosts: int = GHOSTS,
        alpha: float | None = ALPHA,
    ) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, kernel: int = 3, pooled: bool = False) -> Unit:
            return Unit(inputs, outputs, kernel, pooled, ghosts, alpha)

        def pair(features: int) -> Residual:
            return Residual(unit(features, features), unit(features, features))

        patch = channels * SIDE**2
        trained = nn.Conv2d(channels, patch, SIDE, padding=SIDE // 2, bias=False)
        self.patches = Whitening(channels) if whitening else trained
        self.mixed = unit(patch, width, kernel=1)
        self.stage1 = nn.Sequential(unit(width, 2 * width, pooled=True), pair(2 * width))
        self.stage2 = unit(2 * width, 4 * width, pooled=True)
        self.stage3 = nn.Sequential(unit(4 * width, 8 * width, pooled=True), pair(8 * width))
        self.linear = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, channels, H, W)."""
        features = self.mixed(self.patches(images))
        features = self.stage3(self.stage2(self.stage1(features)))
        logits: Tensor = self.linear(features.amax((2, 3))) * SCALE
        return logits


class Unit(nn.Module):
    """A convolution, perhaps a pooling by 2, a norm, and CELU or ReLU.

    The pooling comes before the norm, which saves work. The norm has no learned scale.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        pooled: bool,
        ghosts: int,
        alpha: float | None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.pool = nn.MaxPool2d(2) if pooled else nn.Identity()
        self.norm = GhostBatchNorm2d(outputs, ghosts)
        self.norm.weight.requires_grad_(False)
        self.active = nn.ReLU() if alpha is None else nn.CELU(alpha)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, outputs, H, W), of half the sides if pooled, of (N, inputs, H, W)."""
        active: Tensor = self.active(self.norm(self.pool(self.conv(features))))
        return active


class Residual(nn.Module):
    """Two units whose output is added to their input."""

    def __init__(self, first: Unit, second: Unit) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) of features of that shape."""
        residual: Tensor = self.second(self.first(features))
        return features + residual


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises parts of a training batch apart; in evaluation it is batch norm.

    The parts are consecutive samples, as many parts, up to a number, as divide the batch equally
    and have at least two samples. The running statistics take the mean of the parts' statistics.
    While statistics are estimated anew (``momentum`` None), the whole batch is one part.

    Args:
        features: The number of channels.
        ghosts: The largest number of parts.
    """

    def __init__(self, features: int, ghosts: int = GHOSTS) -> None:
        super().__init__(features)
        self.ghosts = ghosts

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) of features of that shape."""
        parts = self._parts(len(features)) if self.training and self.momentum is not None else 1
        if parts == 1:
            return super().forward(features)
        assert self.running_mean is not None and self.running_var is not None
        assert self.momentum is not None and self.num_batches_tracked is not None
        means, variances = self.running_mean.repeat(parts, 1), self.running_var.repeat(parts, 1)
        # One call for all parts, with their channels side by side, was half as fast: it copies.
        found = [
            functional.batch_norm(
                part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps
            )
            for part, mean, variance in zip(features.chunk(parts), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(found)

    def _parts(self, count: int) -> int:
        fitting = (n for n in range(self.ghosts, 1, -1) if count % n == 0 and count >= 2 * n)
        return next(fitting, 1)

    def extra_repr(self) -> str:
        return f"{self.num_features}, ghosts={self.ghosts}"


class Whitening(nn.Conv2d):
    """A fixed convolution whose outputs at a position are its patch of 3 x 3 pixels, whitened.

    Before `fit`, the outputs are the values of the patch.

    Args:
        channels: Channels of the images.
    """

    def __init__(self, channels: int) -> None:
        size = channels * SIDE**2
        super().__init__(channels, size, SIDE, padding=SIDE // 2, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.eye(size).view_as(self.weight))
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor]) -> None:
        """Take the filters that whiten the patches of images, batches (N, channels, H, W)."""
        self.weight.copy_(whitening_filters(images))


def whiten(network: nn.Module, data: Source) -> None:
    """Fit the whitening layers of a network to the first images of data, at most 10,000.

    It is called before a training from random weights. Other networks do not change.
    """
    layers = [module for module in network.modules() if isinstance(module, Whitening)]
    if not layers:
        return
    samples = Samples.of(data)
    few = samples.take(torch.arange(min(FITTED, len(samples))))
    for layer in layers:
        layer.fit(floating_tensors(batch)[0] for batch in few.batches(CHUNK))


@torch.no_grad()
def whitening_filters(images: Iterable[Tensor], epsilon: float = EPSILON) -> Tensor:
    """Filters that whiten the patches of 3 x 3 pixels of images.

    With eigenvalues l and eigenvectors v of the second moments of the patches, the filters are
    v / sqrt(l + epsilon). The second moments of their outputs are diag(l / (l + epsilon)).

    Args:
        images: Batches (N, C, H, W).
        epsilon: Keeps noise from being scaled up.

    Returns:
        Filters (9 C, C, 3, 3), the one of the largest eigenvalue first.
    """
    moments, count, channels = torch.zeros(()), 0, 0
    for batch in images:
        channels = batch.shape[1]
        patches = functional.unfold(batch, SIDE).double()  # (N, 9 C, positions)
        moments = moments + torch.einsum("nip,njp->ij", patches, patches)
        count += patches.shape[0] * patches.shape[2]
    values, vectors = torch.linalg.eigh(moments / count)
    filters: Tensor = (vectors / (values.clamp(min=0) + epsilon).sqrt()).T.flip(0)
    return filters.reshape(-1, channels, SIDE, SIDE)
