"""``hf:FOLDER``: models of every family, options of the folder, and folders that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import FAMILIES, logits, tiny, tiny_inputs

import rankNAS
from rankNAS.exceptions import UsageError, WeightsError
from rankNAS.io.tensors import read_tensors
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model
from rankNAS.search_spaces.zoo.folders import FolderSpec
from rankNAS.search_spaces.zoo.huggingface import (
    context_length,
    empty_model,
    example_inputs,
    huggingface_model,
    model_class,
    read_config,
)

transformers = pytest.importorskip("transformers")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in shards."""
    tiny("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).is_file()
    return tmp_path


def changed(folder: Path, **entries: Any) -> str:
    """The folder with other entries in its configuration; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({n: v for n, v in content.items() if v is not None}))
    return str(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_each_family_is_loaded(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    found = build_model(f"hf:{tmp_path}", num_classes=None, input_shape=None)
    inputs = tiny_inputs(model)
    assert torch.equal(logits(found, inputs), logits(model, inputs))
    assert type(found) is type(model) and not found.training
    wanted = None if name in ("t5", "vit") else 64
    assert context_length(str(tmp_path)) == wanted


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("mixtral", "qwen3_moe")])
def test_a_configuration_alone_gives_the_space(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    model = huggingface_model(str(tmp_path))
    config = read_config(str(tmp_path))
    empty = empty_model(config, model_class(config, str(tmp_path)))
    assert all(parameter.is_meta for parameter in empty.parameters())
    found = compile_space(empty, example_inputs(empty))
    expected = compile_space(model, example_inputs(model))
    assert found.dense_cost == expected.dense_cost and list(found.layers) == list(expected.layers)


def test_weights_are_mapped_into_memory(folder: Path) -> None:
    """A change of the file shows in the model: the weights were not copied."""
    model: Any = huggingface_model(str(folder))
    name = "model.layers.0.mlp.up_proj.weight"
    part = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    before = model.get_parameter(name).clone()
    header = int.from_bytes(part.read_bytes()[:8], "little")
    with part.open("r+b") as file:
        file.seek(8 + header)
        file.write(b"\0" * (part.stat().st_size - 8 - header))
    assert before.any() and not model.get_parameter(name).any()


def test_the_type_of_the_weights_can_be_chosen(folder: Path) -> None:
    model: Any = huggingface_model(f"{folder}?dtype=bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(folder / "half")
    again: Any = huggingface_model(str(folder / "half"))
    assert again.dtype == torch.bfloat16
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_text_names_a_model_in_python_too(folder: Path) -> None:
    inputs = tiny_inputs(tiny("llama"))
    space = rankNAS.compile_space(f"hf:{folder}", inputs)
    assert "model.layers.1.mlp.down_proj" in space.layers
    data = [{"input_ids": row} for row in torch.randint(3, 100, (24, 12))]
    options: dict[str, Any] = {"budget": {"layer_params": 0.6}, "strategy": "energy"}
    study = rankNAS.search(f"hf:{folder}", data, n_trials=1, **options)
    assert study.task.name == "causal_lm"
    assert study.best.metrics["layer_params"] <= 0.6 * study.dense["layer_params"]
    small: Any = study.materialise()
    assert small.config.use_cache is True
    with pytest.raises(UsageError, match="give an nn.Module, or hf:FOLDER"):
        rankNAS.compile_space("llama", inputs)


def test_gguf_files_are_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = tiny("llama")
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        own = name.removesuffix(".weight")
        for kind, heads in (("q_proj", 4), ("k_proj", 2)):
            if own.endswith(kind):  # the format pairs the halves of a rotary head
                halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names.get_name(own)}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = huggingface_model(f"{tmp_path}?gguf_file=tiny.gguf")
    inputs = tiny_inputs(model)
    torch.testing.assert_close(logits(found, inputs), logits(model, inputs))
    with pytest.raises(WeightsError, match=r"there is no file .*other\.gguf"):
        huggingface_model(f"{tmp_path}?gguf_file=other.gguf")


def test_a_folder_without_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(WeightsError, match="has no weights; expected model.safetensors"):
        huggingface_model(str(folder))


def test_a_shard_that_is_missing_or_damaged_is_named(folder: Path) -> None:
    part = sorted(folder.glob("model-00002*"))[0]
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=f"{part.name} is truncated"):
        huggingface_model(str(folder))
    part.write_bytes(b"")
    with pytest.raises(WeightsError, match=f"{part.name} is truncated"):
        huggingface_model(str(folder))
    part.unlink()
    with pytest.raises(WeightsError, match=f"{part.name}', named by {INDEX}, is missing"):
        huggingface_model(str(folder))


def test_an_index_that_does_not_fit_its_shards(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    parts = sorted({*index["weight_map"].values()})
    moved = dict.fromkeys(index["weight_map"], parts[0])
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": moved}))
    with pytest.raises(WeightsError, match=f"{parts[0]} lacks "):
        huggingface_model(str(folder))
    for wrong in ({"x": "../model.safetensors"}, {"x": 1}, [1]):
        (folder / INDEX).write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(WeightsError, match="is no index of weights"):
            huggingface_model(str(folder))
    (folder / INDEX).write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        huggingface_model(str(folder))


def test_weights_of_another_size_or_class(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"down_proj.weight has shape \(32, 64\).*\(32, 48\)"):
        huggingface_model(changed(folder, intermediate_size=48))
    changed(folder, intermediate_size=64)
    with pytest.raises(WeightsError, match=r"lack 'model.layers.2.*8 more\)"):
        huggingface_model(changed(folder, num_hidden_layers=3))
    changed(folder, num_hidden_layers=2)
    with pytest.raises(WeightsError, match=r"lack 'score.weight'.*under 'architectures'"):
        huggingface_model(changed(folder, architectures=["LlamaForSequenceClassification"]))


def test_code_of_a_folder_never_runs(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('this code must not run')\n")
    codes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    inputs = tiny_inputs(tiny("llama"))
    found = huggingface_model(changed(folder, auto_map=codes))  # transformers knows this kind
    assert torch.equal(logits(found, inputs), logits(tiny("llama"), inputs))
    with pytest.raises(UsageError, match="needs code of its own, which RankNAS does not run"):
        huggingface_model(changed(folder, model_type="mine"))
    with pytest.raises(UsageError, match="the model type 'mine', which the installed"):
        huggingface_model(changed(folder, auto_map=None))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": None}, "names no class under 'architectures'"),
        ({"architectures": ["LlamaForNothing"]}, "the class 'LlamaForNothing', which"),
        ({"architectures": ["AutoConfig"]}, "the class 'AutoConfig', which"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
        ({"ranknas": {}}, "that RankNAS has compressed"),
        ({"hidden_size": "wide"}, "transformers cannot read the configuration"),
        ({"hidden_size": 0}, "transformers cannot load the weights"),
    ],
)
def test_configurations_that_cannot_be_used(
    folder: Path, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        huggingface_model(changed(folder, **entries))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"'])
def test_a_damaged_configuration(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config.json' (cannot be read|holds no JSON object)"):
        huggingface_model(str(folder))


def test_names_of_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        huggingface_model(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="there is no folder ''"):
        huggingface_model("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no config.json"):
        context_length(str(tmp_path / "empty"))
    for wrong in ("colour=red", "dtype=int8", "text"):
        with pytest.raises(UsageError):
            FolderSpec.parse(f"{folder}?{wrong}")


def test_the_files_of_a_folder_are_not_changed(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = huggingface_model(str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert any(t.any() for t in read_tensors(sorted(folder.glob("*.safetensors"))[0])[0].values())


def test_a_missing_package_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UsageError, match=r"needs transformers: pip install 'ranknas\[hf\]'"):
        huggingface_model(str(folder))


def test_positions_behind_the_padding_token_do_not_count(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.RobertaConfig(
        vocab_size=100, max_position_embeddings=34, pad_token_id=1, **sizes
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    length = context_length(str(tmp_path))
    assert length == 32
    model = huggingface_model(str(tmp_path))
    assert logits(model, {"input_ids": torch.full((1, length), 5)}).shape == (1, 32, 100)
