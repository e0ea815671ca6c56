"""Statistics and factors block by block equal those of whole passes."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import TinyGpt, batches_of, samples_of, tiny_llama, tiny_mixtral, tiny_space
from torch import nn

from rankNAS.compression import activations, blocks, streaming
from rankNAS.compression.accumulators import MomentAccumulator
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factor_store import FactorStore
from rankNAS.compression.factorisation import Factorisation, OneLayer, factorise
from rankNAS.compression.factors import LayerFactors
from rankNAS.compression.streaming import factorise_streamed, samples_at_once, statistics_bytes
from rankNAS.decompositions.norms import NormName
from rankNAS.exceptions import WriteError
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.tasks.feeding import InputBatches

Make = Callable[[], nn.Module]


def streamed(
    model: nn.Module, folder: Path, norm: NormName, *, padded: bool = False, count: int = 6
) -> Factorisation:
    samples = samples_of(count, padded=padded)
    batches, task = batches_of(samples, model)
    store = FactorStore(folder, "key")
    each = OneLayer(model, norm, store=store)
    return factorise_streamed(
        tiny_space(model, samples, ("svd", "group_svd")), batches, task, each, store
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm", ["input", "fisher"])
@pytest.mark.parametrize("make", [tiny_llama, TinyGpt, tiny_mixtral])
def test_streamed_factors_equal_those_in_memory(
    make: Make, norm: NormName, padded: bool, tmp_path: Path
) -> None:
    model = make().eval()
    samples = samples_of(6, padded=padded)
    _, task = batches_of(samples, model)
    space = tiny_space(model, samples, ("svd", "group_svd"))
    statistics = calibrate(model, space, samples, task, norm=norm, batch_size=2)
    expected = factorise(model, space, statistics, norm=norm)
    found = streamed(model, tmp_path, norm, padded=padded)
    assert found.space.layers == expected.space.layers
    for name, errors in expected.errors().items():
        assert found.errors()[name] == pytest.approx(errors, rel=1e-5, abs=1e-9)
        assert found.losses()[name] == pytest.approx(expected.losses()[name], rel=1e-5, abs=1e-12)
        for choice in space.layers[name].choices[::5]:
            weight, bias = found.layers[name].folded(choice)
            wanted, wanted_bias = expected.layers[name].folded(choice)
            torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5)
            if wanted_bias is not None:
                torch.testing.assert_close(bias, wanted_bias, rtol=1e-4, atol=1e-5)


def test_with_many_batches_the_first_ones_have_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    samples = samples_of(6, padded=True)
    _, task = batches_of(samples, model)
    space = tiny_space(model, samples, ("svd", "group_svd"))
    some = samples.take(torch.arange(4))
    inputs, gradients = (
        calibrate(model, space, x, task, norm="fisher", batch_size=2) for x in (samples, some)
    )
    statistics = {
        name: replace(
            found,
            output_gradient_second_moment=gradients[name].output_gradient_second_moment,
        )
        for name, found in inputs.items()
    }
    expected = factorise(model, space, statistics, norm="fisher")
    monkeypatch.setattr(streaming, "PER_ROW", 1)  # 32 positions of 24 a batch
    found = streamed(model, tmp_path, "fisher", padded=True)
    for name, errors in expected.errors().items():
        assert found.errors()[name] == pytest.approx(errors, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("norm", ["pooled", "asvd"])
def test_pooled_and_absolute_statistics_are_streamed(norm: NormName, tmp_path: Path) -> None:
    model = TinyGpt().eval()
    samples = samples_of(8)
    batches, task = batches_of(samples, model, size=4)
    space = tiny_space(model, samples)
    store = FactorStore(tmp_path, "key")
    each = OneLayer(model, norm, store=store)
    found = factorise_streamed(space, batches, task, each, store)
    sums = calibrate(model, space, batches, task, norm=norm)
    expected = factorise(model, space, sums, norm=norm)
    for name, errors in expected.errors().items():
        assert found.errors()[name] == pytest.approx(errors, rel=1e-5, abs=1e-9)


def test_moments_of_padded_batches_are_those_of_their_tokens() -> None:
    model = TinyGpt().eval()
    padded, short = samples_of(1, padded=True), samples_of(1)
    ids = short.example(1)["input_ids"][:, :5]
    _, task = batches_of(padded, model)
    space = tiny_space(model, short)
    found = calibrate(model, space, padded, task, norm="fisher")
    alone = calibrate(model, space, batches_of_ids(ids), task, norm="input")
    for name, statistics in alone.items():
        torch.testing.assert_close(
            found[name].input_second_moment, statistics.input_second_moment, rtol=1e-4, atol=1e-6
        )


def batches_of_ids(ids: torch.Tensor) -> InputBatches:
    return InputBatches([{"input_ids": ids}])


@pytest.mark.parametrize("norm", ["input", "fisher"])
def test_a_head_may_be_a_layer(norm: NormName, tmp_path: Path) -> None:
    """It is a block of its own, and its outputs are needed."""
    model = tiny_llama()
    samples = samples_of(6, padded=True)
    batches, task = batches_of(samples, model)
    inputs: Any = samples.example(1)
    policy = RankPolicy(operators=("svd",))
    space = compile_space(model, inputs, policy=policy, min_weights=1, keep_output_dense=False)
    assert "lm_head" in space.layers
    statistics = calibrate(model, space, samples, task, norm=norm, batch_size=2)
    expected = factorise(model, space, statistics, norm=norm).errors()
    store = FactorStore(tmp_path, "key")
    each = OneLayer(model, norm, store=store)
    found = factorise_streamed(space, batches, task, each, store).errors()
    for name, errors in expected.items():
        assert found[name] == pytest.approx(errors, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("norm", ["input", "fisher"])
def test_a_walk_that_was_killed_goes_on_to_the_same_bits(
    make: Make, norm: NormName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    whole = streamed(model, tmp_path / "whole", norm)
    original, calls = OneLayer.factorised, itertools.count()

    def killed(self: OneLayer, layer: Any, known: Any) -> LayerFactors:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return original(self, layer, known)

    monkeypatch.setattr(OneLayer, "factorised", killed)
    with pytest.raises(KeyboardInterrupt):
        streamed(model, tmp_path / "part", norm)
    made = []

    def noted(self: OneLayer, layer: Any, known: Any) -> LayerFactors:
        made.append(layer.name)
        return original(self, layer, known)

    monkeypatch.setattr(OneLayer, "factorised", noted)
    found = streamed(model, tmp_path / "part", norm)
    assert len(made) == len(whole.layers) - 9
    for name, layer in whole.layers.items():
        for choice in layer.layer.choices:
            assert torch.equal(layer.folded(choice)[0], found.layers[name].folded(choice)[0])


def test_layers_with_the_same_input_share_its_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = []
    original = MomentAccumulator.__init__

    def counted(self: Any, layer: Any, generator: Any, inputs: Any = None, **kwargs: Any) -> None:
        own.append(layer.name if inputs is None else None)
        original(self, layer, generator, inputs, **kwargs)

    monkeypatch.setattr(MomentAccumulator, "__init__", counted)
    streamed(tiny_llama(2), tmp_path, "input")
    names = {name.rpartition(".")[2] for name in own if name is not None}
    assert names == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    assert own.count(None) == 2 * 3


def test_the_sums_of_one_block_exist_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of all accumulators, counted whenever a layer is factorised."""
    most = [0]

    def walk(blocks: int) -> int:
        most[0] = 0
        streamed(TinyGpt(blocks).eval(), tmp_path / str(blocks), "fisher")
        return most[0]

    factorised = OneLayer.factorised

    def measured(self: OneLayer, layer: Any, known: Any) -> LayerFactors:
        gc.collect()
        found = [x for x in gc.get_objects() if isinstance(x, MomentAccumulator)]
        tensors = [t for x in found for t in (x._moment, x._gradient) if t is not None]
        most[0] = max(most[0], sum(t.nbytes for t in tensors))
        return factorised(self, layer, known)

    monkeypatch.setattr(OneLayer, "factorised", measured)
    assert walk(2) == walk(5) > 0


def test_activations_beyond_a_bound_lie_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = streamed(tiny_llama(), tmp_path / "a", "fisher").errors()
    monkeypatch.setattr(activations.ActivationCache.__init__, "__defaults__", (0,))
    assert streamed(tiny_llama(), tmp_path / "b", "fisher").errors() == expected
    assert not list((tmp_path / "b").glob(".activations*"))


def test_a_full_disk_is_one_error_and_the_walk_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    expected = streamed(model, tmp_path / "a", "fisher").errors()
    monkeypatch.setattr(activations.ActivationCache.__init__, "__defaults__", (0,))
    original, left = activations._allocate, itertools.count()

    def full(descriptor: int, size: int) -> None:
        if next(left) > 8:
            raise OSError(28, "No space left on device")
        original(descriptor, size)

    monkeypatch.setattr(activations, "_allocate", full)
    with pytest.raises(WriteError, match=r"No space left.*RANKNAS_CACHE.*kept"):
        streamed(model, tmp_path / "b", "fisher")
    monkeypatch.setattr(activations, "_allocate", original)
    assert streamed(model, tmp_path / "b", "fisher").errors() == expected


class Residual(TinyGpt):
    """Its last block also reads the first one's output, so blocks cannot run on their own."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        x = self.embedding(input_ids)
        first = self.blocks[0](x)
        x = self.blocks[1](first)
        x = self.blocks[2](x + first)
        return self.norm(x) @ self.embedding.weight.T


def test_a_model_without_separate_blocks_takes_several_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Residual().eval()
    samples = samples_of(6)
    _, task = batches_of(samples, model)
    space = tiny_space(model, samples, ("svd", "group_svd"))
    monkeypatch.setattr(streaming, "SHARE", statistics_bytes(space.layers, "fisher") // 3)
    found = streamed(model, tmp_path, "fisher")
    assert "cannot be run on their own" in caplog.text
    statistics = calibrate(model, space, samples, task, norm="fisher", batch_size=2)
    expected = factorise(model, space, statistics, norm="fisher")
    for name, errors in expected.errors().items():
        assert found.errors()[name] == pytest.approx(errors, rel=1e-5, abs=1e-9)


def test_passes_have_a_bounded_number_of_positions() -> None:
    model = TinyGpt().eval()
    space = tiny_space(model, samples_of(1))
    assert samples_at_once(space, 128, 36) == 3
    assert samples_at_once(space, 2, 10_000) == 2
    assert samples_at_once(space, 128, 1) == 1


def test_digests_see_every_bit() -> None:
    x = torch.randn(3, 4)
    y = x.clone()
    y[1, 2] = torch.nextafter(y[1, 2], torch.tensor(9.0))
    assert blocks.digest({"a": x}) == blocks.digest({"a": x.clone()})
    assert blocks.digest(x) != blocks.digest(y)
