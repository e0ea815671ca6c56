"""Commands on a folder of transformers: compile, search, resume, show and export."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import generated, logits, tiny, tiny_inputs

import rankNAS
from rankNAS.cli import main

pytest.importorskip("transformers")
FACTORY = """
import torch

def windows():
    drawn = torch.randint(3, 100, (40, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row} for row in drawn]
    return rows[:30], rows[30:]
"""
SEARCH = ("--data", "data.py:windows", "--calibration", "16", "--validation", "8", "--quiet")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a finished study; tests copy it."""
    place = tmp_path_factory.mktemp("home")
    tiny("llama").save_pretrained(place / "model", max_shard_size="20KB")
    (place / "model" / "tokenizer.json").write_text("{}")
    (place / "data.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKNAS_CACHE", str(place / "cache"))
        patch.chdir(place)
        options = ("--strategy", "energy", "--operators", "svd", "--budget", "layer_params=0.6")
        search = ("search", "--space", "hf:model", *SEARCH, *options, "--trials", "1")
        assert run(patch, *search, "--study", "first") == 0
    return place


def run(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command in this process."""
    patch.setattr(sys, "argv", ["ranknas", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    code = stopped.value.code
    return code if isinstance(code, int) else int(bool(code))


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, as the working folder."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_a_folder_is_compiled_without_data(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (here / "model").glob("*.safetensors"):
        path.unlink()  # the configuration is enough
    assert run(monkeypatch, "compile", "--space", "hf:model", "--json") == 0
    found = document(capsys)
    assert found["input_shape"] == [1, 64]
    assert "model.layers.1.mlp.down_proj" in found["layers"]
    assert found["params"] == sum(p.numel() for p in tiny("llama").parameters())


@pytest.mark.parametrize(("name", "shape"), [("mixtral", [1, 64]), ("vit", [1, 3, 32, 32])])
def test_experts_and_images_are_compiled(
    name: str,
    shape: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny(name).save_pretrained(tmp_path)
    capsys.readouterr()
    assert run(monkeypatch, "compile", "--space", f"hf:{tmp_path}", "--json") == 0
    assert document(capsys)["input_shape"] == shape


def test_the_study_of_a_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((here / "ranknas-studies" / "first" / "result.json").read_text())
    assert result["task"] == "causal_lm" and result["space"] == "hf:model"
    assert result["best"]["test_perplexity"] > 1
    assert result["best"]["layer_params"] <= 0.6 * result["dense"]["layer_params"]
    assert run(monkeypatch, "show", "first") == 0
    assert "first: hf:model by energy" in capsys.readouterr().out
    assert run(monkeypatch, "resume", "first", "--trust-study", "--json") == 0
    assert document(capsys)["trials"] == result["trials"]
    shutil.rmtree(here / "model")
    network: Any = rankNAS.load(here / "ranknas-studies" / "first" / "best.safetensors")
    inputs = tiny_inputs(network)
    assert generated(network, inputs, True) == generated(network, inputs, False)


def test_other_weights_are_another_study(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    model.save_pretrained(here / "model", max_shard_size="20KB")
    capsys.readouterr()
    assert run(monkeypatch, "resume", "first", "--trust-study") == 2
    assert "weights" in capsys.readouterr().err


def test_export_for_transformers(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ("export", "first", "--format", "hf")
    assert run(monkeypatch, *export, "--out", "SMALL", "--shard-size", "30KB", "--json") == 0
    assert document(capsys) == {"file": "SMALL", "format": "hf", "max_absolute_difference": 0.0}
    names = {path.name for path in (here / "SMALL").iterdir()}
    assert {"tokenizer.json", "README.md", "model.safetensors.index.json"} <= names
    card = (here / "SMALL" / "README.md").read_text()
    assert "| test_perplexity |" in card and "ranknas search --space hf:model" in card
    network = rankNAS.load(here / "ranknas-studies" / "first" / "best.safetensors")
    inputs = tiny_inputs(network)
    assert torch.equal(logits(rankNAS.load("SMALL"), inputs), logits(network, inputs))
    # The folder of the studies, as before, and a type.
    given = ("--out", "ranknas-studies", "--output", "half", "--dtype", "bfloat16")
    assert run(monkeypatch, *export, *given) == 0
    half: Any = rankNAS.load("half")
    assert half.dtype == torch.bfloat16 and half.config.dtype == torch.bfloat16
    assert "stored as bfloat16" in (here / "half" / "README.md").read_text()
    torch.testing.assert_close(
        logits(half, inputs).float(), logits(network, inputs), atol=0.05, rtol=0.05
    )


def test_a_factory_of_a_model_of_transformers_is_not_needed_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import transformers\n\ndef net():\n"
    code += "    return transformers.AutoModelForCausalLM.from_pretrained('model')\n"
    (here / "own.py").write_text(code)
    (here / "any").mkdir()
    tiny("llama").save_pretrained(here / "any")
    weights = ("--weights", "any/model.safetensors", "--strategy", "uniform")
    search = ("search", "--space", "own.py:net", *SEARCH, *weights, "--budget", "0.7")
    assert run(monkeypatch, *search, "--study", "own") == 0
    (here / "own.py").unlink()
    assert run(monkeypatch, "export", "own", "--format", "hf", "--output", "small") == 0
    assert "no tokenizer" in capsys.readouterr().err
    assert logits(rankNAS.load("small"), tiny_inputs(tiny("llama"))).shape == (2, 12, 100)


@pytest.mark.filterwarnings("ignore")  # of peft and transformers about each other
def test_export_for_peft(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    assert run(monkeypatch, "export", "first", "--format", "peft", "--out", "ADAPTERS") == 0
    assert "written, not loaded again" in capsys.readouterr().out
    base = transformers.AutoModelForCausalLM.from_pretrained("ADAPTERS/base")
    found = peft.PeftModel.from_pretrained(base, "ADAPTERS")
    network = rankNAS.load(here / "ranknas-studies" / "first" / "best.safetensors")
    inputs = tiny_inputs(network)
    torch.testing.assert_close(logits(found, inputs), logits(network, inputs))
    settings = json.loads((here / "ADAPTERS" / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM"
    assert settings["base_model_name_or_path"] == str(here / "ADAPTERS" / "base")


@pytest.mark.filterwarnings("ignore")  # torch's exporters warn about their own internals
@pytest.mark.parametrize("format", ["safetensors", pytest.param("pt2", marks=pytest.mark.slow)])
def test_export_to_a_file(
    here: Path,
    format: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--output", "n.file", "--dtype", "bfloat16", "--json")
    assert run(monkeypatch, "export", "first", "--format", format, *given) == 0
    assert document(capsys)["max_absolute_difference"] < 0.1
    if format == "safetensors":
        from safetensors.torch import load_file

        assert {tensor.dtype for tensor in load_file("n.file").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "--space", "hf:nothing"), "there is no folder 'nothing'"),
        (("search", "--space", "hf:broken", *SEARCH), "is missing; fetch it"),
        (("search", "--space", "hf:model?colour=red", *SEARCH), "unknown option 'colour'"),
        (("export", "first", "--format", "hf", "--out", "model"), "is no earlier export"),
        (("export", "first", "--format", "hf", "--dtype", "int8"), "`dtype` must be one of"),
        (("export", "first", "--format", "hf", "--shard-size", "big"), "must look like 5GB"),
        (("export", "first", "--format", "gguf"), "unknown format 'gguf'"),
        (("export", "second", "--format", "hf", "--out", "SMALL"), "there is no study 'second'"),
    ],
)
def test_bad_input_is_one_line(
    here: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(here / "model", here / "broken")
    sorted((here / "broken").glob("*.safetensors"))[0].unlink()
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "Traceback" not in error
