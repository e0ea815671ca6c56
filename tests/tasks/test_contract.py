"""Every built-in task obeys the contract of tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.tasks import Classification, Custom, Matching, MultiLabel, Regression, Segmentation
from rankNAS.tasks.language import CausalLanguageModelling, MaskedLanguageModelling
from rankNAS.testing import TaskContract

N, WIDTH, TOKENS, VOCABULARY = 8, 6, 7, 11


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(seed: int, most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))


def seeded(outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, outputs)).eval()


class TokenModel(nn.Module):
    """Logits of tokens, which depend on the token and its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids) * attention_mask[..., None]
        return {"logits": self.head(hidden)}


def token_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TokenModel().eval()


def token_batch() -> dict[str, Tensor]:
    mask = torch.ones(N, TOKENS, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"input_ids": integers(0, VOCABULARY, N, TOKENS), "attention_mask": mask}


class TestClassification(TaskContract):
    task = Classification(weights=(1.0, 2.0, 0.5))

    def model(self) -> nn.Module:
        return seeded(outputs=3)

    def batch(self) -> Any:
        targets = integers(1, 3, N, 1).int()
        targets[2] = -100
        return drawn(0, N, WIDTH), targets


class TestOneLogit(TaskContract):
    task = Classification()

    def model(self) -> nn.Module:
        return seeded(outputs=1)

    def batch(self) -> Any:
        return {"input": drawn(0, N, WIDTH), "label": integers(1, 2, N).bool()}


class TestMultiLabel(TaskContract):
    task = MultiLabel()

    def model(self) -> nn.Module:
        return seeded(outputs=4)

    def batch(self) -> Any:
        targets = integers(1, 2, N, 4)
        targets[3, 1] = -100
        return drawn(0, N, WIDTH), targets


class TestRegression(TaskContract):
    task = Regression()

    def model(self) -> nn.Module:
        return seeded(outputs=3)

    def batch(self) -> Any:
        return drawn(0, N, WIDTH), drawn(1, N, 3)


class TestOneOutput(TaskContract):
    task = Regression()

    def model(self) -> nn.Module:
        return seeded(outputs=1)

    def batch(self) -> Any:
        return drawn(0, N, WIDTH), drawn(1, N)


class TestSegmentation(TaskContract):
    task = Segmentation(ignored=9)

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Conv2d(2, 3, 3, padding=1).eval()

    def batch(self) -> Any:
        targets = integers(1, 3, N, 5, 5)
        targets[0, :2] = 9
        return drawn(0, N, 2, 5, 5), targets


class TestCausal(TaskContract):
    task = CausalLanguageModelling()

    def model(self) -> nn.Module:
        return token_model()

    def batch(self) -> Any:
        return token_batch()


class TestMasked(TaskContract):
    task = MaskedLanguageModelling()

    def model(self) -> nn.Module:
        return token_model()

    def batch(self) -> Any:
        masked = integers(2, 3, N, TOKENS) == 0
        masked[:, 0] = True
        labels = torch.where(masked, integers(1, VOCABULARY, N, TOKENS), -100)
        return {**token_batch(), "labels": labels}


class TestMatching(TaskContract):
    task = Matching()

    def model(self) -> nn.Module:
        return seeded(outputs=3)

    def batch(self) -> Any:
        return drawn(0, N, WIDTH)


class TestMatchingWithMask(TaskContract):
    task = Matching()

    def model(self) -> nn.Module:
        return token_model()

    def batch(self) -> Any:
        return token_batch()


class TestMatchingByDivergence(TaskContract):
    task = Matching(by="kl")

    def model(self) -> nn.Module:
        return seeded(outputs=3)

    def batch(self) -> Any:
        return drawn(0, N, WIDTH)


def absolute(output: Tensor, batch: Any) -> Tensor:
    return (output[:, 0].double() - batch[1]).abs().mean()


def gap(output: Tensor, dense: Tensor) -> Tensor:
    return (output.double() - dense).abs().mean()


class TestCustom(TaskContract):
    task = Custom(loss=absolute, metrics={"error": (absolute, "minimise")})

    def model(self) -> nn.Module:
        return seeded(outputs=1)

    def batch(self) -> Any:
        return drawn(0, N, WIDTH), drawn(1, N)


class TestCustomDivergence(TestCustom):
    task = Custom(loss=absolute, divergence=gap)
