"""Refinement block by block, in the walk of the refit, with weights in files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import TinyGpt, batches_of, samples_of, tiny_llama, tiny_mixtral, tiny_space
from tiny_transformers import VOCABULARY, tiny
from torch import nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.activations import ActivationCache
from rankNAS.compression.block_refit import BlockRefit
from rankNAS.compression.blocks import BlockChain
from rankNAS.compression.factor_store import FactorStore
from rankNAS.compression.factorisation import Factorisation, OneLayer
from rankNAS.compression.streaming import factorise_streamed
from rankNAS.data.samples import Samples
from rankNAS.engine import search
from rankNAS.recovery import streamed_refinement
from rankNAS.recovery.block_descent import BlockDescent
from rankNAS.recovery.block_gradients import chain_gradients
from rankNAS.recovery.config import Refinement
from rankNAS.recovery.streamed_refinement import refine_streamed
from rankNAS.settings import Settings
from rankNAS.tasks.base import Task
from rankNAS.trees import rows

CONFIG = Refinement(samples=96, steps=60, batch_size=8, learning_rate=3e-3)


def made(
    model: nn.Module, folder: Path, dense: int = 5
) -> tuple[Factorisation, BlockRefit, Allocation, Samples, Task]:
    samples = samples_of(64, padded=True)
    batches, task = batches_of(samples, model, size=4)
    store = FactorStore(folder, "key")
    each = OneLayer(model, "fisher", store=store)
    found = factorise_streamed(tiny_space(model, samples), batches, task, each, store)
    choices = {
        name: DENSE if number % dense == dense - 1 else Choice("svd", (4,))
        for number, name in enumerate(found.space.layers)
    }
    refit = BlockRefit.of(found, batches)
    assert refit is not None
    return found, refit, Allocation.of(choices), samples_of(128, padded=True, seed=2), task


@torch.no_grad()
def divergences(model: nn.Module, task: Task, *networks: nn.Module) -> list[float]:
    """Of networks from the dense model, on new samples."""
    batch = samples_of(64, padded=True, seed=3).batch()
    expected = task.run(model, batch)
    return [float(task.run(network, batch).distillation(expected)) for network in networks]


@pytest.mark.parametrize("make", [tiny_llama, TinyGpt, tiny_mixtral])
def test_refined_networks_are_closer_to_the_dense_one(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    _, refit, allocation, data, task = made(model, tmp_path)
    plain = refit.factors(allocation).materialise(allocation)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    steps: list[int] = []
    refined = refine_streamed(
        plain, refit, allocation, data, task, CONFIG, on_step=lambda done, _: steps.append(done)
    )
    assert refined is not plain
    first, second = divergences(model, task, plain, refined)
    assert second < 0.95 * first
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert steps == sorted(steps) and steps[-1] == CONFIG.steps * len(refit.chain)
    assert [p.numel() for p in refined.parameters()] == [p.numel() for p in plain.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_has_masters_in_single_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().to(torch.bfloat16)
    _, refit, allocation, data, task = made(model, tmp_path)
    plain = refit.factors(allocation).materialise(allocation)
    types: set[torch.dtype] = set()
    original = BlockDescent.improve

    def noted(self: Any, number: int, name: str, own: list[nn.Parameter], error: Any) -> bool:
        types.update(p.dtype for p in own)
        return original(self, number, name, own, error)

    monkeypatch.setattr(BlockDescent, "improve", noted)
    refined = refine_streamed(plain, refit, allocation, data, task, CONFIG)
    assert types == {torch.float32}
    assert {p.dtype for p in refined.parameters()} == {torch.bfloat16}
    first, second = divergences(model, task, plain, refined)
    assert second < first


def test_a_refinement_that_was_killed_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    networks = []
    original, calls = BlockDescent.improve, itertools.count()
    trained: list[int] = []

    def killed(self: Any, number: int, *arguments: Any) -> bool:
        if next(calls) == 5:  # in the third block of the second refinement
            raise KeyboardInterrupt
        trained.append(number)
        return original(self, number, *arguments)

    monkeypatch.setattr(BlockDescent, "improve", killed)
    for folder in ("whole", "part"):
        _, refit, allocation, data, task = made(model, tmp_path / folder)
        plain = refit.factors(allocation).materialise(allocation)
        work = [plain, refit, allocation, data, task, CONFIG]
        if folder == "part":
            with pytest.raises(KeyboardInterrupt):
                refine_streamed(*work)  # type: ignore[arg-type]
        networks.append(refine_streamed(*work))  # type: ignore[arg-type]
    assert trained == [0, 1, 2, 0, 1, 2]
    first, second = networks
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    refine_streamed(*work)  # type: ignore[arg-type]
    assert len(trained) == 6  # all of it is stored


def test_blocks_that_get_worse_keep_their_factors(tmp_path: Path) -> None:
    model = tiny_llama()
    _, refit, allocation, data, task = made(model, tmp_path)
    plain = refit.factors(allocation).materialise(allocation)
    wild = Refinement(samples=32, steps=5, batch_size=8, learning_rate=30.0)
    assert refine_streamed(plain, refit, allocation, data, task, wild) is plain


def test_gradients_at_blocks_are_those_of_a_whole_pass(tmp_path: Path) -> None:
    model = tiny_llama()
    samples = samples_of(6, padded=True)
    batches, task = batches_of(samples, model)
    chain = BlockChain.of(
        model, tiny_space(model, samples).layers, rows(batches[0], slice(0, 1), 2)
    )
    assert chain is not None
    found = chain_gradients(chain, batches, range(3), task, ActivationCache(tmp_path, 0), seed=5)
    generator = torch.Generator().manual_seed(5)
    sums = [torch.zeros(16, 16, dtype=torch.float64) for _ in range(3)]
    outputs: list[torch.Tensor] = []
    for block in chain.blocks:
        block.register_forward_hook(lambda m, a, y: outputs.append(y))
    for i in range(3):
        outputs.clear()
        prediction = task.predict(batches[i].run(model), batches.batch(i))
        gradients = torch.autograd.grad(prediction.sampled_loss(generator), outputs)
        for total, gradient in zip(sums, gradients, strict=True):
            flat = gradient.reshape(-1, 16).double()
            total += flat.mT @ flat
    for moment, expected in zip(found, sums, strict=True):
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-9)


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are trained at once, and of activations outside of files."""
    original = BlockDescent.improve
    most = [0, 0]
    caches: list[ActivationCache] = []
    put = ActivationCache.put

    def noted(self: Any, number: int, name: str, own: list[nn.Parameter], error: Any) -> bool:
        most[0] = max(most[0], sum(p.nbytes for p in own))
        return original(self, number, name, own, error)

    def counted(self: ActivationCache, key: Any, tree: Any) -> None:
        put(self, key, tree)
        caches.append(self)
        most[1] = max(most[1], self.nbytes)

    monkeypatch.setattr(BlockDescent, "improve", noted)
    monkeypatch.setattr(ActivationCache, "put", counted)
    monkeypatch.setattr(ActivationCache.__init__, "__defaults__", (2000,))
    found = []
    for blocks in (2, 4):
        model = TinyGpt(blocks).eval()
        _, refit, allocation, data, task = made(model, tmp_path / str(blocks), dense=99)
        plain = refit.factors(allocation).materialise(allocation)
        most[0] = 0
        refine_streamed(plain, refit, allocation, data, task, CONFIG)
        found.append(most[0])
    assert found[0] == found[1] > 0
    assert most[1] <= 2000


@pytest.mark.parametrize("sequential", [True, False])
def test_a_streamed_search_refines_its_network(
    sequential: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (90, 24), generator=generator)
    items = [{"input_ids": x} for x in ids]
    work: list[int] = []
    original = streamed_refinement.StreamedRefinement.work

    def noted(self: Any, walk: Any, number: int, *arguments: Any) -> None:
        work.append(number)
        original(self, walk, number, *arguments)

    monkeypatch.setattr(streamed_refinement.StreamedRefinement, "work", noted)
    model = tiny("llama")
    study = search(
        model,
        (items[:80], items[80:]),
        task="causal_lm",
        strategy="solve",
        n_trials=1,
        budget={"layer_params": 0.5},
        settings=Settings(
            calibration=32,
            validation=8,
            memory=1,
            sequential=sequential,
            refine=Refinement(samples=48, steps=20, batch_size=8),
        ),
    )
    network = study.materialise()
    assert work == [0, 1]
    plain = study.evaluator.network(study.best.allocation, trained=False)
    before, after = (
        study.measure(x, study.splits.validation)["kl_divergence"] for x in (plain, network)
    )
    assert after < before
