"""Falling ranks: the exact restart by QR, the family, and its interruption."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chain_cases import CASES
from recipe_jobs import JOBS, loss_of, regression, same, state
from torch import Tensor, nn

from rankNAS.recovery.progressive import Progressive, chain_ranks, falling_ranks
from rankNAS.recovery.recover import run_recipe
from rankNAS.recovery.restart import blocks_of, dense_blocks, extended, rebuilt, truncated


@pytest.mark.parametrize("kind", CASES)
def test_chains_change_their_rank_exactly(kind: str) -> None:
    """At full rank the extended chain is the dense layer; one truncation is several in turn."""
    torch.manual_seed(0)
    make, shape = CASES[kind]
    first, second, dense = (module.double() for module in make())
    if second.bias is not None:
        dense.bias = second.bias
    x = torch.randn(shape, dtype=torch.float64)
    U, V = blocks_of((first, second))
    same_rank = rebuilt((first, second), U, V)
    torch.testing.assert_close(same_rank(x), second(first(x)))
    W = dense_blocks((first, second), dense)
    full = extended(U, V, W, min(W.shape[1:]) + V.shape[1])
    torch.testing.assert_close(rebuilt((first, second), *full)(x), dense(x))
    A, values, Bh = torch.linalg.svd(W, full_matrices=False)
    for rank in (2, 1):
        best = A[..., :rank] * values[..., None, :rank] @ Bh[..., :rank, :]
        at_once = truncated(*full, rank)
        in_turns = truncated(*truncated(*full, rank + 1), rank)
        for left, right in (at_once, in_turns):
            torch.testing.assert_close(left @ right, best)
        torch.testing.assert_close(  # balanced
            at_once[0].norm(dim=-2), at_once[1].norm(dim=-1)
        )


def test_a_chain_keeps_what_it_has_when_it_is_extended() -> None:
    torch.manual_seed(0)
    U, V, W = torch.randn(1, 6, 2), torch.randn(1, 2, 5), torch.randn(1, 6, 5)
    left, right = extended(U, V, W, 3)
    assert torch.equal(left[..., :2], U) and torch.equal(right[:, :2], V)
    assert (W - left @ right).norm() < (W - U @ V).norm()
    assert extended(U, V, W, 2) == (U, V)


def test_ranks_fall_to_those_of_the_network() -> None:
    assert [falling_ranks(10, 0.8, steps) for steps in (2, 1, 0)] == [16, 13, 10]
    job, ranks = regression(), list[dict[str, int]]()
    before = chain_ranks(job.network)

    def on_member(number: int) -> None:
        ranks.append(chain_ranks(job.network))

    recipe = Progressive(epochs=6, members=3, factor=0.5, batch_size=16, speed="plain")
    forms = {name: tuple(x.shape) for name, x in state(job.network).items()}
    report = run_recipe(recipe, job, on_member=on_member)
    assert len(ranks) == 3 and ranks[-1] == before and report.steps == 3 * 2 * 6
    assert all(a[p] >= b[p] for a, b in zip(ranks, ranks[1:], strict=False) for p in before)
    assert sum(ranks[0].values()) > sum(ranks[-1].values())
    assert {name: tuple(x.shape) for name, x in state(job.network).items()} == forms


@pytest.mark.parametrize("kind", JOBS)
def test_a_family_resumes_in_its_second_member(kind: str, tmp_path: Path) -> None:
    recipe = Progressive(
        epochs=4, members=2, batch_size=16, learning_rate=0.01, optimizer="adamw", speed="plain"
    )
    whole = JOBS[kind]()
    before = loss_of(whole, whole.network)
    total = run_recipe(recipe, whole).steps
    assert loss_of(whole, whole.network) < before

    def interrupt(step: int, total: int, loss: float) -> None:
        if step == 3 * total // 4 + 1:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, replace(JOBS[kind](), checkpoint=path), on_step=interrupt)
    resumed, steps = replace(JOBS[kind](), checkpoint=path), list[int]()
    report = run_recipe(recipe, resumed, on_step=lambda step, total, loss: steps.append(step))
    assert steps[0] == 3 * total // 4 + 1 and report.steps == total
    assert same(state(resumed.network), state(whole.network))


def test_a_shared_layer_stays_shared() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 12)
    dense = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(12, 3)).eval()
    thin = nn.Sequential(nn.Linear(12, 4, bias=False), nn.Linear(4, 12))
    job = regression()
    network = nn.Sequential(thin, nn.Tanh(), thin, copy.deepcopy(dense[3]))
    run_recipe(
        Progressive(epochs=2, members=2, batch_size=16, speed="plain"),
        replace(job, network=network, dense=dense),
    )
    assert network[0] is network[2] and network[0] is not thin
    x: Tensor = job.data.batch()[0]
    assert network(x).isfinite().all()
