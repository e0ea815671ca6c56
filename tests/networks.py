"""A small network, data that it can learn, and a small network as a file of a user's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class SmallNet(nn.Module):
    """Two convolutions, a batch norm and two linear layers, on 3 x 8 x 8 images."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.linear = nn.Linear(16, 64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x)).mean((2, 3))
        out: Tensor = self.head(torch.relu(self.linear(x)))
        return out


def small() -> nn.Module:
    """The small network, with the same weights each time."""
    torch.manual_seed(0)
    return SmallNet().eval()


def split() -> tuple[TensorDataset, TensorDataset]:
    """300 training and 80 test images whose class is the sign pattern of two channel means."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 4, (380,), generator=generator)
    x = torch.randn(380, 3, 8, 8, generator=generator)
    x[:, 0] += (y % 2 * 2 - 1).reshape(-1, 1, 1)
    x[:, 1] += (y // 2 * 2 - 1).reshape(-1, 1, 1)
    return TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:])


def write_model(folder: Path) -> str:
    """``file.py:factory`` of a small network for 32 x 32 images, as a user would write it."""
    path = folder / "my_model.py"
    path.write_text(
        "from torch import nn\n"
        "def factory(num_classes):\n"
        "    return nn.Sequential(\n"
        "        nn.Conv2d(3, 16, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(16),\n"
        "        nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),\n"
        "        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),\n"
        "        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))\n"
    )
    return f"{path}:factory"
