"""The search as a whole, through the Python API."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.allocation import Allocation
from rankNAS.exceptions import (
    BudgetError,
    DataError,
    ObjectiveError,
    RankNASError,
    StudyError,
    UnknownNameError,
    UsageError,
)
from rankNAS.models.artifact import read_metadata
from rankNAS.recovery.config import Refinement, TrainingConfig
from rankNAS.search_spaces.compiler import count_macs
from rankNAS.strategies import Energy, OneShot, Random, Request, Uniform
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.history import History
from rankNAS.strategies.problem import Problem

Pair = tuple[TensorDataset, TensorDataset]


def search(model: nn.Module, data: Pair, **kwargs: object) -> rankNAS.Study:
    settings = rankNAS.Settings(calibration=64, validation=50)
    defaults = {"budget": {"macs": 0.5}, "strategy": "random", "n_trials": 4, "settings": settings}
    return rankNAS.search(model, data, **(defaults | kwargs))  # type: ignore[arg-type]


def test_best_meets_the_budget_in_the_materialised_network(
    small_net: nn.Module, small_data: Pair
) -> None:
    study = search(small_net, small_data)
    network = study.materialise()
    x = torch.zeros(1, 3, 8, 8)
    assert count_macs(network, x) == study.best.metrics["macs"]
    assert count_macs(network, x) <= 0.5 * count_macs(small_net, x)
    assert sum(p.numel() for p in network.parameters()) == study.best.metrics["params"]


def test_best_is_the_best_trial(small_net: nn.Module, small_data: Pair) -> None:
    study = search(small_net, small_data, objectives=["loss"], n_trials=6)
    assert len(study.trials) == 6
    assert study.best.metrics["loss"] == min(t.metrics["loss"] for t in study.trials)


def test_refinement_concerns_the_network_and_not_the_trials(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    plain = search(small_net, small_data)
    stages: list[str] = []
    config = Refinement(samples=64, steps=20, learning_rate=3e-3, batch_size=8)
    settings = rankNAS.Settings(calibration=64, validation=50, refine=config)
    study = search(
        small_net,
        small_data,
        settings=settings,
        on_progress=lambda stage, done, total: stages.append(stage),
    )
    assert [t.metrics for t in study.trials] == [t.metrics for t in plain.trials]
    assert "refine" not in stages
    network = study.materialise()
    assert "refine" in stages and study.cpu_seconds["refine"] > 0
    found = study.metrics_of(study.best, network)
    assert (
        found["kl_divergence"]
        < plain.measure(plain.materialise(), plain.splits.validation)["kl_divergence"]
    )
    assert found["macs"] == study.best.metrics["macs"]
    metadata = read_metadata(study.save(tmp_path / "a.safetensors", network=network))
    assert json.loads(metadata["metrics"])["kl_divergence"] == found["kl_divergence"]
    assert pickle.loads(pickle.dumps(study.evaluator)).refiner is None


def test_several_budgets_hold_together(small_net: nn.Module, small_data: Pair) -> None:
    budget = {"macs": 0.6, "params": 0.4}
    study = search(small_net, small_data, budget=budget)
    for trial in study.trials:
        for name, fraction in budget.items():
            assert trial.metrics[name] <= fraction * study.dense[name]


def test_a_latency_budget_follows_the_hardware_model(
    small_net: nn.Module, small_data: Pair
) -> None:
    hardware = rankNAS.CallableModel(lambda layer, choice: layer[choice].params * 1e-9)
    study = search(small_net, small_data, budget={"latency": 0.5}, hardware=hardware)
    for trial in study.trials:
        assert trial.metrics["predicted_latency"] <= 0.5 * study.dense["predicted_latency"]


def test_equal_seeds_give_equal_trials(small_net: nn.Module, small_data: Pair) -> None:
    first, second = (search(small_net, small_data, seed=3) for _ in range(2))
    assert [(t.allocation, t.values) for t in first.trials] == [
        (t.allocation, t.values) for t in second.trials
    ]
    other = search(small_net, small_data, seed=4)
    assert [t.allocation for t in other.trials] != [t.allocation for t in first.trials]


@pytest.mark.parametrize("strategy", ["random", "bo"])
def test_a_resumed_search_equals_an_uninterrupted_one(
    small_net: nn.Module, small_data: Pair, tmp_path: Path, strategy: str
) -> None:
    whole = search(small_net, small_data, n_trials=8, strategy=strategy)
    storage = f"sqlite:///{tmp_path}/study.db"
    for n_trials, resume in ((3, False), (8, True)):
        study = search(
            small_net,
            small_data,
            n_trials=n_trials,
            strategy=strategy,
            storage=storage,
            resume=resume,
        )
    assert [(t.allocation, t.values) for t in study.trials] == [
        (t.allocation, t.values) for t in whole.trials
    ]


def test_an_existing_study_needs_resume(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    search(small_net, small_data, storage=storage)
    with pytest.raises(StudyError, match="exists already, with 4 trials: add --resume"):
        search(small_net, small_data, storage=storage)


def test_another_configuration_is_refused_and_named(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    search(small_net, small_data, storage=storage)
    with pytest.raises(StudyError, match=r"costs was \['macs'\], is \['params'\]"):
        search(small_net, small_data, storage=storage, resume=True, budget={"params": 0.6})
    with torch.no_grad():
        small_net.head.weight += 1  # type: ignore[operator, union-attr]
    with pytest.raises(StudyError, match="weights was"):
        search(small_net, small_data, storage=storage, resume=True)


class Plain(Strategy):
    """Not a dataclass, so it prints as its address."""

    name = "plain"

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        return Uniform().propose(problem, history, n, rng)


def test_a_study_of_a_plain_strategy_goes_on(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    options = {"storage": f"sqlite:///{tmp_path}/study.db", "resume": True}
    studies = [search(small_net, small_data, strategy=Plain(), **options) for _ in range(2)]
    assert len(studies[1].trials) == len(studies[0].trials) > 0


def test_a_study_goes_on_under_another_budget(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    before = search(small_net, small_data, storage=storage).trials
    options = {"storage": storage, "resume": True, "budget": {"macs": 0.7}}
    second = search(small_net, small_data, **options)
    assert [t.allocation for t in second.trials[:4]] == [t.allocation for t in before]
    assert len(second.trials) == 8
    feasible = [t for t in second.trials if t.metrics["macs"] <= 0.7 * second.dense["macs"]]
    assert len(feasible) == 8  # what met the tighter budget counts
    assert second.best.values[0] == max(t.values[0] for t in feasible)


def test_several_answers_share_trials(small_net: nn.Module, small_data: Pair) -> None:
    budgets = [{"macs": 0.7}, {"macs": 0.5}]
    study = search(small_net, small_data, budget=budgets, n_trials=3)
    assert [t.budget_key for t in study.trials] == ["macs<=0.7"] * 3 + ["macs<=0.5"] * 3
    for problem, budget in zip(study.problems, budgets, strict=True):
        best = study.solution(problem)
        met = [
            t for t in study.trials if t.metrics["macs"] <= budget["macs"] * study.dense["macs"]
        ]
        assert best.values[0] == max(t.values[0] for t in met)
    with pytest.raises(UsageError, match="twice"):
        search(small_net, small_data, budget=[{"macs": 0.5}, {"macs": 0.5}])


class Diverging(Strategy):
    """Its own training fails."""

    name = "diverging"

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[rankNAS.Allocation]:
        raise ObjectiveError("the loss is nan in epoch 3, in layer 'conv2'")


def test_a_strategy_that_fails_is_on_record(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(ObjectiveError, match="epoch 3, in layer 'conv2'"):
        search(small_net, small_data, strategy=Diverging(), storage=storage)
    (trial,) = optuna.load_study(study_name="study", storage=storage).trials
    assert trial.state == optuna.trial.TrialState.FAIL
    assert "epoch 3" in trial.user_attrs["reason"]


class Refusing(OneShot):
    """Cannot do anything."""

    name = "refusing"

    def check(self, request: Request) -> None:
        raise UsageError(f"no: {dict(request.budget)}, {request.training}")

    def solve(self, problem: Problem) -> rankNAS.Allocation:
        raise AssertionError


def test_what_a_strategy_cannot_do_is_said_before_any_work(
    small_net: nn.Module, small_data: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankNAS.pipeline.compile_space", lambda *_, **__: pytest.fail("worked"))
    size = len(small_data[0]) - 50
    with pytest.raises(UsageError, match=rf"no: {{'macs': 0.5}}, {size}"):
        search(small_net, small_data, strategy=Refusing())


class Probing(Strategy):
    """Measures every layer alone at its cheapest, then proposes the min-max allocation."""

    name = "probing"

    def probes(self, problem: Problem, history: History) -> list[rankNAS.Allocation]:
        last = [len(e) - 1 for e in problem.errors]
        rows = np.diag(last)[::-1].tolist()
        return [problem.allocation(row) for row in rows]

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[rankNAS.Allocation]:
        assert all(a in history.found for a in self.probes(problem, history))
        return Energy().propose(problem, history, n, rng)


def test_probes_come_first_once_and_are_no_answers(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    options = {"strategy": Probing(), "storage": storage, "budget": {"macs": 0.5}}
    study = search(small_net, small_data, **options)
    layers = len(study.problem.choices)
    assert [t.probe for t in study.trials] == [True] * layers + [False]
    assert study.best == study.trials[-1]
    assert any(t.metrics["macs"] > 0.5 * study.dense["macs"] for t in study.trials[:layers])
    assert study.store.study.best_trials[0].number == layers  # Optuna too knows what counts
    again = search(small_net, small_data, **(options | {"resume": True, "budget": {"macs": 0.6}}))
    assert [t.probe for t in again.trials[layers + 1 :]] == [False]


def test_custom_objectives_and_the_pareto_front(small_net: nn.Module, small_data: Pair) -> None:
    def largest_weight(network: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
        assert not network.training and len(data[0]) == 50
        return max(float(p.abs().max()) for p in network.parameters())

    objectives = ["loss", rankNAS.Objective(largest_weight, direction="minimize")]
    study = search(small_net, small_data, objectives=objectives, n_trials=8)
    front = {t.number for t in study.pareto_front()}
    for trial in study.trials:
        dominated = any(
            all(a <= b for a, b in zip(other.values, trial.values, strict=True))
            and other.values != trial.values
            for other in study.trials
        )
        assert (trial.number in front) == (not dominated)


def test_a_failing_objective_fails_its_trial_alone(small_net: nn.Module, small_data: Pair) -> None:
    calls = []

    def every_third_is_nan(network: nn.Module, data: object) -> float:
        calls.append(1)
        return math.nan if len(calls) % 3 == 0 else len(calls)

    objective = rankNAS.Objective(every_third_is_nan)
    study = search(small_net, small_data, objectives=[objective], n_trials=7)
    assert [t.state for t in study.trials] == ["complete", "complete", "failed"] * 2 + ["complete"]
    assert "not a finite number" in study.trials[2].reason
    assert study.best.number == 6


def test_three_failures_in_a_row_stop_the_search(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    def broken(network: nn.Module, data: object) -> float:
        raise ZeroDivisionError("of mine")

    storage = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(
        ObjectiveError, match="3 trials in a row failed.*ZeroDivisionError: of mine"
    ):
        search(
            small_net,
            small_data,
            objectives=[rankNAS.Objective(broken)],
            storage=storage,
            name="x",
        )


def test_one_shot_strategies_stop_after_their_proposal(
    small_net: nn.Module, small_data: Pair
) -> None:
    assert len(search(small_net, small_data, strategy=Energy()).trials) == 1


def test_a_strategy_that_breaks_the_budget_is_refused(
    small_net: nn.Module, small_data: Pair
) -> None:
    class Wrong(Strategy):
        name = "wrong"

        def propose(
            self, problem: Problem, history: History, n: int, rng: np.random.Generator
        ) -> list[rankNAS.Allocation]:
            return [problem.allocation([0] * len(problem.errors))]

    with pytest.raises(RankNASError, match="'wrong' proposed an allocation that breaks"):
        search(small_net, small_data, strategy=Wrong())


def test_the_model_is_not_changed(small_net: nn.Module, small_data: Pair) -> None:
    small_net.train()
    before = {k: v.clone() for k, v in small_net.state_dict().items()}
    search(small_net, small_data)
    assert small_net.training
    assert all(torch.equal(v, before[k]) for k, v in small_net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in small_net.parameters())


def test_to_pandas_has_a_row_a_trial_and_a_column_a_layer(
    small_net: nn.Module, small_data: Pair
) -> None:
    study = search(small_net, small_data)
    table = study.to_pandas()
    assert len(table) == 4
    layers = {f"layer:{name}" for name in study.problem.choices}
    assert layers <= set(table.columns)
    assert list(table["macs"]) == [t.metrics["macs"] for t in study.trials]


def test_save_and_load(small_net: nn.Module, small_data: Pair, tmp_path: Path) -> None:
    study = search(small_net, small_data)
    path = study.save(tmp_path / "small.safetensors")
    again = rankNAS.load(path, type(small_net))
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(again(x), study.materialise()(x))


def test_progress_is_reported(small_net: nn.Module, small_data: Pair) -> None:
    stages: dict[str, tuple[int, int]] = {}
    trials: list[int] = []
    search(
        small_net,
        small_data,
        on_progress=lambda name, done, total: stages.update({name: (done, total)}),
        on_trial=lambda trial, best: trials.append(trial.number),
    )
    assert set(stages) == {"calibrate", "factorise"}
    assert all(done == total for done, total in stages.values())
    assert trials == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strategy": "bow"}, UnknownNameError, "Did you mean 'bo'"),
        ({"strategy": 3}, UsageError, "a name or a Strategy, got int"),
        ({"objectives": ["acuracy"]}, UnknownNameError, "Did you mean 'accuracy'"),
        ({"objectives": []}, UsageError, "at least one objective"),
        ({"objectives": ["loss", "loss"]}, UsageError, "different names"),
        (
            {"objectives": [rankNAS.Objective(lambda network, data: 0.0, name="macs")]},
            UsageError,
            "has the name of a cost, 'macs'",
        ),
        ({"budget": {"macs": 0.0}}, BudgetError, r"in \(0, 1\]"),
        ({"budget": {"macs": 1.5}}, BudgetError, r"in \(0, 1\]"),
        ({"budget": {"mac": 0.5}}, UnknownNameError, "Did you mean 'macs'"),
        ({"budget": {"macs": 0.001}}, BudgetError, "smallest possible is 0"),
        ({"n_trials": 0}, UsageError, "at least 1, got 0"),
        ({"hardware": "hots", "budget": {"latency": 0.5}}, UnknownNameError, "'host'"),
    ],
)
def test_bad_arguments(
    small_net: nn.Module,
    small_data: Pair,
    change: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        search(small_net, small_data, **change)


def test_the_smallest_possible_budget_of_the_message_is_possible(
    small_net: nn.Module, small_data: Pair
) -> None:
    with pytest.raises(BudgetError) as caught:
        search(small_net, small_data, budget={"macs": 0.001})
    smallest = float(str(caught.value).rpartition(" is ")[2].rstrip("."))
    assert search(small_net, small_data, budget={"macs": smallest}, strategy=Random()).trials


def test_labels_beyond_the_outputs_are_refused_before_anything_is_written(
    small_net: nn.Module, small_data: Pair, tmp_path: Path
) -> None:
    small_data[0].tensors[1][7] = 4
    with pytest.raises(DataError, match="item 7 of the train split has the label 4"):
        search(small_net, small_data, storage=f"sqlite:///{tmp_path}/study.db")
    assert not list(tmp_path.iterdir())


def test_trials_that_train_are_measured_after_it(small_net: nn.Module, small_data: Pair) -> None:
    config = TrainingConfig(4, batch_size=20, learning_rate=0.01, distill=0.5, augment=False)
    settings = rankNAS.Settings(
        calibration=64, validation=50, early_stopping=True, recovery=config, recovery_samples=80
    )
    study = search(small_net, small_data, settings=settings, n_trials=9, objectives=["loss"])
    plain = search(small_net, small_data, n_trials=9, objectives=["loss"])
    assert [t.allocation for t in study.trials] == [t.allocation for t in plain.trials]
    states = [t.state for t in study.trials]
    assert "pruned" in states and "complete" in states
    for trial, untrained in zip(study.trials, plain.trials, strict=True):
        assert trial.metrics["loss@1"] != untrained.metrics["loss"]
        if trial.state == "complete":
            assert trial.metrics["loss@1"] != trial.metrics["loss@2"] != trial.metrics["loss"]
            network = study.materialise(trial.allocation)
            x, y = study.splits.validation.batch()
            loss = nn.functional.cross_entropy(network(x), y).item()
            assert loss == pytest.approx(trial.metrics["loss"], rel=1e-4)
        else:
            assert trial.reason.endswith("of 4 epochs")


def test_trainings_that_cannot_be_are_refused(small_net: nn.Module, small_data: Pair) -> None:
    with pytest.raises(UsageError, match="two or more"):
        rankNAS.Settings(early_stopping=True, recovery=TrainingConfig(1))
    with pytest.raises(UsageError, match="recovery_samples.*at least 1"):
        rankNAS.Settings(recovery_samples=0)
    settings = rankNAS.Settings(calibration=64, validation=50, recovery=TrainingConfig(1))
    with pytest.raises(UsageError, match="leave `Settings.recovery` out"):
        rankNAS.compare(small_net, small_data, ["energy"], [{"macs": 0.5}], [0], settings=settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "`seed` must be a whole number from 0 to 4294967295, got -1"),
        ({"seed": 10**24}, "`seed` must be a whole number"),
        ({"seed": 0.5}, "`seed` must be a whole number"),
        ({"device": "banana"}, "`device` 'banana' cannot be used on this machine"),
        ({"device": "cuda:99"}, "`device` 'cuda:99' cannot be used on this machine"),
    ],
)
def test_nonsense_ends_before_any_work(options: dict[str, Any], message: str) -> None:
    def untouched(*given: object) -> nn.Module:
        raise AssertionError("it was read")

    with pytest.raises(UsageError, match=message):
        search(untouched, "imagefolder:nowhere", **options)  # type: ignore[arg-type]
    given = {"seeds": [options.get("seed", 0)], "device": options.get("device", "cpu")}
    with pytest.raises(UsageError, match=message):
        rankNAS.compare(untouched, "imagefolder:nowhere", ["solve"], [{"macs": 0.5}], **given)
