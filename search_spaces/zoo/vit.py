"""A small vision transformer for 32 x 32 images (Wu 2025, "Powerful Design of Small ViT").

Query, key and value projections are layers of their own, so each has a rank of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.exceptions import UsageError

__all__ = ["CifarViT", "vit_cifar"]

PATCH, WIDTH, DEPTH, HEADS, RATIO, DROPPED = 4, 192, 9, 12, 2, 0.1


def vit_cifar(num_classes: int, input_shape: tuple[int, ...]) -> CifarViT:
    """Nine blocks of width 192 with 12 heads, on patches of 4 x 4 pixels.

    Raises:
        UsageError: The sides of the images are no multiples of 4.
    """
    channels, height, width = input_shape
    if height % PATCH or width % PATCH:
        raise UsageError(
            f"vit_cifar was given images of {height} x {width}, but it cuts them into patches of "
            f"{PATCH} x {PATCH}; give images whose sides are multiples of {PATCH}."
        )
    return CifarViT(num_classes, channels, (height // PATCH, width // PATCH))


class CifarViT(nn.Module):
    """A vision transformer with a class token and learned positions (Dosovitskiy et al. 2021).

    Maps images (N, channels, H, W) to logits (N, num_classes).

    Args:
        num_classes: The number of logits.
        channels: Channels of the images.
        grid: Patches along the height and the width of an image.
        depth: The number of blocks.
        width: Features of a token.
        heads: Heads of each attention.
        dropped: The probability that training leaves out the branches of the last block; it grows
            linearly from 0 at the first block (stochastic depth, Huang et al. 2016).
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        grid: tuple[int, int] = (8, 8),
        depth: int = DEPTH,
        width: int = WIDTH,
        heads: int = HEADS,
        dropped: float = DROPPED,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, PATCH, stride=PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        rates = [dropped * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(width, heads, rate) for rate in rates))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, channels, H, W)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits


class Block(nn.Module):
    """Attention and a feed-forward branch, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, dropped: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, RATIO * width), nn.Linear(RATIO * width, width)
        self.dropped = dropped

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, width) from tokens of that shape."""
        tokens = tokens + self._kept(self.attention(self.norm1(tokens)))
        branch = self.fc2(functional.gelu(self.fc1(self.norm2(tokens))))
        return tokens + self._kept(branch)

    def _kept(self, branch: Tensor) -> Tensor:
        """The branch, in training left out for some samples and scaled up for the others."""
        if not self.training or not self.dropped:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.dropped
        return branch * kept.to(branch.dtype) / (1 - self.dropped)


class Attention(nn.Module):
    """Self-attention with separate query, key and value projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, width) from tokens of that shape."""
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return projected


@torch.no_grad()
def _initialise(network: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02, biases of 0, as in ViT."""
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
