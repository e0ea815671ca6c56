"""Folders for transformers and peft: loaded with and without RankNAS, with the same outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_transformers import FAMILIES, VOCABULARY, compressed, logits, tiny, tiny_inputs
from torch import nn

import rankNAS
from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.exceptions import RankNASError, UsageError, WeightsError, WriteError
from rankNAS.models.huggingface.adapters import write_adapters
from rankNAS.models.huggingface.card import card_text
from rankNAS.models.huggingface.files import Source, parse_size
from rankNAS.models.huggingface.folder import write_folder
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.search_spaces.zoo.huggingface import huggingface_model

transformers = pytest.importorskip("transformers")
SHARD = 20_000
#: Loads each folder by its automatic class where RankNAS cannot be imported.
PROGRAM = """
import json, sys
from pathlib import Path
sys.modules["rankNAS"] = None
import torch, transformers
from safetensors.torch import load_file
for folder in sorted(Path(sys.argv[1]).iterdir()):
    small = folder / "small"
    names = json.loads((small / "config.json").read_text())["auto_map"]
    auto = next(name for name in names if name != "AutoConfig")
    model, info = getattr(transformers, auto).from_pretrained(
        small, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), (folder, info)
    given = load_file(folder / "inputs.safetensors")
    expected = given.pop("expected")
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected), folder
    if model.can_generate():
        mask = torch.ones_like(given["input_ids"])
        found = [
            model.generate(
                given["input_ids"], attention_mask=mask, max_new_tokens=6, do_sample=False,
                use_cache=cache,
            )
            for cache in (True, False)
        ]
        assert torch.equal(*found), folder
    try:
        getattr(transformers, auto).from_pretrained(small, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise AssertionError("loaded with random weights")
    print(folder.name)
"""


def written(name: str, place: Path, **options: Any) -> tuple[Any, Path]:
    """A compressed network and the folder of it."""
    network, allocation = compressed(tiny(name), **options)
    source = Source(None, SHARD)
    missing = write_folder(network, allocation, place / "small", source, "# A card\n")
    assert missing == ["no tokenizer: the folder of the dense model is not there"]
    return network, place / "small"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_the_same_network_again(name: str, tmp_path: Path) -> None:
    network, folder = written(name, tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "modeling_ranknas.py").write_text("raise SystemExit('this code must not run')\n")
    again: Any = rankNAS.load(folder)
    inputs = tiny_inputs(network)
    assert torch.equal(logits(again, inputs), logits(network, inputs))
    assert type(again) is type(network)
    own, expected = again.config.to_diff_dict(), network.config.to_diff_dict()
    assert own == expected | {"architectures": [type(network).__name__], "dtype": "float32"}
    assert again.can_generate() == network.can_generate() == hasattr(again, "generation_config")


@pytest.mark.slow  # imports transformers once more
def test_folders_load_where_ranknas_is_missing(tmp_path: Path) -> None:
    for name in FAMILIES:
        (tmp_path / "all" / name).mkdir(parents=True)
        network, folder = written(name, tmp_path / "all" / name)
        inputs = tiny_inputs(network)
        expected = {"expected": logits(network, inputs)}
        save_file(inputs | expected, folder.with_name("inputs.safetensors"))
    cache = str(tmp_path / "cache")
    environment = os.environ | {"HF_HOME": cache, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "all")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == sorted(FAMILIES)


def test_other_operators_are_rebuilt(tmp_path: Path) -> None:
    network, folder = written("llama", tmp_path, operators=("group_svd",))
    inputs = tiny_inputs(network)
    assert torch.equal(logits(rankNAS.load(folder), inputs), logits(network, inputs))
    config = json.loads((folder / "config.json").read_text())["ranknas"]
    assert any(stage["groups"] > 1 for layer in config["layers"] for stage in layer["stages"])
    assert all(choice.startswith("group_svd:") for choice in config["allocation"].values())


def test_the_tokenizer_is_copied_and_shards_have_their_size(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "own.py", "other.txt"):
        (source / name).write_text(name)
    network, allocation = compressed(tiny("qwen2"))
    folder = tmp_path / "small"
    assert write_folder(network, allocation, folder, Source(source), "card") == []
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors"),
        *("modeling_ranknas.py", "tokenizer.json", "tokenizer_config.json"),
    }
    assert (folder / "README.md").read_text() == "card"
    write_folder(network, allocation, folder, Source(source, SHARD), "card")  # replaced
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (folder / "model.safetensors").exists()
    assert all(path.stat().st_size < SHARD + 4000 for path in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {path.name for path in shards}
    assert "lm_head.weight" not in index["weight_map"]  # tied
    assert not list(tmp_path.glob(".*"))
    inputs = tiny_inputs(network)
    assert torch.equal(logits(rankNAS.load(folder), inputs), logits(network, inputs))


def test_folders_of_others_are_kept(tmp_path: Path) -> None:
    network, allocation = compressed(tiny("llama"))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.tex").write_text("words")
    with pytest.raises(UsageError, match="is no earlier export"):
        write_folder(network, allocation, tmp_path / "small", Source(None), "")
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("words")
    with pytest.raises(UsageError, match="is no earlier export"):
        write_folder(network, allocation, tmp_path / "file", Source(None), "")


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, allocation = compressed(tiny("llama"))
    (tmp_path / "file").write_text("words")
    with pytest.raises(WriteError, match="cannot be written: Not a directory"):
        write_folder(network, allocation, tmp_path / "file" / "small", Source(None), "")
    write_folder(network, allocation, tmp_path / "small", Source(None), "first")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankNAS.models.huggingface.files.write_tensors", full)
    with pytest.raises(WriteError, match="No space left on device"):
        write_folder(network, allocation, tmp_path / "small", Source(None), "second")
    assert (tmp_path / "small" / "README.md").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "small"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    own = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UsageError, match="no model of transformers"):
        write_folder(own, Allocation.of({}), tmp_path / "small", Source(None), "")
    network, allocation = compressed(tiny("llama"))
    network.extra = nn.Linear(2, 2)
    with pytest.raises(RankNASError, match=r"other tensors than LlamaForCausalLM.*'extra.bias'"):
        write_folder(network, allocation, tmp_path / "small", Source(None), "")


def test_damaged_folders(tmp_path: Path) -> None:
    _, folder = written("llama", tmp_path)
    part = sorted(folder.glob("*.safetensors"))[1]
    content = part.read_bytes()
    part.write_bytes(content[:-8] + b"\1" * 8)
    with pytest.raises(WeightsError, match=f"{part.name} does not match its checksum"):
        rankNAS.load(folder)
    part.unlink()
    with pytest.raises(WeightsError, match=f"{part.name}, named by .* is missing"):
        rankNAS.load(folder)
    part.write_bytes(content)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for ranknas, message in (
        ({"format": 2}, "does not read"),
        ({"allocation": []}, "does not read"),
        ({"class": None}, "is damaged"),
        ({"model_type": "ranknas_llama"}, "has no model"),
        ({"allocation": {"model.layers.9.mlp.up_proj": "svd:4"}}, "no layer"),
        ({"allocation": {"model.layers.1.mlp.up_proj": "svd:999999"}}, "a rank must be"),
        ({"allocation": {}}, "belongs to another model"),
    ):
        path.write_text(json.dumps(config | {"ranknas": config["ranknas"] | ranknas}))
        with pytest.raises(UsageError, match=message):
            rankNAS.load(folder)
    path.write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        rankNAS.load(folder)
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="holds no network of RankNAS"):
        rankNAS.load(tmp_path / "dense")
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="that RankNAS has compressed"):
        huggingface_model(str(folder))


@pytest.mark.filterwarnings("ignore")  # of peft and transformers about each other
@pytest.mark.parametrize(
    "name", [n for n in FAMILIES if n not in ("bert_classifier", "mixtral", "qwen3_moe")]
)
def test_adapters_on_the_base_are_the_network(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    network, allocation = compressed(tiny(name), operators=("svd",))
    folder = tmp_path / "adapters"
    write_adapters(network, allocation, folder, Source(None, SHARD), "card")
    base = huggingface_model(str(folder / "base"))
    inputs = tiny_inputs(network)
    assert not torch.allclose(logits(base, inputs), logits(network, inputs), atol=1e-3)
    adapted = peft.PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(adapted, inputs), logits(network, inputs))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), logits(network, inputs))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_adapters_find_no_experts(name: str, tmp_path: Path) -> None:
    network, allocation = compressed(tiny(name), operators=("svd",))
    with pytest.raises(UsageError, match=r"mlp.experts' is in separate layers.*--format hf"):
        write_adapters(network, allocation, tmp_path / "small", Source(None), "")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_split_projections_load_where_ranknas_is_missing(name: str, tmp_path: Path) -> None:
    if name == "gpt2":
        model = tiny(name)
    else:
        torch.manual_seed(0)
        config = transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
        model = transformers.GPTNeoXForCausalLM(config).eval()
    policy = RankPolicy(operators=("svd",), split_fused=True)
    inputs = tiny_inputs(model)
    space = compile_space(model, inputs, policy=policy, min_weights=1)
    parts = [n for n in space.layers if n.endswith((".q", ".v"))]
    assert parts
    allocation = Allocation.of({**space.dense, **dict.fromkeys(parts, Choice("svd", (5,)))})
    network = factorise(model, space).materialise(allocation)
    folder = tmp_path / "small"
    write_folder(network, allocation, folder, Source(None), "card")
    torch.testing.assert_close(logits(rankNAS.load(folder), inputs), logits(network, inputs))
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(logits(alone, inputs), logits(network, inputs))


def test_adapters_are_products_of_two_matrices(tmp_path: Path) -> None:
    network, allocation = compressed(tiny("llama"), operators=("group_svd",))
    with pytest.raises(UsageError, match=r"'group_svd:.*search with --operators svd"):
        write_adapters(network, allocation, tmp_path / "small", Source(None), "")
    dense = Allocation.from_json(json.dumps(dict.fromkeys(allocation, "dense")))
    with pytest.raises(UsageError, match="nothing for peft"):
        write_adapters(tiny("llama"), dense, tmp_path / "small", Source(None), "")
    assert not list(tmp_path.iterdir())


def test_the_card_has_the_measured_numbers() -> None:
    allocation = Allocation.from_json('{"a": "svd:2", "b": "dense"}')
    dense = {"params": 2000, "perplexity": 20.0, "name": "x"}
    measured = {"params": 1500, "perplexity": 22.25, "seconds": 3.0, "name": "y"}
    text = card_text(
        "hf", "LlamaForCausalLM", "AutoModelForCausalLM", allocation, dense, measured, "go"
    )
    assert "| params | 2,000 | 1,500 | 75.0 % |" in text
    assert "| perplexity | 20 | 22.25 |  |" in text and "seconds" not in text
    assert "1 of the 2 layers" in text and "```sh\ngo\n```" in text
    assert "stored as bfloat16" in card_text("peft", "M", "A", allocation, {}, {}, "", "bfloat16")


def test_sizes_of_shards() -> None:
    assert parse_size("5GB") == 5 * 10**9 and parse_size("300") == 300
    assert parse_size("0.5 mb") == 500_000
    for wrong in ("", "0", "5TB", "-1GB", "GB"):
        with pytest.raises(UsageError, match="a size must look like 5GB"):
            parse_size(wrong)
