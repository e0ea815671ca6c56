"""Every strategy searches a language model whose factors lie in files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import VOCABULARY, tiny
from torch import Tensor

from rankNAS.compression import block_refit, paired_walk
from rankNAS.compression.block_refit import BlockRefit
from rankNAS.engine import search
from rankNAS.settings import Settings
from rankNAS.strategies import STRATEGIES
from rankNAS.study import Study

NAMES = sorted(set(STRATEGIES) - {"haloc", "hw-filter"})  # images, latency


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path))
    return tmp_path


def streamed(strategy: Any, *budgets: float, **options: Any) -> Study:
    """A search on a tiny Llama with hardly any memory."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (80, 24), generator=generator)
    items = [{"input_ids": x} for x in ids]
    return search(
        tiny("llama"),
        (items[:60], items[60:]),
        task="causal_lm",
        strategy=strategy,
        n_trials=options.pop("n_trials", 3),
        budget=[{"layer_params": kept} for kept in budgets],
        settings=Settings(calibration=32, validation=12, screening=8, memory=1),
        **options,
    )


@pytest.mark.parametrize("name", NAMES)
def test_strategies_search_with_factors_in_files(name: str) -> None:
    study = streamed(name, 0.6)
    factors = study.context.factorisation
    assert factors.streamed
    best = study.best
    assert best.metrics["layer_params"] <= 0.6 * study.dense["layer_params"]
    network = study.materialise()
    assert study.measure(network, study.splits.validation)["perplexity"] > 1
    assert factors.store is not None
    assert len(list(factors.store.folder.glob("*.safetensors"))) >= len(factors.layers)
    assert not any(isinstance(x, Tensor) for x in vars(study.strategy).values())


def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes note of every paired walk."""
    found: list[str] = []
    original = paired_walk.PairedWalk.sites

    def noted(self: Any, *args: Any) -> Any:
        found.append("walk")
        return original(self, *args)

    monkeypatch.setattr(paired_walk.PairedWalk, "sites", noted)
    return found


def test_a_further_budget_of_auto_takes_two_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = walks(monkeypatch)
    study = streamed("auto", 0.6, 0.4, 0.5, n_trials=9)
    by_budget = Counter(t.budget_key for t in study.trials if not t.probe)
    first, *others = (by_budget[problem.budget_key] for problem in study.problems)
    assert 1 <= first <= 3 and all(1 <= count <= 2 for count in others)
    assert sum(t.probe for t in study.trials) > len(study.problems)
    assert len(found) == first + sum(others)
    for problem in study.problems:
        study.materialise(study.solution(problem).allocation)
    assert len(found) == first + sum(others)  # what is measured is stored


def test_a_killed_search_goes_on_from_stored_refits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/study.db", "name": "killed"}
    original = block_refit.site_moments
    calls: list[int] = []

    def killed(pairs: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:  # in the second refit, which has eight sites
            raise KeyboardInterrupt
        return original(pairs)

    monkeypatch.setattr(block_refit, "site_moments", killed)
    with pytest.raises(KeyboardInterrupt):
        streamed("auto", 0.6, **options)
    study = streamed("auto", 0.6, resume=True, **options)
    refits = sum(not t.probe for t in study.trials)
    assert len(calls) == 8 * refits + 1
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(block_refit, "site_moments", original)
    whole = streamed("auto", 0.6)
    assert study.best.allocation == whole.best.allocation
    assert study.best.metrics == whole.best.metrics


def test_a_stored_refit_takes_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    study = streamed("uniform", 0.6)
    found = walks(monkeypatch)
    network = study.materialise()
    assert len(found) == 1
    refit = study.evaluator.backend.refit
    assert isinstance(refit, BlockRefit)
    again = refit.factors(study.best.allocation).materialise(study.best.allocation)
    assert len(found) == 1
    tensors: dict[str, Tensor] = again.state_dict()
    assert all(torch.equal(x, tensors[name]) for name, x in network.state_dict().items())
