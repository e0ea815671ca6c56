"""Weights that a strategy trains: in the evaluator, the answer, the artifact and the rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.exceptions import WeightsError
from rankNAS.io.tensors import read_tensors
from rankNAS.recovery.config import TrainingConfig
from rankNAS.reporting.comparison import labels_note, markdown, tables
from rankNAS.reporting.latex import latex
from rankNAS.strategies import Haloc, Uniform
from rankNAS.strategies.base import Proposal
from rankNAS.strategies.history import History

Pair = tuple[TensorDataset, TensorDataset]
SETTINGS = rankNAS.Settings(calibration=64, validation=50)
HALOC = Haloc(epochs=2, steps=4, batch_size=16, weight_rate=0.05, keep=True)


def search(model: nn.Module, data: Pair, **options: Any) -> rankNAS.Study:
    defaults: dict[str, Any] = {"budget": {"macs": 0.5}, "strategy": HALOC, "n_trials": 2}
    return rankNAS.search(model, data, **(defaults | {"settings": SETTINGS} | options))


def test_the_answer_has_the_trained_weights(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    study = search(small_net, small_data, storage=storage)
    best = study.best
    state, _ = read_tensors(Path(best.weights))
    network = study.materialise()
    assert all(torch.equal(state[name], x) for name, x in network.state_dict().items())
    truncated = study.evaluator.network(best.allocation)
    assert not torch.equal(truncated.state_dict()["head.weight"], state["head.weight"])
    found = study.measure(copy.deepcopy(network), study.splits.validation)
    for name, value in found.items():
        assert best.metrics[name] == pytest.approx(value, abs=1e-6), name
    assert study.evaluator.evaluate(best.allocation)["loss"] != best.metrics["loss"]
    file = study.save(tmp_path / "best.safetensors")
    again = rankNAS.load(file, lambda: copy.deepcopy(small_net))
    x = small_data[1].tensors[0]
    assert torch.equal(again(x), network(x))
    resumed = search(small_net, small_data, storage=storage, resume=True, n_trials=3)
    assert resumed.best == best and resumed.best.weights
    assert torch.equal(resumed.materialise()(x), network(x))
    Path(best.weights).write_bytes(b"")
    with pytest.raises(WeightsError, match="no weights file"):
        resumed.materialise()
    Path(best.weights).unlink()
    with pytest.raises(WeightsError, match="no longer at"):
        resumed.materialise()


def test_weights_that_are_not_kept_are_those_of_the_dense_network(
    small_net: nn.Module, small_data: Pair
) -> None:
    kept = search(small_net, small_data)
    study = search(small_net, small_data, strategy=replace(HALOC, keep=False))
    assert study.best.allocation == kept.best.allocation and not study.best.weights
    plain = study.evaluator.network(study.best.allocation)
    assert torch.equal(study.materialise().state_dict()["head.weight"], plain.head.weight)


def test_trials_that_train_begin_with_them(small_net: nn.Module, small_data: Pair) -> None:
    config = TrainingConfig(1, max_steps=1, learning_rate=1e-9, weight_decay=0.0)
    trained = search(small_net, small_data, settings=replace(SETTINGS, recovery=config))
    state, _ = read_tensors(Path(trained.best.weights))
    torch.testing.assert_close(
        trained.materialise().state_dict()["head.weight"], state["head.weight"]
    )


def test_rows_are_marked_if_the_search_saw_labels(small_net: nn.Module, small_data: Pair) -> None:
    data = {"budgets": [{"macs": 0.5}], "seeds": [0], "n_trials": 1, "settings": SETTINGS}
    rows = rankNAS.compare(small_net, small_data, {"haloc": HALOC, "uniform": Uniform()}, **data)
    assert dict(zip(rows.strategy, rows.labels, strict=True)) == {
        "dense": 0,
        "haloc": 1,
        "uniform": 0,
    }
    (_, body), *_ = tables(rows).values()
    assert {line[0] for line in body} == {"haloc †", "uniform"}
    assert "† marks" in labels_note(rows) and labels_note(rows) in markdown(rows, "", "")
    assert r"$\dagger$ marks" in latex(rows)
    few = rows[rows.strategy != "haloc"]
    assert labels_note(few) == "" and "†" not in markdown(few, "", "")
    inputs = small_data[0].tensors[0]
    alone = rankNAS.compare(small_net, inputs, {"haloc": HALOC}, **data)
    assert (alone.status == "ok").all() and (alone.labels == 0).all()


def test_other_strategies_propose_without_weights(small_net: nn.Module, small_data: Pair) -> None:
    study = search(small_net, small_data, strategy="uniform")
    rng: Any = None
    found = Uniform().proposals(study.problem, History(), 1, rng)
    assert found == [Proposal(a) for a in Uniform().propose(study.problem, History(), 1, rng)]
    assert found[0].weights is None and study.best.weights == ""


@pytest.mark.parametrize("better", [True, False])
def test_weights_are_kept_where_they_are_better(
    small_net: nn.Module, small_data: Pair, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    """The divergence of trained weights is compared with that of the original ones, refitted."""
    evaluate = Evaluator.evaluate

    def shifted(self: Evaluator, *args: Any, weights: str = "", **options: Any) -> Any:
        found = evaluate(self, *args, weights=weights, **options)
        if weights:
            found["kl_divergence"] += -100.0 if better else 100.0
        return found

    monkeypatch.setattr(Evaluator, "evaluate", shifted)
    study = search(small_net, small_data, strategy=replace(HALOC, keep=None))
    assert bool(study.weights_of(study.best.allocation)) == better
