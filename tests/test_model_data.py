"""The tokenizer and the context of a model's folder, and searches of language models."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from language import Bigram, text_folder, tiny_llama, tokenizer_folder
from torch import Tensor, nn

import rankNAS
from rankNAS.exceptions import DataError
from rankNAS.model_data import CONTEXT_LENGTH, load_data_of
from rankNAS.objectives.base import Objective
from rankNAS.settings import Settings
from rankNAS.study import Study


class Masked(Bigram):
    """Takes a mask of what is padded, as models of transformers do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids)


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """By folder, the context length that its configuration states."""
    known: dict[str, int | None] = {}
    module = ModuleType(CONTEXT_LENGTH.partition(":")[0])
    vars(module)["context_length"] = known.__getitem__
    vars(module)["is_masked"] = lambda folder: False
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return known


def test_a_folder_gives_its_tokenizer_and_context(
    tmp_path: Path, positions: dict[str, int | None]
) -> None:
    source = f"text:{text_folder(tmp_path / 'text')}"
    folder = str(tokenizer_folder(tmp_path / "model"))
    positions[folder] = 24
    found = load_data_of(f"hf:{folder}", source).text
    assert found is not None and (found.context, found.tokenizer) == (24, folder)
    positions[f"{folder}?dtype=bfloat16"] = 8
    found = load_data_of(f"hf:{folder}?dtype=bfloat16", source, stride=2).text
    assert found is not None and found.context == 8
    found = load_data_of(f"hf:{folder}", f"{source}?tokenizer=bytes").text
    assert found is not None and (found.context, found.tokenizer) == (24, "bytes")
    with pytest.raises(DataError, match=r"of 25 tokens is longer than that of the model, 24"):
        load_data_of(f"hf:{folder}", source, context=25)
    positions[folder] = None
    (tmp_path / "text" / "train.txt").write_text("the cat " * 2000)
    (tmp_path / "text" / "valid.txt").unlink()
    (tmp_path / "text" / "test.txt").write_text("the cat " * 2000)
    found = load_data_of(f"hf:{folder}", source).text
    assert found is not None and found.context == 1024


def test_other_data_take_no_tokenizer(positions: dict[str, int | None]) -> None:
    assert load_data_of("hf:anything", "digits").num_classes == 10
    with pytest.raises(DataError, match="digits takes no context"):
        load_data_of("hf:anything", "digits", context=5)


def test_a_module_states_its_context(tmp_path: Path) -> None:
    source = f"text:{text_folder(tmp_path)}?tokenizer=bytes"
    found = load_data_of(tiny_llama(positions=48), source).text
    assert found is not None and found.context == 48
    with pytest.raises(DataError, match=r"give --context 48 or less"):
        load_data_of(tiny_llama(positions=48), source, context=64)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = text_folder(tmp_path_factory.mktemp("text"))
    data = rankNAS.load_data(f"text:{folder}?tokenizer=bytes", context=32, stride=16)

    def whole(network: nn.Module, batch: Any) -> float:
        """What a function of the user gets: the network, and all validation samples."""
        assert batch["input_ids"].shape == batch["labels"].shape == (8, 32)
        return float(network(batch["input_ids"]).abs().mean())

    def parts(network: nn.Module, batches: Any) -> float:
        sizes = [len(batch["input_ids"]) for batch in batches]
        return float(max(sizes))

    return rankNAS.search(
        Bigram(256),
        data,
        objectives=["perplexity", Objective(whole, "minimize"), Objective(parts, batches=True)],
        budget={"layer_params": 0.5},
        strategy="uniform",
        n_trials=1,
        settings=Settings(calibration=16, validation=8),
    )


def test_a_search_measures_perplexity_on_named_parts(study: Study) -> None:
    assert study.task.name == "causal_lm"
    found = study.test(study.materialise())
    dense = study.test(study.context.factorisation.model)
    assert found["perplexity"] > 1 and found["kl_divergence"] >= 0
    assert dense["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert study.best.metrics["whole"] > 0 and study.best.metrics["parts"] == 8
    assert len(study.splits.validation) == 8


def test_a_search_of_padded_documents(tmp_path: Path) -> None:
    source = f"text:{text_folder(tmp_path)}?tokenizer=bytes&pack=no"
    options: dict[str, Any] = {"strategy": "uniform", "n_trials": 1}
    study = rankNAS.search(Masked(256), source, budget={"layer_params": 0.5}, **options)
    assert study.best.metrics["layer_params"] <= 0.5 * study.dense["layer_params"]
    assert study.task.mask_of(study.splits.validation.example(2)) is not None
