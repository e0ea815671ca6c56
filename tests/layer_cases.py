"""Layers of every kind, each with the shape of one input."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(12, 10), (12,)),
    (lambda: nn.Linear(12, 10, bias=False), (4, 12)),
    (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=2), (6, 13)),
    (lambda: nn.Conv1d(6, 8, 4, padding="same", groups=2, dilation=2), (6, 11)),
    (lambda: nn.Conv2d(4, 8, 3, stride=(2, 1), padding=(1, 0)), (4, 8, 7)),
    (lambda: nn.Conv2d(4, 8, (2, 3), dilation=(1, 2), padding="same", bias=False), (4, 6, 7)),
    (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2, padding_mode="reflect"), (4, 6, 5)),
    (lambda: nn.Conv2d(4, 8, 3, padding=(2, 1), padding_mode="circular"), (4, 6, 5)),
    (lambda: nn.Conv2d(4, 8, 3, padding="valid", padding_mode="replicate"), (4, 6, 5)),
]
