"""Sequential freezing: what is frozen does not move by a bit, and both groups are trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recipe_jobs import classification, regression, same, state
from torch import Tensor, nn

from rankNAS.recovery.freeze import Freeze, Freezing
from rankNAS.recovery.loop import Loop
from rankNAS.recovery.recover import run_recipe


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_frozen_factors_do_not_move_by_a_bit(optimizer: str, decay: float) -> None:
    """Neither by the momentum of an epoch in which they were trained, nor by a decay."""
    job = classification()
    groups = Freezing(job.network, 1).groups
    assert [len(group) for group in groups] == [2, 2] or len(groups[0]) >= 2
    snapshots = [[p.detach().clone() for p in group] for group in groups]
    moved: list[list[bool]] = []

    def on_epoch(epoch: int) -> None:
        now = [[p.detach().clone() for p in group] for group in groups]
        pairs = zip(now, snapshots, strict=True)
        moved.append([any(not torch.equal(a, b) for a, b in zip(*g, strict=True)) for g in pairs])
        snapshots[:] = now

    recipe = Freeze(
        epochs=5, batch_size=16, optimizer=optimizer, decay=decay, ema=0.0, speed="plain"
    )
    run_recipe(recipe, job, on_epoch=on_epoch)
    # The second factor in even epochs, the first in odd ones.
    assert moved == [[False, True], [True, False], [False, True], [True, False], [False, True]]
    assert all(p.requires_grad for p in job.network.parameters())


def test_a_period_of_several_epochs() -> None:
    job, turns = regression(), list[bool]()
    freezing = Freezing(job.network, 2)
    for epoch in range(6):
        freezing.begin_epoch(epoch)
        turns.append(freezing.groups[0][0].requires_grad)
    assert turns == [False, False, True, True, False, False]


def test_of_three_factors_the_core_is_one_group() -> None:
    tucker = nn.Sequential(
        nn.Conv2d(6, 3, 1, bias=False), nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 1)
    )
    network = nn.Sequential(tucker, nn.ReLU(), nn.Conv2d(5, 2, 1))
    outer, core = Freezing(network, 1).groups
    assert [id(p) for p in outer] == [id(tucker[0].weight), id(tucker[2].weight)]
    assert [id(p) for p in core] == [id(tucker[1].weight)]


def test_a_frozen_factor_has_no_gradient_and_all_thaw_after_an_error() -> None:
    job = regression()
    seen: list[list[bool]] = []
    original = Loop.loss_of

    def watched(self: Loop, *arguments: object) -> Tensor:
        seen.append([p.grad is None for p in job.network[0].parameters()])
        return original(self, *arguments)  # type: ignore[arg-type]

    recipe = Freeze(epochs=2, batch_size=16, speed="plain")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "loss_of", watched)

        def interrupt(step: int, total: int, loss: float) -> None:
            if step == 4:
                raise KeyboardInterrupt

        run_recipe(recipe, job, on_step=interrupt)
    assert seen[-1] == [True, False, False]  # first factor, second, bias
    assert all(p.requires_grad for p in job.network.parameters())
    kept = state(job.network)
    assert same(kept, state(replace(job).network))
