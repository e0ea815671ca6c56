from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.data.samples import Samples
from rankNAS.exceptions import UsageError
from rankNAS.recovery import refinement
from rankNAS.recovery.blocks import JoinedBlocks
from rankNAS.recovery.config import Refinement
from rankNAS.recovery.refinement import Refiner, refine
from rankNAS.recovery.splitting import paired_blocks
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.settings import Settings
from rankNAS.tasks.base import Task
from rankNAS.tasks.infer import infer_task
from rankNAS.tasks.language import CausalLanguageModelling
from rankNAS.trees import Inputs

CONFIG = Refinement(samples=96, blocks=1, steps=30, learning_rate=3e-3, batch_size=12)


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.drop(self.relu(self.norm(self.conv1(x)))))
        return torch.relu(y + x)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        Residual(12),
        Residual(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 6),
    ).eval()


class Layer(nn.Module):
    """A feed-forward layer that returns a tuple, as those of many transformers do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        y = self.down(torch.tanh(self.up(self.norm(x))))
        return x + (y if mask is None else y * mask[..., None]), None


class Tokens(nn.Module):
    """A language model whose forward pass depends on values, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([Layer(16) for _ in range(3)])
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if x.abs().max() > 1e6:
            raise ValueError("too large")
        mask = (tokens >= 0).to(x.dtype)
        for layer in self.layers:
            x = layer(x.cumsum(1) / 4 if layer is self.layers[2] else x, mask=mask)[0]
        return self.head(self.mix(x))


def images(count: int = 96, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 6, (count,), generator=generator)


def compressed(model: nn.Module, data: Any, keep: float = 0.3) -> tuple[Factorisation, nn.Module]:
    """The factors of a model, and its network with about a share of each layer's ranks."""
    x = data[0] if isinstance(data, tuple) else data
    space = compile_space(model, x[:1], min_weights=1, keep_output_dense=False)
    norm = "input"
    factors = factorise(model, space, calibrate(model, space, x, norm="input"), norm=norm)
    choices = {}
    for name, layer in space.layers.items():
        choices[name] = layer.choices[max(1, int((1 - keep) * len(layer.choices)))]
    return factors, factors.materialise(Allocation.of(choices)).eval()


def task_of(model: nn.Module, data: Any) -> Task:
    return infer_task(model, data)


def divergence(network: nn.Module, model: nn.Module, data: Any, task: Task) -> float:
    with torch.no_grad():
        found, expected = (task.run(m, data) for m in (network, model))
        return float(found.distillation(expected))


def refined(
    factors: Factorisation,
    network: nn.Module,
    data: Any,
    task: Task,
    config: Refinement = CONFIG,
    **options: Any,
) -> nn.Module:
    layers = {name: layer.paths for name, layer in factors.space.layers.items()}
    samples = Samples.of(data)
    return refine(network, factors.model, layers, samples, task, config, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(x, other[name]) for name, x in first.state_dict().items())


def clean(network: nn.Module) -> None:
    """Nothing of the refinement is left in a network but its weights."""
    assert not any(module.training for module in network.modules())
    assert all(p.grad is None and p.is_leaf for p in network.parameters())
    assert all(p.is_contiguous() for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_refined_network_is_closer_to_the_dense_one_on_other_samples() -> None:
    model, data = convolutional(), images()
    task = task_of(model, data)
    factors, network = compressed(model, data)
    dense, other = state(factors.model), images(200, seed=2)
    before = divergence(network, model, other, task)
    random = torch.random.get_rng_state()
    steps: list[tuple[int, int]] = []
    found = refined(factors, network, data, task, on_step=lambda *step: steps.append(step))
    assert found is network and divergence(network, model, other, task) < 0.8 * before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(x, dense[name]) for name, x in factors.model.state_dict().items())
    assert steps[-1] == (120, 120) and [done for done, _ in steps] == sorted(d for d, _ in steps)
    assert network[1].relu.inplace
    clean(network)
    clean(factors.model)


def test_joined_blocks_end_with_the_network() -> None:
    model, data = convolutional(), images()
    task = task_of(model, data)
    factors, network = compressed(model, data)
    paths = {name: layer.paths for name, layer in factors.space.layers.items()}
    x = Inputs.of(data[0][:2])
    found = paired_blocks(copy.deepcopy(model), network, paths, x)
    assert found is not None
    blocks = JoinedBlocks(found[0], 3)
    assert blocks.names == ["0", "5"]
    with torch.no_grad():
        state = blocks.first(x)
        output, state = blocks.advance(0, state, x)
        assert torch.equal(output, model[:5](data[0][:2]))
        assert torch.equal(blocks.run(1, state, x), model(data[0][:2]))
    assert len(blocks.graph(x)[0]) == 1
    before = divergence(network, model, data, task)
    refined(factors, network, data, task, replace(CONFIG, blocks=3))
    assert divergence(network, model, data, task) < 0.8 * before


def test_equal_seeds_give_equal_weights_and_labels_do_not_matter() -> None:
    model, (x, y) = convolutional(), images()
    task = task_of(model, (x, y))
    factors, network = compressed(model, (x, y))
    first, second, third = (copy.deepcopy(network) for _ in range(3))
    refined(factors, first, (x, y), task)
    refined(factors, second, (x, (y + 1) % 6), task)
    refined(factors, third, (x, y), task, seed=1)
    assert same(first, second) and not same(first, third) and not same(first, network)


@pytest.mark.parametrize("stop", [10, 70, 119])
def test_an_interrupted_refinement_continues_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    model, data = convolutional(), images()
    task = task_of(model, data)
    factors, network = compressed(model, data)
    whole, resumed = copy.deepcopy(network), copy.deepcopy(network)
    refined(factors, whole, data, task)
    path = tmp_path / "refine.pt"

    def interrupt(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refined(factors, resumed, data, task, checkpoint=path, on_step=interrupt)
    assert same(resumed, network) and path.exists() == (stop > 30)
    steps: list[int] = []
    seen = lambda done, total: steps.append(done)  # noqa: E731
    refined(factors, resumed, data, task, checkpoint=path, on_step=seen)
    assert same(resumed, whole) and min(steps) == stop // 30 * 30 + 1
    again, steps = copy.deepcopy(network), []
    refined(factors, again, data, task, checkpoint=path, on_step=lambda *step: steps.append(1))
    assert same(again, whole) and not steps


def test_a_damaged_checkpoint_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = convolutional(), images()
    task = task_of(model, data)
    factors, network = compressed(model, data)
    whole = refined(factors, copy.deepcopy(network), data, task)
    path = tmp_path / "refine.pt"
    path.write_bytes(b"damaged")
    assert same(refined(factors, network, data, task, checkpoint=path), whole)
    assert "begins anew" in caplog.text


def test_a_refinement_that_diverges_keeps_the_factors_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, data = convolutional(), images()
    task = task_of(model, data)
    factors, network = compressed(model, data)
    before = copy.deepcopy(network)
    refined(factors, network, data, task, replace(CONFIG, learning_rate=1e30))
    assert same(network, before) and "diverged" in caplog.text
    clean(network)


def test_what_does_not_help_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, data = convolutional(), images()
    task = task_of(model, data)
    factors, network = compressed(model, data)
    before = copy.deepcopy(network)
    refined(factors, network, data, task, replace(CONFIG, learning_rate=30.0, steps=3))
    assert same(network, before) and "diverged" not in caplog.text
    dense = factors.materialise(factors.space.dense)
    whole = copy.deepcopy(dense)
    assert same(refined(factors, dense, data, task), whole)


def test_frozen_parameters_stay_frozen() -> None:
    model, data = convolutional(), images()
    task = task_of(model, data)
    factors, network = compressed(model, data)
    frozen = [network[1].norm.weight, network[2].conv2]
    frozen = [p for f in frozen for p in (f.parameters() if isinstance(f, nn.Module) else [f])]
    kept = [p.detach().clone() for p in frozen]
    for p in frozen:
        p.requires_grad_(False)
    before = copy.deepcopy(network)
    assert not same(refined(factors, network, data, task), before)
    assert all(
        torch.equal(p, k) and not p.requires_grad for p, k in zip(frozen, kept, strict=True)
    )
    assert all(p.requires_grad for p in network[1].conv1.parameters())


def test_a_model_that_cannot_be_traced_is_refined_by_its_modules() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    tokens = torch.randint(0, 20, (96, 7), generator=torch.Generator().manual_seed(1))
    task = CausalLanguageModelling().bound(tokens, model)
    factors, network = compressed(model, tokens)
    paths = {name: layer.paths for name, layer in factors.space.layers.items()}
    found = paired_blocks(model, network, paths, Inputs.of(tokens[:2]))
    assert found is not None
    assert found[0].names == ["layers.0", "layers.1", "layers.2", "mix", "head"]
    assert found[0]._links == [False, True, False, False, True]  # type: ignore[attr-defined]
    before = divergence(network, model, tokens, task)
    refined(factors, network, tokens, task)
    assert divergence(network, model, tokens, task) < 0.9 * before
    clean(network)
    clean(model)


def test_blocks_are_the_shortest_segments_with_a_layer() -> None:
    model, data = convolutional(), images()
    factors, network = compressed(model, data)
    paths = {name: layer.paths for name, layer in factors.space.layers.items()}
    found = paired_blocks(copy.deepcopy(model), network, paths, Inputs.of(data[0][:2]))
    assert found is not None and found[0].ends_network
    assert found[0].names == ["0", "1.conv1", "2.conv1", "5"]
    for blocks in found:
        own = [p for k in range(4) for p in blocks.parameters(k)]
        assert len(set(map(id, own))) == len(own)
    assert sum(len(found[1].parameters(k)) for k in range(4)) == len(list(network.parameters()))


def test_a_layer_that_two_blocks_share_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))
            return found

    torch.manual_seed(0)
    model = Shared().eval()
    data = torch.randn(96, 16), torch.randn(96, 4)
    factors, network = compressed(model, data)
    before = copy.deepcopy(network)
    refined(factors, network, data, task_of(model, data))
    assert same(network.get_submodule("first"), before.get_submodule("first"))
    assert not same(network, before)


def regression(dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Linear(16, 3))
    data = torch.randn(96, 16).to(dtype), torch.randn(96, 3).to(dtype)
    return model.to(dtype).eval(), data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_regression_in_any_precision(dtype: torch.dtype) -> None:
    model, data = regression(dtype)
    task = task_of(model, data)
    factors, network = compressed(model, data)
    before = divergence(network, model, data, task)
    refined(factors, network, data, task)
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert divergence(network, model, data, task) < 0.9 * before


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_samples_than_a_batch(count: int, caplog: pytest.LogCaptureFixture) -> None:
    model, data = regression(torch.float32)
    factors, network = compressed(model, data)
    before = copy.deepcopy(network)
    few = data[0][:count], data[1][:count]
    found = refined(factors, network, few, task_of(model, data))
    assert all(p.isfinite().all() for p in found.parameters())
    assert ("two samples are needed" in caplog.text) == (count == 1)
    assert count > 1 or same(network, before)


def test_memory_bounds_the_samples(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model, data = regression(torch.float32)
    factors, network = compressed(model, data)
    monkeypatch.setattr(refinement, "MEMORY", 2 * 40 * 24 * 4)
    refined(factors, network, data, task_of(model, data))
    assert "40 of 96 samples" in caplog.text


def test_samples_of_unequal_length() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    lengths: Sequence[int] = [4, 6, 9] * 20
    tokens = [torch.randint(0, 20, (n,)) for n in lengths]
    task = CausalLanguageModelling().bound(tokens[0][None], model)
    factors, network = compressed(model, torch.stack([t[:4] for t in tokens]))
    before = copy.deepcopy(network)
    refined(factors, network, tokens, task)
    assert not same(network, before)


def test_a_refiner_stores_its_progress_under_the_network_and_the_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path))
    model, data = regression(torch.float32)
    factors, network = compressed(model, data)
    stages: list[tuple[str, int, int]] = []
    refiner = Refiner(
        Samples.of(data), task_of(model, data), CONFIG, 0, lambda *stage: stages.append(stage)
    )
    for found in (refiner, refiner, replace(refiner, seed=1)):
        found.refine(copy.deepcopy(network), factors, "cpu")
    assert len(list(tmp_path.rglob("refine-*.pt"))) == 2
    assert stages[-1] == ("refine", 90, 90) and len(stages) == 2 * (90 + 3)


def test_wrong_settings_are_refused() -> None:
    for wrong in (
        {"samples": 1},
        {"blocks": 0},
        {"steps": 0},
        {"learning_rate": 0.0},
        {"batch_size": 0},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Refinement(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be a Refinement"):
        Settings(refine=True)  # type: ignore[arg-type]
