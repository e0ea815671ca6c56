"""Refits block by block: closed forms, files, and a comparison with those of whole passes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import (
    LENGTH,
    TinyGpt,
    batches_of,
    samples_of,
    tiny_llama,
    tiny_mixtral,
    tiny_space,
)
from torch import nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression import block_refit
from rankNAS.compression.block_refit import BlockRefit
from rankNAS.compression.factor_store import FactorStore
from rankNAS.compression.factorisation import Factorisation, OneLayer
from rankNAS.compression.reconstruction import refit_sequentially
from rankNAS.compression.site_moments import Pairs, site_moments, transfer
from rankNAS.compression.streaming import factorise_streamed
from rankNAS.tasks.feeding import InputBatches

SAMPLES = 64


def made(model: nn.Module, folder: Path) -> tuple[Factorisation, InputBatches, Allocation]:
    samples = samples_of(SAMPLES, padded=True)
    batches, task = batches_of(samples, model, size=4)
    store = FactorStore(folder, "key")
    each = OneLayer(model, "fisher", store=store)
    found = factorise_streamed(tiny_space(model, samples), batches, task, each, store)
    choices = {
        name: DENSE if number % 5 == 4 else Choice("svd", (4,))
        for number, name in enumerate(found.space.layers)
    }
    return found, batches, Allocation.of(choices)


def distance(network: nn.Module, dense: nn.Module, batches: InputBatches) -> float:
    """The squared difference of the outputs at the positions that count."""
    total = 0.0
    for number in range(len(batches)):
        with torch.no_grad():
            a, b = (batches[number].run(m) for m in (network, dense))
        a, b = (getattr(y, "logits", y) for y in (a, b))
        mask = batches.mask(number)
        assert mask is not None
        total += float((a - b)[mask].square().sum())
    return total


@pytest.mark.parametrize("make", [tiny_llama, TinyGpt])
def test_refits_help_as_much_as_those_of_whole_passes(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    found, batches, allocation = made(model, tmp_path)
    refit = BlockRefit.of(found, batches)
    assert refit is not None
    done: list[int] = []
    refitted = refit.factors(allocation, lambda number, total: done.append(number))
    assert done == list(range(1, len(allocation) + 1))
    network = refitted.materialise(allocation)
    plain, new, old = (
        distance(x.materialise(allocation), model, batches)
        for x in (found, refitted, refit_sequentially(found, allocation, batches))
    )
    assert new < 0.9 * plain
    assert new < 1.1 * old
    called = distance(refitted.made_when_called(allocation), model, batches)
    assert called == pytest.approx(distance(network, model, batches), rel=1e-3)
    dense = next(name for name, choice in allocation.items() if choice == DENSE)
    changed = network.get_submodule(dense).weight
    assert not torch.equal(changed, model.get_submodule(dense).weight)  # type: ignore[arg-type]


class Plain(TinyGpt):
    """Its blocks are linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = nn.functional.leaky_relu(block(x), 0.3)
        return self.norm(x) @ self.embedding.weight.T


def test_a_layer_may_be_a_block_of_its_own(tmp_path: Path) -> None:
    model = Plain().eval()
    found, batches, allocation = made(model, tmp_path)
    refit = BlockRefit.of(found, batches)
    assert refit is not None and len(refit.chain) == 3  # the last one stays dense
    plain, new, old = (
        distance(x.materialise(allocation), model, batches)
        for x in (found, refit.factors(allocation), refit_sequentially(found, allocation, batches))
    )
    assert new < plain
    assert new < 1.1 * old


def test_experts_are_refitted_on_their_own_tokens(tmp_path: Path) -> None:
    model = tiny_mixtral()
    found, batches, allocation = made(model, tmp_path)
    refit = BlockRefit.of(found, batches)
    assert refit is not None
    network = refit.factors(allocation).materialise(allocation)
    plain, new, old = (
        distance(x, model, batches)
        for x in (
            found.materialise(allocation),
            network,
            refit_sequentially(found, allocation, batches).materialise(allocation),
        )
    )
    # Most of the distance comes from tokens that go to other experts.
    assert new < plain and new < 1.1 * old


def test_a_refit_that_was_killed_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    found, batches, allocation = made(model, tmp_path / "a")
    other, _, _ = made(model, tmp_path / "b")
    whole, part = (BlockRefit.of(x, batches) for x in (found, other))
    assert whole is not None and part is not None
    expected = whole.factors(allocation).materialise(allocation)
    original, calls = block_refit.site_moments, itertools.count()

    def killed(pairs: Any) -> Any:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return original(pairs)

    monkeypatch.setattr(block_refit, "site_moments", killed)
    with pytest.raises(KeyboardInterrupt):
        part.factors(allocation)
    monkeypatch.setattr(block_refit, "site_moments", original)
    network = part.factors(allocation).materialise(allocation)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


def test_the_dense_network_runs_each_block_once(tmp_path: Path) -> None:
    model = tiny_llama()
    found, batches, allocation = made(model, tmp_path)
    refit = BlockRefit.of(found, batches)
    assert refit is not None
    calls = {True: 0, False: 0}  # by whether the dense network was called, or a copy
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")

    def count(module: nn.Module, args: Any) -> None:
        calls[module is layer] += 1

    handle = layer.register_forward_pre_hook(count)
    refit.factors(allocation)
    handle.remove()
    used = -(-block_refit.PER_COLUMN * 32 // (4 * LENGTH))  # of the batches, for 32 columns
    assert calls[True] == used < len(batches)
    assert calls[False] <= used  # later it is a decomposed layer


def test_the_map_of_a_site_is_the_least_squares_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    q = x @ torch.randn(6, 6, generator=generator) + 0.1 * torch.randn(400, 6, generator=generator)
    moments = site_moments((x[i : i + 50], q[i : i + 50]) for i in range(0, 400, 50))
    assert moments is not None and moments.held.count == 100
    pairs: Pairs = moments.all
    W = torch.randn(3, 6, generator=generator).double()
    T = transfer(pairs, 1e-9, centred=False)
    expected = torch.linalg.lstsq(q.double(), x.double() @ W.T).solution.T
    torch.testing.assert_close(W @ T, expected, rtol=1e-4, atol=1e-5)
    far = transfer(pairs, 1e9, centred=False)
    torch.testing.assert_close(W @ far, W, rtol=1e-4, atol=1e-5)


def test_shrinkage_is_chosen_by_all_layers_of_a_site() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=generator)
    noise = torch.randn(4000, 5, generator=generator)
    exact = site_moments([(x[i : i + 500], 2 * x[i : i + 500]) for i in range(0, 4000, 500)])
    random = site_moments([(x[i : i + 20], noise[i : i + 20]) for i in range(0, 160, 20)])
    assert exact is not None and random is not None
    needs = [torch.eye(5)]
    assert exact.shrinkage(needs, centred=False) < random.shrinkage(needs, centred=False)
