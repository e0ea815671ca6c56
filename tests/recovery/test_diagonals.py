"""The post-training of diagonals: what it computes, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rankNAS.data.samples import Samples
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.diagonals import START, _Diagonals, train_diagonals
from rankNAS.recovery.trainer import Recovery
from rankNAS.tasks.infer import infer_task


def test_the_diagonals_are_a_product_of_slices() -> None:
    """B A + L_b B' L_d A' with B' = B[:, S] and A' = A[S]."""
    torch.manual_seed(0)
    B, A = torch.randn(6, 4), torch.randn(4, 5)
    found = _Diagonals(B, 3, torch.Generator().manual_seed(0))
    assert torch.equal(found(B), B)  # L_b starts at 0
    assert found.inner.tolist() == pytest.approx([START] * 3)
    S = found.positions
    assert len(set(S.tolist())) == 3
    with torch.no_grad():
        found.left.copy_(torch.randn(6))
        found.inner.copy_(torch.randn(3))
        expected = B @ A + found.left.diag() @ B[:, S] @ found.inner.diag() @ A[S]
        assert found(B) @ A == pytest.approx(expected, abs=1e-5)


def test_only_second_factors_change_and_the_loss_falls() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Linear(3, 16))
    network = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(256, 8)
    y = (x @ torch.randn(8, 4)).argmax(1)
    task = infer_task(network, (x, y))
    config = TrainingConfig(20, batch_size=32, learning_rate=2e-2, optimizer="adamw")
    recovery = Recovery(Samples.of((x, y)), task, config)
    before = copy.deepcopy(network)
    trained = train_diagonals(copy.deepcopy(network), ["0"], recovery, slices=2)
    changed = {
        n for n, p in trained.named_parameters() if not torch.equal(p, before.get_parameter(n))
    }
    assert changed == {"0.1.weight"}
    assert all(p.requires_grad for p in trained.parameters())
    losses = [nn.functional.cross_entropy(m(x), y) for m in (before, trained)]
    assert losses[1] < losses[0]
    again = train_diagonals(copy.deepcopy(network), ["0"], recovery, slices=2)
    assert torch.equal(again[0][1].weight, trained[0][1].weight)  # type: ignore[index]
    kept = train_diagonals(copy.deepcopy(network), ["2"], recovery, slices=2)
    assert all(
        torch.equal(a, b) for a, b in zip(kept.parameters(), before.parameters(), strict=True)
    )
