"""The logits of language models are computed for a few positions at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_transformers import VOCABULARY, tiny, tiny_inputs
from torch import Tensor, nn

from rankNAS.allocation import DENSE
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.compression.patches import MAX_POSITIONS
from rankNAS.data.samples import Samples
from rankNAS.evaluation import outputs
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.evaluation.outputs import dense_reference, network_metrics
from rankNAS.exceptions import RankNASError
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.tasks import headed
from rankNAS.tasks.base import Task, added
from rankNAS.tasks.categorical import TopClasses
from rankNAS.tasks.headed import Headed, HiddenStates, has_separate_head, without_head
from rankNAS.tasks.language import CausalLanguageModelling, MaskedLanguageModelling
from rankNAS.trees import Inputs

FEW = 20 * VOCABULARY * 4  # bytes of the logits of 20 positions


def noisy(model: Any) -> Any:
    """Another network: the model with noise on its weights."""
    network = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def batch_of(count: int = 6, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def predicted(task: Task, model: nn.Module, batch: Any) -> Headed:
    with task.compact(model):
        found = task.run(model, batch)
    assert isinstance(found, Headed)
    return found


@pytest.fixture(autouse=True)
def few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headed, "LOGITS", FEW // 4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mixtral"])
def test_sums_and_gradients_are_those_of_whole_logits(name: str) -> None:
    model, batch = tiny(name), batch_of()
    other = noisy(model)
    task = CausalLanguageModelling().bound(batch, model)
    assert task.separate_head
    dense, network = predicted(task, model, batch), predicted(task, other, batch)
    whole, reference = task.run(other, batch), task.run(model, batch)
    assert len(network) == len(whole)
    for known, expected in ((dense, reference), (reference, reference), (None, None)):
        for key, value in whole.sums(expected).items():
            torch.testing.assert_close(network.sums(known)[key], value)
    kept = reference.kept(len(reference) * 60)
    assert isinstance(kept, TopClasses)
    torch.testing.assert_close(network.sums(kept)["kl"], whole.sums(kept)["kl"])
    assert whole.sums(dense)["kl"] == pytest.approx(float(whole.sums(reference)["kl"]))
    for a, b in (
        (network.loss(), whole.loss()),
        (network.distillation(dense, 2.0), whole.distillation(reference, 2.0)),
    ):
        torch.testing.assert_close(a, b)
    sampled = [x.sampled_loss(torch.Generator().manual_seed(3)) for x in (network, whole)]
    torch.testing.assert_close(*sampled)
    inner = next(p for n, p in other.named_parameters() if "layers.0" in n or ".h.0" in n)
    gradients = [torch.autograd.grad(loss, inner)[0] for loss in sampled]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_masked_models_have_a_separate_head() -> None:
    model = tiny("bert")
    batch = {**tiny_inputs(model), "labels": tiny_inputs(model)["input_ids"]}
    task = MaskedLanguageModelling().bound(batch, model)
    assert task.separate_head
    found = predicted(task, model, batch).sums(None)
    assert found["loss"] == pytest.approx(float(task.run(model, batch).sums(None)["loss"]))


def test_heads_whose_output_is_changed_are_run() -> None:
    class Capped(nn.Module):
        """Caps its logits, as Gemma does."""

        def __init__(self) -> None:
            super().__init__()
            self.model = tiny("llama")

        def get_output_embeddings(self) -> nn.Module:
            head: nn.Module = self.model.lm_head
            return head

        def forward(self, input_ids: Tensor) -> Any:
            output = self.model(input_ids)
            output.logits = output.logits.tanh()
            return output

    model, inputs = Capped().eval(), Inputs.of({"input_ids": batch_of()["input_ids"]})
    assert not has_separate_head(model, inputs)
    with pytest.raises(RankNASError, match="changes the output"), without_head(model, strict=True):
        inputs.run(model)
    task = CausalLanguageModelling().bound(inputs.kwargs, model)
    assert not task.separate_head
    with task.compact(model):
        assert not isinstance(inputs.run(model), HiddenStates)


def test_a_head_with_hooks_is_run() -> None:
    model, inputs = tiny("llama"), Inputs.of(batch_of())
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    with torch.no_grad(), without_head(model):
        assert inputs.run(model).logits.shape[-1] == VOCABULARY
    handle.remove()
    with torch.no_grad(), without_head(model):
        assert inputs.run(model).hidden.shape[-1] == 32
    with torch.no_grad():
        assert inputs.run(model).logits.shape[-1] == VOCABULARY


def largest_logits(heads: list[nn.Module]) -> list[int]:
    """Takes note of the bytes of every output of some heads."""
    sizes: list[int] = []
    for head in heads:
        original = head.forward

        def noted(x: Tensor, original: Any = original) -> Tensor:
            found: Tensor = original(x)
            sizes.append(found.nbytes)
            return found

        head.forward = noted
    return sizes


def test_an_evaluation_holds_few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    batch = batch_of(16)
    samples = Samples.of([{k: v[i] for k, v in batch.items()} for i in range(16)])
    task = CausalLanguageModelling().bound(batch, model)
    network = noisy(model)
    expected = task.finish(task.run(network, batch).sums(task.run(model, batch)))
    sizes = largest_logits([model.lm_head, network.lm_head])
    monkeypatch.setattr(outputs, "KEPT", 1)  # hidden states lie in files
    reference = dense_reference(model, samples, task)
    found = network_metrics(network, samples, task, reference=reference)
    assert found == pytest.approx(expected, rel=1e-5)
    assert sizes and max(sizes) <= FEW


def test_an_evaluator_and_calibration_hold_few_logits() -> None:
    model = tiny("llama")
    batch = batch_of(16)
    samples = Samples.of([{k: v[i] for k, v in batch.items()} for i in range(16)])
    task = CausalLanguageModelling().bound(batch, model)
    space = compile_space(model, Inputs.of(batch_of(1)), min_weights=512, exclude=["lm_head"])
    whole = CausalLanguageModelling(layout=task.layout)
    assert MAX_POSITIONS > 16 * 12
    statistics = [
        calibrate(model, space, samples, t, norm="fisher", batch_size=4) for t in (task, whole)
    ]
    for name, known in statistics[0].items():
        torch.testing.assert_close(
            known.output_gradient_second_moment,
            statistics[1][name].output_gradient_second_moment,
            rtol=1e-4,
            atol=1e-7,
        )
    factors = factorise(model, space, statistics[0], norm="fisher")
    choices = {n: x.choices[len(x.choices) // 2] for n, x in factors.space.layers.items()}
    allocation = factors.space.dense.of(choices)
    assert set(allocation.values()) != {DENSE}
    found = [
        Evaluator(factors, t, samples, samples, low_memory=low).evaluate(allocation)
        for t, low in ((task, True), (task, False), (whole, True))
    ]
    for metrics in found[1:]:
        assert metrics == pytest.approx(found[0], rel=1e-5, abs=1e-9)
    sizes = largest_logits([model.lm_head])
    evaluator = Evaluator(factors, task, samples, samples, low_memory=True)
    evaluator.evaluate(allocation)
    evaluator.network(allocation)
    calibrate(model, space, samples, task, norm="fisher", batch_size=4)
    assert sizes and max(sizes) <= 64 * VOCABULARY * 4


def test_sums_of_parts_add_up() -> None:
    model, batch = tiny("llama"), batch_of(6)
    task = CausalLanguageModelling().bound(batch, model)
    parts = [
        predicted(task, model, {k: v[rows] for k, v in batch.items()})
        for rows in (slice(0, 3), slice(3, 6))
    ]
    total = added(*(part.sums(part) for part in parts))
    for key, value in task.run(model, batch).sums(task.run(model, batch)).items():
        torch.testing.assert_close(total[key], value)
