"""Workers read the factors of a streamed model from its files."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tiny_transformers import VOCABULARY, tiny

from rankNAS.engine import search
from rankNAS.exceptions import UsageError
from rankNAS.execution.sharing import shared_bytes
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.settings import Settings
from rankNAS.study import Study


def searched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int, workers: int = 1
) -> Study:
    monkeypatch.setenv("RANKNAS_CACHE", str(folder))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (60, 24), generator=generator)
    items = [{"input_ids": x} for x in ids]
    return search(
        tiny("llama"),
        (items[:50], items[50:]),
        task="causal_lm",
        strategy="random",
        n_trials=3,
        workers=workers,
        budget={"layer_params": 0.5},
        settings=Settings(
            calibration=32, validation=8, memory=memory, policy=RankPolicy(operators=("svd",))
        ),
    )


def test_pickled_evaluators_name_the_files_of_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searched(tmp_path, monkeypatch, 1)
    factors = study.context.factorisation
    content = pickle.dumps(factors)
    model = sum(p.nbytes for p in factors.model.parameters())
    files = sum(x.stat().st_size for x in tmp_path.rglob("*.safetensors"))
    assert len(content) - model < files // 4
    again = pickle.loads(content)
    for name, layer in factors.layers.items():
        found = again.layers[name]
        assert found.layer == layer.layer and found.file == layer.file
        assert found.errors() == layer.errors()
        for choice in layer.layer.choices[::7]:
            assert torch.equal(found.folded(choice)[0], layer.folded(choice)[0])
    best = study.best
    evaluator = pickle.loads(pickle.dumps(study.evaluator))
    assert evaluator.evaluate(best.allocation)["loss"] == pytest.approx(best.metrics["loss"])
    sent = shared_bytes(study.evaluator)
    assert sent < shared_bytes(searched(tmp_path, monkeypatch, 1 << 40).evaluator)
    shutil.rmtree(tmp_path / "factors")
    with pytest.raises(UsageError, match=r"not on this machine.*RANKNAS_CACHE"):
        pickle.loads(content)


def test_workers_search_a_streamed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    study = searched(tmp_path, monkeypatch, 1, workers=2)
    assert len(study.trials) == 3
    study.evaluator.forget()
    for trial in study.trials:
        found = study.evaluator.evaluate(trial.allocation)
        assert found["loss"] == pytest.approx(trial.metrics["loss"], rel=1e-5)
