"""A search whose statistics and factors are streamed gives the answers of one in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankNAS.engine import search
from rankNAS.models.artifact import load, save
from rankNAS.settings import Settings
from rankNAS.study import Study

TOKENS, LENGTH, WIDTH = 50, 10, 32


class Residual(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


class Language(nn.Module):
    """A language model without attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if bool(input_ids.max() < 0):  # cannot be traced
            return self.embedding(input_ids)
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(x)
        return y


def searched(memory: int, norm: Any = "fisher", **settings: Any) -> Study:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, TOKENS, (60, LENGTH), generator=generator)
    items = [{"input_ids": x} for x in ids]
    return search(
        Language().eval(),
        (items[:50], items[50:]),
        task="causal_lm",
        strategy="solve",
        budget=[{"layer_params": 0.6}, {"layer_params": 0.4}],
        n_trials=2,
        settings=Settings(norm=norm, calibration=16, validation=8, memory=memory, **settings),
    )


@pytest.mark.parametrize("norm", ["input", "fisher", "pooled", "asvd"])
def test_answers_do_not_depend_on_the_memory(
    norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path))
    from rankNAS.search_spaces.policies import RankPolicy

    policy = RankPolicy(operators=("svd",))
    whole, streamed = (
        searched(memory, norm, policy=policy, sequential=False) for memory in (1 << 40, 1)
    )
    assert streamed.context.factorisation.streamed
    assert not whole.context.factorisation.streamed
    errors = whole.context.factorisation.errors()
    for name, found in streamed.context.factorisation.errors().items():
        assert found == pytest.approx(errors[name], rel=1e-5, abs=1e-9)
    if norm == "fisher":  # in memory the losses are measured
        return
    assert [t.allocation for t in whole.trials] == [t.allocation for t in streamed.trials]
    for first, other in zip(whole.trials, streamed.trials, strict=True):
        assert first.metrics == pytest.approx(other.metrics, rel=1e-4)
    x = torch.randint(0, TOKENS, (2, LENGTH))
    a, b = (study.materialise()(x) for study in (whole, streamed))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_streamed_network_is_refitted_saved_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path / "cache"))
    study = searched(1)
    network, allocation = study.materialise(), study.best.allocation
    assert {choice.operator for choice in allocation.values()} <= {"svd", "dense"}
    path = save(network, allocation, tmp_path / "small.safetensors")
    x = torch.randint(0, TOKENS, (2, LENGTH))
    assert torch.equal(load(path, Language)(x), network(x))
    stated = study.context.factorisation.materialise(allocation)
    assert not torch.allclose(stated(x), network(x), rtol=1e-3)  # few batches are split further
    refitted = study.evaluator.evaluate(allocation, final=True)["kl_divergence"]
    assert refitted < study.evaluator.evaluate(allocation)["kl_divergence"] * 1.05
    again = searched(1)  # nothing is factorised anew
    assert again.best.allocation == allocation
    assert torch.equal(again.materialise()(x), network(x))
