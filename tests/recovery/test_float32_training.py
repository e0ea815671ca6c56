"""Networks in 16 bits are trained as those in 32 bits are, and rounded at the end."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from recipe_jobs import classification, language, same, state
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from rankNAS.data.samples import Samples
from rankNAS.exceptions import UsageError
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.lora import Lora
from rankNAS.recovery.precision import in_float32
from rankNAS.recovery.recipe import Job, make_recipe
from rankNAS.recovery.recover import run_recipe
from rankNAS.recovery.trainer import train

HALF = (torch.bfloat16, torch.float16)


class Widening(nn.Module):
    """A network in float32, whatever its inputs are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x.float())


def pair(job: Job, dtype: torch.dtype) -> tuple[Job, Job]:
    """The job of a network and of data in 16 bits, and the same in float32."""
    network = copy.deepcopy(job.network).to(dtype)
    if job.language:
        return replace(job, network=network), replace(job, network=copy.deepcopy(network).float())
    assert job.dense is not None
    x, y = (torch.stack(p) for p in zip(*(job.data[i] for i in range(len(job.data))), strict=True))
    rounded, dense = x.to(dtype), Widening(job.dense)
    half, single = (Samples.of(TensorDataset(t, y)) for t in (rounded, rounded.float()))
    return (
        replace(job, network=network, data=half, dense=dense),
        replace(job, network=copy.deepcopy(network).float(), data=single, dense=dense),
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("recipe", ["distil", "freeze", "plain"])
def test_small_steps_are_not_lost(recipe: str, dtype: torch.dtype) -> None:
    half, single = pair(classification(), dtype)
    before = state(half.network)
    text = f"{recipe}:epochs=2,lr=1e-3,optimizer=adamw,speed=plain"
    run_recipe(make_recipe(text), half)
    run_recipe(make_recipe(text), single)
    assert not same(before, state(half.network))
    assert same(state(half.network), state(single.network.to(dtype)))


def test_the_trainer_widens_too() -> None:
    half, single = pair(classification(), torch.bfloat16)
    config = TrainingConfig(2, batch_size=32, learning_rate=1e-3)
    for job in (half, single):
        train(job.network, job.data, config, task=job.task)
    assert same(state(half.network), state(single.network.bfloat16()))


def test_adapters_have_32_bits_and_weights_keep_16() -> None:
    half, single = pair(language(), torch.bfloat16)
    recipe = Lora(epochs=2, learning_rate=1e-3, vectors=False, speed="plain")
    before = state(half.network)
    types: list[torch.dtype] = []
    watch = half.network.register_forward_hook(
        lambda network, args, output: types.extend(p.dtype for p in network.parameters())
    )
    run_recipe(recipe, half)
    watch.remove()
    assert {torch.float32, torch.bfloat16} == set(types)
    run_recipe(recipe, single)
    moved = {n: single.network.state_dict()[n] - x.float() for n, x in before.items()}
    assert any(float(x.norm()) > 0 for x in moved.values())
    for name, x in half.network.state_dict().items():
        assert x.dtype == torch.bfloat16
        wanted = before[name].float() + moved[name]
        rounding = torch.finfo(torch.bfloat16).eps * wanted.abs()
        excess = ((x.float() - wanted).abs() - rounding).clamp(min=0)
        assert excess.norm() <= 0.2 * moved[name].norm()  # the passes are in 16 bits


def test_types_come_back_after_an_error_and_tied_weights_stay_tied() -> None:
    network = nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.Linear(4, 9, bias=False))
    network[2].weight = network[0].weight
    network.half()
    network[1].float()
    types = {name: x.dtype for name, x in network.state_dict().items()}
    with pytest.raises(UsageError), in_float32(network):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert network[2].weight is network[0].weight
        raise UsageError("a training has failed")
    assert {name: x.dtype for name, x in network.state_dict().items()} == types
    assert network[2].weight is network[0].weight and not network._forward_pre_hooks
