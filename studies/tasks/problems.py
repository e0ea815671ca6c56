"""Small problems that are not image classification: data, networks and their training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from rankNAS.recovery import TrainingConfig, train
from rankNAS.tasks import Classification, MultiLabel, Regression, Segmentation, Task

Pair = tuple[TensorDataset, TensorDataset]


@dataclass(frozen=True)
class Problem:
    """A network with its data.

    Args:
        title: In words.
        metric: The metric that is shown.
        task: The task of training and testing.
        data: Returns training and test data.
        network: Returns the untrained network.
        epochs: Of the training.
        labelled: Whether the search sees the labels.
    """

    title: str
    metric: str
    task: Task
    data: Callable[[], Pair]
    network: Callable[[], nn.Module]
    epochs: int = 40
    learning_rate: float = 2e-3
    labelled: bool = True

    def trained(self, seed: int) -> tuple[nn.Module, Pair]:
        """The network, trained with a seed, and its data."""
        torch.manual_seed(seed)
        network, data = self.network(), self.data()
        config = TrainingConfig(
            self.epochs,
            batch_size=64,
            learning_rate=self.learning_rate,
            optimizer="adamw",
            weight_decay=1e-4,
            augment=False,
            seed=seed,
        )
        batch = data[0][:2]
        return train(network, data[0], config, task=self.task.bound(batch, network)), data


def friedman_terms(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (count, 10) and the four terms (count, 4) of Friedman's first function."""
    inputs, _ = make_friedman1(count, n_features=10, random_state=seed)
    terms = [
        10 * np.sin(np.pi * inputs[:, 0] * inputs[:, 1]),
        20 * (inputs[:, 2] - 0.5) ** 2,
        10 * inputs[:, 3],
        5 * inputs[:, 4],
    ]
    return inputs, np.stack(terms, axis=1)


def friedman(outputs: int) -> Pair:
    """Mixtures of the four terms of Friedman's first function, plus noise; unit variance."""
    inputs, terms = friedman_terms(4000, 0)
    rng = np.random.default_rng(outputs)
    targets = terms @ rng.normal(size=(4, outputs)) + rng.normal(size=(4000, outputs))
    targets = (targets - targets.mean(0)) / targets.std(0)
    return _split(torch.tensor(inputs).float(), torch.tensor(targets).float())


def regressor(outputs: int) -> nn.Module:
    """Four hidden layers of 128 features."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(nn.Linear(10, 128), nn.ReLU(), *hidden, nn.Linear(128, outputs))


def shapes() -> Pair:
    """Images 3 x 32 x 32 of a disc, a square and a ring on noise; classes of the pixels."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images, masks = [], []
    for _ in range(1500):
        mask = torch.zeros(32, 32, dtype=torch.long)
        for kind in torch.randperm(3, generator=generator).tolist():
            y, x = 6 + 20 * torch.rand(2, generator=generator)
            size = 3 + 4 * float(torch.rand(1, generator=generator))
            distance = ((rows - y) ** 2 + (columns - x) ** 2).sqrt()
            square = torch.maximum((rows - y).abs(), (columns - x).abs()) < size
            inside = (distance < size, square, (distance - size).abs() < 1.5)[kind]
            mask[inside] = kind + 1
        colours = 0.4 * torch.randn(4, 3, generator=generator)
        noise = 0.25 * torch.randn(3, 32, 32, generator=generator)
        images.append(colours[mask].permute(2, 0, 1) + 0.5 * (mask > 0) + noise)
        masks.append(mask)
    return _split(torch.stack(images), torch.stack(masks))


class UNet(nn.Module):
    """Two levels with skip connections; logits (N, 4, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = _block(3, 32), _block(32, 64), _block(64, 64)
        self.up, self.down = _block(128, 32), nn.MaxPool2d(2)
        self.last, self.head = _block(64, 32), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(self.down(a))
        c = nn.functional.interpolate(self.third(self.down(b)), scale_factor=2.0)
        d = nn.functional.interpolate(self.up(torch.cat([b, c], 1)), scale_factor=2.0)
        out: Tensor = self.head(self.last(torch.cat([a, d], 1)))
        return out


def _block(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, 1 x 8 x 8 in [0, 1], in a fixed random order."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = torch.tensor(bunch.images[order]).float()[:, None] / 16
    return images, torch.tensor(bunch.target[order]).long()


class Encoder(nn.Module):
    """Three convolutions; features (N, 64) of images 1 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Siamese(nn.Module):
    """Whether two images show the same digit: logits (N, 2) from one encoder for both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.encoder(first), self.encoder(second)
        out: Tensor = self.head(torch.cat([(a - b).abs(), a * b], 1))
        return out


def pairs() -> Pair:
    """Pairs of digits, half of them equal."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(0)
    sets = []
    for rows, count in ((torch.arange(1300), 6000), (torch.arange(1300, 1797), 2000)):
        first = rows[torch.randint(len(rows), (count,), generator=generator)]
        second = rows[torch.randint(len(rows), (count,), generator=generator)]
        same = torch.rand(count, generator=generator) < 0.45
        for i in same.nonzero().flatten().tolist():
            equal = rows[labels[rows] == labels[first[i]]]
            second[i] = equal[torch.randint(len(equal), (1,), generator=generator)]
        target = (labels[first] == labels[second]).long()
        sets.append(TensorDataset(images[first], images[second], target))
    return sets[0], sets[1]


def properties() -> Pair:
    """Digits with four properties: odd, above four, with a closed loop, prime."""
    images, labels = digits()
    loops, primes = torch.tensor([0, 6, 8, 9]), torch.tensor([2, 3, 5, 7])
    found = [
        labels % 2 == 1,
        labels > 4,
        torch.isin(labels, loops),
        torch.isin(labels, primes),
    ]
    return _split(images, torch.stack(found, 1).float(), test=0.28)


def classes() -> Pair:
    """Digits and their classes."""
    images, labels = digits()
    return _split(images, labels, test=0.28)


def _split(inputs: Tensor, targets: Tensor, test: float = 0.25) -> Pair:
    at = round(len(inputs) * (1 - test))
    train_set = TensorDataset(inputs[:at], targets[:at])
    return train_set, TensorDataset(inputs[at:], targets[at:])


PROBLEMS = {
    "regression10": Problem(
        "regression, 10 outputs",
        "r2",
        Regression(),
        lambda: friedman(10),
        lambda: regressor(10),
    ),
    "regression2": Problem(
        "regression, 2 outputs", "r2", Regression(), lambda: friedman(2), lambda: regressor(2)
    ),
    "segmentation": Problem(
        "U-Net, generated shapes", "miou", Segmentation(), shapes, UNet, epochs=12
    ),
    "siamese": Problem(
        "two digits, equal or not", "accuracy", Classification(), pairs, Siamese, 8
    ),
    "multilabel": Problem(
        "four properties of a digit",
        "f1",
        MultiLabel(),
        properties,
        lambda: nn.Sequential(Encoder(), nn.Linear(64, 4)),
    ),
    "unlabelled": Problem(
        "digits, searched without labels",
        "accuracy",
        Classification(),
        classes,
        lambda: nn.Sequential(Encoder(), nn.Linear(64, 10)),
        labelled=False,
    ),
}
