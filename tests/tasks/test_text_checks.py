"""Language data against a model: vocabulary, context, task, and the position of targets."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import Bigram, text_folder, tiny_llama, tokenizer_folder
from torch import Tensor, nn

from rankNAS.data.base import Data
from rankNAS.data.loading import load_data
from rankNAS.evaluation.outputs import dense_reference, network_metrics
from rankNAS.exceptions import DataError
from rankNAS.tasks.infer import resolve_task
from rankNAS.tasks.language import CausalLanguageModelling
from rankNAS.tasks.text import target_losses, warn_of_targets

CYCLE = torch.arange(200) % 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = text_folder(tmp_path_factory.mktemp("text"))
    return load_data(f"text:{folder}?tokenizer=bytes", context=32)


def windows(*shifts: int) -> list[Any]:
    """Windows of a cycle of tokens, with labels so many positions later."""
    starts = range(0, 160, 16)
    return [tuple(CYCLE[s + shift : s + shift + 16] for shift in (0, *shifts)) for s in starts]


def test_the_task_of_text_is_causal(data: Data) -> None:
    for model in (Bigram(256), tiny_llama()):
        assert isinstance(resolve_task(None, model, data), CausalLanguageModelling)


def test_the_task_of_text_with_a_stride_is_causal(tmp_path: Path) -> None:
    source = f"text:{text_folder(tmp_path)}?tokenizer=bytes"
    # With as many classes as tokens, labels alone do not tell a class from a position.
    task = resolve_task(None, Bigram(256), load_data(source, context=256, stride=32))
    assert isinstance(task, CausalLanguageModelling) and not task.shifted


def test_an_encoder_is_matched(data: Data) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(256, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            found: Tensor = self.embedding(input_ids)
            return found

    assert resolve_task(None, Encoder(), data).name == "matching"


def test_gpt2_is_causal_on_data_of_the_user() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    items = [{"input_ids": torch.randint(40, (16,))} for _ in range(6)]
    assert resolve_task(None, model, load_data((items, None))).name == "causal_lm"


def test_perplexity_is_that_of_all_tokens_together(tmp_path: Path) -> None:
    """By hand: one window after the other, and with a stride each token with its context."""
    folder, model = text_folder(tmp_path), tiny_llama(seed=3)
    source = f"text:{folder}?tokenizer=bytes"
    ids = torch.tensor(list((folder / "test.txt").read_bytes()))

    def losses(start: int, first: int) -> Tensor:
        x = ids[start : start + 32][None]
        with torch.no_grad():
            log_p = model(input_ids=x).logits[0].log_softmax(-1)
        return -log_p[:-1].gather(1, x[0, 1:, None])[first - 1 :, 0]

    plain = load_data(source, context=32)
    assert plain.test is not None
    task = resolve_task(None, model, plain)
    wanted = torch.cat([losses(start, 1) for start in range(0, len(ids) - 31, 32)])
    found = network_metrics(
        model, plain.test, task, reference=dense_reference(model, plain.test, task)
    )
    assert found["perplexity"] == pytest.approx(math.exp(wanted.mean()), rel=1e-5)
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-9)

    strided = load_data(source, context=32, stride=8)
    assert strided.test is not None
    task = resolve_task(None, model, strided)
    parts, seen = [losses(0, 1)], 32
    for start in [*range(8, len(ids) - 32, 8), len(ids) - 32]:
        parts.append(losses(start, seen - start))
        seen = start + 32
    wanted = torch.cat(parts)
    assert len(wanted) == len(ids) - 1
    found = network_metrics(model, strided.test, task)
    assert found["perplexity"] == pytest.approx(math.exp(wanted.mean()), rel=1e-5)


def test_padding_does_not_count(tmp_path: Path) -> None:
    folder, model = text_folder(tmp_path), tiny_llama(seed=3)
    data = load_data(f"text:{folder}?tokenizer=bytes&pack=no")
    assert data.test is not None
    task = resolve_task(None, model, data)
    total, count = 0.0, 0
    for line in (folder / "test.txt").read_text().splitlines():
        x = torch.tensor([list(line.encode())])
        if x.numel() < 2:
            continue
        with torch.no_grad():
            log_p = model(input_ids=x).logits[0, :-1].log_softmax(-1)
        total -= float(log_p.gather(1, x[0, 1:, None]).sum())
        count += x.numel() - 1
    found = network_metrics(model, data.test, task)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("given", [None, "causal_lm"])
def test_models_that_the_text_does_not_fit(data: Data, tmp_path: Path, given: str | None) -> None:
    def refused(model: nn.Module, said: str, data: Data = data) -> None:
        with pytest.raises(DataError, match=said) as error:
            resolve_task(given, model, data)
        assert "\n" not in str(error.value)

    refused(tiny_llama(positions=16), "have 32 tokens, but LlamaForCausalLM takes 16; give --cont")
    refused(
        tiny_llama(200), r"tokenizer 'bytes' has 256 token ids, but the embedding of .* has 200"
    )
    refused(Bigram(200), "has 256 token ids, but the embedding of Bigram has 200 rows")
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}.npy", np.arange(64).reshape(4, 16) + 30)
    tokens = load_data(f"tokens:{tmp_path}")
    refused(Bigram(90), "has the token id 93, but the embedding of Bigram has 90 rows", tokens)
    assert resolve_task("causal_lm", Bigram(94), tokens).name == "causal_lm"
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=256, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    refused(transformers.T5ForConditionalGeneration(config).eval(), "is an encoder-decoder")


@pytest.mark.parametrize(
    ("shifts", "task", "best"),
    [
        ((), None, 0),
        ((0,), None, 0),
        ((1,), None, 0),
        ((2,), CausalLanguageModelling(), -2),
    ],
)
def test_the_position_of_labels(
    shifts: tuple[int, ...], task: Any, best: int, caplog: pytest.LogCaptureFixture
) -> None:
    items = windows(*shifts) if shifts else [x for (x,) in windows()]
    model, loaded = Bigram(), load_data((items, None))
    found = resolve_task(task or "causal_lm", model, loaded)
    assert isinstance(found, CausalLanguageModelling)
    losses, classes = target_losses(model, found, loaded.train.example(4))
    assert classes == 32
    assert min(losses, key=lambda move: losses[move]) == best
    with caplog.at_level(logging.WARNING):
        warn_of_targets(model, found, loaded.train)
    assert ("labels may be unshifted, or shifted twice" in caplog.text) == (best != 0)


def test_a_model_that_repeats_its_inputs_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model, loaded = Bigram(step=0), load_data(([x for (x,) in windows()], None))
    task = resolve_task("causal_lm", model, loaded)
    with caplog.at_level(logging.WARNING):
        warn_of_targets(model, task, loaded.train)
    assert "nats at its targets, and of 0.0" in caplog.text
    assert "1 position before" in caplog.text
    caplog.clear()
    masked = resolve_task("masked_lm", model, load_data((windows(0), None)))
    warn_of_targets(model, masked, loaded.train)
    assert not caplog.text


def test_another_tokenizer_of_a_folder(tmp_path: Path) -> None:
    source = f"text:{text_folder(tmp_path)}?tokenizer={tokenizer_folder(tmp_path / 'words')}"
    data = load_data(source, context=16)
    assert resolve_task(None, tiny_llama(20), data).name == "causal_lm"
    with pytest.raises(
        DataError, match=r"words' has 20 token ids, .* 19 rows; give the tokenizer"
    ):
        resolve_task(None, tiny_llama(19), data)


def test_a_loss_above_that_of_a_guess_is_warned_about(
    data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    model = Bigram(256, step=77)
    warn_of_targets(model, resolve_task(None, model, data), data.train)
    assert "more than that of a guess among its 256 tokens; check" in caplog.text
