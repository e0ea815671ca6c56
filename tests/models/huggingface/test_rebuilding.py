"""Files of compressed models of transformers: the same function again, without a factory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import FAMILIES, compressed, generated, logits, tiny, tiny_inputs
from torch import nn

import rankNAS
from rankNAS.allocation import Allocation, Choice
from rankNAS.exceptions import UsageError, WeightsError
from rankNAS.io.tensors import CHECKSUM, encoded, read_tensors
from rankNAS.models.artifact import load, save
from rankNAS.models.dtypes import converted
from rankNAS.models.inputs import InputSpec

transformers = pytest.importorskip("transformers")


def saved(name: str, path: Path) -> tuple[Any, Path]:
    """The compressed network of a family, and its file."""
    network, allocation = compressed(tiny(name))
    spec = InputSpec.of(tiny_inputs(network)).to_json()
    return network, save(network, allocation, path / "small.safetensors", model={"inputs": spec})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_gives_the_same_network_again(name: str, tmp_path: Path) -> None:
    network, path = saved(name, tmp_path)
    again: Any = load(path)
    inputs = tiny_inputs(network)
    assert torch.equal(logits(again, inputs), logits(network, inputs))
    assert not torch.equal(logits(again, inputs), logits(tiny(name), inputs))
    assert type(again) is type(network) and not again.training
    counts = [sum(p.numel() for p in model.parameters()) for model in (network, again)]
    assert counts[0] == counts[1] < sum(p.numel() for p in tiny(name).parameters())
    assert "outputs" in read_tensors(path)[1]
    if network.can_generate():
        texts = [generated(m, inputs, cache) for m in (network, again) for cache in (True, False)]
        assert texts[0] == texts[1] == texts[2] == texts[3]
        assert again.generation_config.eos_token_id == network.generation_config.eos_token_id


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    _, path = saved("qwen2", tmp_path)
    again: Any = load(path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_half_precision_keeps_the_positions_exact(tmp_path: Path) -> None:
    network, allocation = compressed(tiny("llama"))
    converted(network, "bfloat16")
    assert network.config.dtype == torch.bfloat16
    again: Any = load(save(network, allocation, tmp_path / "n.safetensors"))
    inputs = tiny_inputs(network)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(logits(again, inputs), logits(network, inputs))
    network = network.to(torch.bfloat16)  # the computed buffers too
    again = load(save(network, allocation, tmp_path / "n.safetensors"))
    assert again.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert torch.equal(logits(again, inputs), logits(network, inputs))
    with pytest.raises(UsageError, match="`dtype` must be one of"):
        converted(network, "int8")


def test_a_model_given_as_a_module_needs_no_factory(tmp_path: Path) -> None:
    model = tiny("gpt2")
    data = [{"input_ids": row} for row in torch.randint(3, 100, (24, 12))]
    small: Any = rankNAS.compress(model, data, budget=0.8, strategy="energy", n_trials=1)
    again = rankNAS.load(rankNAS.save(small, tmp_path / "n.safetensors"))
    inputs = tiny_inputs(model)
    torch.testing.assert_close(logits(again, inputs), logits(small, inputs))
    assert small.config.use_cache is model.config.use_cache is True
    with pytest.raises(UsageError, match="made from a model of your own"):
        own = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        choices = {"0": Choice("svd", (2,)), "1": Choice("dense")}
        network = rankNAS.compile_space(own, torch.zeros(1, 8), min_weights=1)
        assert network.layers
        load(save(own, Allocation.of({"1": choices["1"]}), tmp_path / "own.safetensors"))


def test_the_network_can_be_trained_and_the_file_stays(tmp_path: Path) -> None:
    network, path = saved("llama", tmp_path)
    before, again = path.read_bytes(), load(path)
    inputs = tiny_inputs(network)
    again(**inputs, labels=inputs["input_ids"]).loss.backward()
    with torch.no_grad():
        for parameter in again.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert path.read_bytes() == before
    assert not torch.equal(logits(again, inputs), logits(network, inputs))


def forged(path: Path, change: Any) -> Path:
    """The file with a changed description of its model and a right checksum."""
    state, metadata = read_tensors(path)
    model = json.loads(metadata["model"])
    model["transformers"] = change(model["transformers"])
    entries = {name: text for name, text in metadata.items() if name != CHECKSUM}
    other = path.with_name("forged.safetensors")
    other.write_bytes(encoded(state, entries | {"model": json.dumps(model)}))
    return other


def with_config(**entries: Any) -> Any:
    return lambda found: found | {"config": found["config"] | entries}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        (with_config(num_hidden_layers=50_000), "more than 10000 modules"),
        (with_config(max_position_embeddings=10**12), "max_position_embeddings is 1000000000000"),
        (with_config(vocab_size=2**32), "does not fit the model"),
        (with_config(hidden_size=2**31), "does not fit the model|cannot be built"),
        (with_config(num_hidden_layers=1), "does not fit the model|no layer"),
        (with_config(model_type="mine"), "has no model 'mine'"),
        (with_config(model_type=None), "must be texts"),
        (with_config(model_type="gpt2"), "does not belong to the model 'gpt2'"),
        (with_config(rope_parameters={"rope_type": "nothing"}), "cannot be built|is damaged"),
        (with_config(hidden_size="wide"), "is damaged|cannot be built"),
        (lambda found: found | {"class": "AutoModelForCausalLM"}, "which transformers"),
        (lambda found: found | {"class": "os.system"}, "which transformers"),
        (lambda found: found | {"class": 3}, "must be texts"),
        (lambda found: found | {"config": []}, "no JSON object"),
        (lambda found: found | {"generation": {"max_new_tokens": -1}}, "is damaged"),
        (lambda found: {}, "is damaged"),
        (lambda found: [found], "is damaged"),
    ],
)
def test_forged_descriptions_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    _, path = saved("llama", tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        load(forged(path, change))
    assert "\n" not in str(caught.value)


def test_buffers_are_held_against_the_file(tmp_path: Path) -> None:
    _, path = saved("bert", tmp_path)  # which has a buffer of all positions
    with pytest.raises(WeightsError):
        load(forged(path, with_config(max_position_embeddings=2**32)))


def test_entries_that_choose_code_have_no_effect(tmp_path: Path) -> None:
    network, path = saved("llama", tmp_path)
    entries = {
        "_attn_implementation": "somebody/kernels",
        "attn_implementation": "somebody/kernels",
        "auto_map": {"AutoConfig": "own.Config"},
        "quantization_config": {"quant_method": "gptq"},
    }
    again = load(forged(path, with_config(**entries)))
    inputs = tiny_inputs(network)
    assert torch.equal(logits(again, inputs), logits(network, inputs))


def test_another_function_is_noticed(tmp_path: Path) -> None:
    _, path = saved("llama", tmp_path)
    with pytest.raises(WeightsError, match="is not the function that was saved"):
        load(forged(path, with_config(rms_norm_eps=0.5)))


def test_buffers_of_other_names_and_types_are_ignored(tmp_path: Path) -> None:
    network, path = saved("llama", tmp_path)
    buffers = {"nothing.here": "float16", "model.rotary_emb.inv_freq": "os", "": "float32"}
    again = load(forged(path, lambda found: found | {"buffers": buffers}))
    inputs = tiny_inputs(network)
    assert torch.equal(logits(again, inputs), logits(network, inputs))
