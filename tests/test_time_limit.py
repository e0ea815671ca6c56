"""Searches that a time limit ends, by a clock of the tests."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from clocks import Clock
from scipy.optimize import milp
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.allocation import Allocation, Choice
from rankNAS.deadline import Deadline, TimeLimitError, check_time, limited_by
from rankNAS.execution.parallel import Workers
from rankNAS.hw_models.timing import interleaved
from rankNAS.recovery.config import TrainingConfig
from rankNAS.search_spaces.base import Layer
from rankNAS.search_spaces.compiler import compile_space, count_macs
from rankNAS.solver.min_sum import min_sum
from rankNAS.strategies import Beam, Energy, Haloc, Solve, Uniform
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.bayesian.surrogate import fitted
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.spectra import LayerSpectra, make_spectra
from rankNAS.strategies.supernet.network import SuperNet

Pair = tuple[TensorDataset, TensorDataset]
SETTINGS = rankNAS.Settings(calibration=64, validation=50)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def search(model: nn.Module, data: Pair, **options: Any) -> rankNAS.Study:
    defaults = {"budget": {"macs": 0.5}, "strategy": "random", "n_trials": 4, "time_limit": 9.0}
    return rankNAS.search(model, data, **(defaults | {"settings": SETTINGS} | options))


def trials_of(study: rankNAS.Study) -> list[tuple[Allocation, tuple[float, ...]]]:
    return [(t.allocation, t.values) for t in study.trials]


@pytest.mark.parametrize("stage", ["calibrate", "factorise"])
def test_before_there_are_tables_the_answer_is_uniform(
    small_net: nn.Module,
    small_data: Pair,
    clock: Clock,
    stage: str,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    with caplog.at_level(logging.WARNING):
        study = search(
            small_net,
            small_data,
            budget=[{"macs": 0.5}, {"macs": 0.4, "params": 0.45}],
            on_progress=clock.at(stage),
            storage=storage,
            settings=replace(SETTINGS, norm="pooled"),  # in two batches
        )
    assert not study.trials and study.ended == stage
    assert "uniform allocation" in study.limit_note and study.limit_note in caplog.text
    assert ("without statistics" in study.limit_note) == (stage == "calibrate")
    x = torch.zeros(1, 3, 8, 8)
    for problem in study.problems:
        answer = study.solution(problem)
        network = study.materialise(answer.allocation)
        assert count_macs(network, x) == answer.metrics["macs"]
        for name, fraction in problem.budget.items():
            assert answer.metrics[name] <= fraction * study.dense[name]
        assert answer.metrics["macs"] > 0.5 * problem.budget["macs"] * study.dense["macs"]
    assert rankNAS.load(
        study.save(tmp_path / "best.safetensors"), lambda: copy.deepcopy(small_net)
    )
    clock.now = 0.0
    # Nothing of it is in the storage: the same search goes on as if it had never been begun.
    later = search(small_net, small_data, storage=storage, resume=True)
    assert later.ended is None and trials_of(later) == trials_of(search(small_net, small_data))


def test_during_the_trials_the_answer_is_the_best_so_far(
    small_net: nn.Module, small_data: Pair, clock: Clock, tmp_path: Path
) -> None:
    whole = search(small_net, small_data, time_limit=None)

    def on_trial(trial: Trial, best: Trial | None) -> None:
        if trial.number == 1:
            clock.end()

    storage = f"sqlite:///{tmp_path}/study.db"
    study = search(small_net, small_data, on_trial=on_trial, storage=storage)
    assert trials_of(study) == trials_of(whole)[:2]
    assert study.best.values[0] == max(t.values[0] for t in study.trials)
    assert study.ended == "trials" and "best trial so far" in study.limit_note
    over = Deadline(5.0, started=0.0)
    again = search(small_net, small_data, storage=storage, resume=True, time_limit=over)
    assert trials_of(again) == trials_of(whole)[:2] and again.best == study.best
    clock.now = 0.0
    resumed = search(small_net, small_data, storage=storage, resume=True)
    assert trials_of(resumed) == trials_of(whole) and not resumed.limit_note


@dataclass(frozen=True)
class Ending(Strategy):
    """Proposes the uniform answer; the time ends before it is evaluated."""

    clock: Clock
    name = "ending"

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        self.clock.end()
        return Uniform().propose(problem, history, n, rng)


def test_a_trial_in_progress_is_abandoned_and_not_recorded(
    small_net: nn.Module, small_data: Pair, clock: Clock, tmp_path: Path
) -> None:
    settings = rankNAS.Settings(
        calibration=64, validation=50, recovery=TrainingConfig(1), recovery_samples=32
    )
    study = search(small_net, small_data, strategy=Ending(clock), settings=settings)
    assert not study.trials and not study.store.others() and study.context.complete
    assert study.ended == "trials" and study.best.number < 0
    assert study.best.allocation == Uniform().solve(study.problem)
    assert "uniform" in study.limit_note and "statistics" not in study.limit_note
    assert study.save(tmp_path / "best.safetensors").is_file()  # without a training
    assert study.evaluator.evaluate(study.best.allocation) == study.best.metrics


def test_a_training_of_a_strategy_is_abandoned(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    strategy = Haloc(epochs=2, steps=3, batch_size=8)
    study = search(small_net, small_data, strategy=strategy, on_progress=clock.at("haloc", 4))
    assert not study.trials and study.ended == "trials"
    assert study.best.metrics["macs"] <= 0.5 * study.dense["macs"]


def test_probes_that_meet_the_budget_are_answers_too(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    def on_trial(trial: Trial, best: Trial | None) -> None:
        clock.end()

    study = search(small_net, small_data, strategy="auto", on_trial=on_trial)
    assert len(study.trials) == 1 and study.trials[0].probe
    assert study.best.metrics["macs"] <= 0.5 * study.dense["macs"]


def test_a_limit_that_does_not_end_changes_nothing(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    study = search(small_net, small_data, strategy="bo", n_trials=6)
    assert study.ended is None and study.limit is None and not study.limit_note
    other = search(small_net, small_data, strategy="bo", n_trials=6, time_limit=None)
    assert trials_of(study) == trials_of(other)


def test_a_budget_on_latency_holds_after_the_limit(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    def seconds(layer: Layer, choice: Choice) -> float:
        clock.end()
        return layer[choice].params * 1e-9

    hardware = rankNAS.CallableModel(seconds)
    study = search(small_net, small_data, budget={"latency": 0.6}, hardware=hardware)
    assert study.ended == "calibrate"
    assert study.best.metrics["predicted_latency"] <= 0.6 * study.dense["predicted_latency"]


def test_latency_is_measured_for_few_choices_once_the_time_has_ended(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    def measured(ending: bool) -> tuple[rankNAS.Study, int]:
        calls = 0

        def seconds(layer: Layer, choice: Choice) -> float:
            nonlocal calls
            calls += 1
            if ending:
                clock.end()
            return layer[choice].params * 1e-9

        hardware = rankNAS.CallableModel(seconds)
        return search(small_net, small_data, budget={"latency": 0.6}, hardware=hardware), calls

    (whole, many), (study, few) = measured(False), measured(True)
    layers = whole.context.factorisation.space.layers
    assert few <= 1 + 8 * len(layers) and many > 2 * few
    assert study.best.metrics["predicted_latency"] <= 0.6 * study.dense["predicted_latency"]
    assert "uniform allocation" in study.limit_note and not study.context.complete


def test_latency_that_no_budget_bounds_is_abandoned(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    calls = 0

    def seconds(layer: Layer, choice: Choice) -> float:
        nonlocal calls
        calls += 1
        clock.end()
        return 1e-3

    hardware = rankNAS.CallableModel(seconds)
    study = search(small_net, small_data, strategy="hw-filter", hardware=hardware)
    assert calls == 1 and study.ended == "time" and "without statistics" in study.limit_note
    assert study.best.metrics["macs"] <= 0.5 * study.dense["macs"]


@dataclass(frozen=True)
class Slow(Strategy):
    """Ends the time as it is bound, or as it proposes."""

    clock: Clock
    binds: bool
    name = "slow"
    needs_spectra = ("energy",)

    def bind(self, spectra: Mapping[str, LayerSpectra]) -> Strategy:
        if self.binds:
            self.clock.end()
            check_time()
        return self

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        self.clock.end()
        return Uniform().propose(problem, history, n, rng)


@pytest.mark.parametrize("binds", [True, False])
def test_a_strategy_is_abandoned_while_it_is_bound_and_while_it_proposes(
    small_net: nn.Module, small_data: Pair, clock: Clock, binds: bool
) -> None:
    study = search(small_net, small_data, strategy=Slow(clock, binds))
    assert not study.trials and study.context.complete and "uniform" in study.limit_note
    assert study.ended == ("prepare" if binds else "trials")
    assert study.best.allocation == Uniform().solve(study.problem)


def test_spectra_are_abandoned(
    small_net: nn.Module, small_data: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    factorisation = search(small_net, small_data).context.factorisation

    def slow(weight: torch.Tensor, groups: int) -> np.ndarray:
        clock.end()
        return np.zeros(1)

    monkeypatch.setattr("rankNAS.strategies.spectra.spectral_errors", slow)
    with limited_by(Deadline(9.0)), pytest.raises(TimeLimitError):
        make_spectra(factorisation, ["weight"])


def test_a_long_proposal_is_abandoned(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    """Of the solver, of a beam, of fits of processes, and of a super-net between its batches."""
    problem = search(small_net, small_data, budget={"macs": 0.5, "params": 0.6}).problem
    clock.end()
    over = Deadline(1.0, started=0.0)
    for strategy in (Solve(), Energy(), Beam()):
        with limited_by(over), pytest.raises(TimeLimitError):
            strategy.propose(problem, History(), 1, np.random.default_rng(0))
    X, y = torch.rand(6, 3, dtype=torch.float64), torch.rand(6, 1, dtype=torch.float64)
    with limited_by(over), pytest.raises(TimeLimitError):
        fitted(X, y, 2, 2)
    net = SuperNet(small_net, compile_space(small_net, torch.zeros(1, 3, 8, 8)))
    with limited_by(over), pytest.raises(TimeLimitError):
        net.decompose()


def test_a_limit_reaches_the_integer_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def watched(*arguments: Any, options: dict[str, Any], **others: Any) -> Any:
        given.append(options.get("time_limit", np.inf))
        return milp(*arguments, options=options, **others)

    monkeypatch.setattr("rankNAS.solver.min_sum.milp", watched)
    table, costs = [np.array([0.0, 1.0, 3.0])] * 3, [[np.array([3.0, 2.0, 1.0])] * 3] * 2
    whole = min_sum(table, costs, [6.0, 6.0])  # two budgets, as one needs no integer solver
    with limited_by(Deadline(600.0)):
        assert min_sum(table, costs, [6.0, 6.0]) == whole
    assert given[0] == np.inf and 0 < given[-1] <= 600


def test_timing_is_abandoned(clock: Clock) -> None:
    ran: list[int] = []
    runs = [lambda: ran.append(0), clock.end, lambda: ran.append(2)]
    with limited_by(Deadline(1.0)), pytest.raises(TimeLimitError):
        interleaved(runs, rounds=9, seconds=9)
    assert set(ran) == {0}


@pytest.mark.slow
def test_workers_are_dismissed(
    small_net: nn.Module, small_data: Pair, clock: Clock, cluster: str
) -> None:
    def on_trial(trial: Trial, best: Trial | None) -> None:
        clock.end()

    workers = Workers(2, cluster)
    study = search(small_net, small_data, n_trials=30, workers=workers, on_trial=on_trial)
    assert 1 <= len(study.trials) < 30 and study.ended == "trials"
    assert study.cpu_seconds["trials"] > 0


def test_the_phases_of_a_search_are_known(small_net: nn.Module, small_data: Pair) -> None:
    study = search(small_net, small_data, strategy="auto", n_trials=2)
    study.test()
    expected = {
        "prepare",
        "calibrate",
        "factorise",
        "losses",
        "probes",
        "trials",
        "answer",
        "test",
    }
    assert expected == set(study.cpu_seconds)
    assert all(seconds >= 0 for seconds in study.cpu_seconds.values())


def test_one_call_has_a_limit_too(small_net: nn.Module, small_data: Pair) -> None:
    with pytest.raises(rankNAS.UsageError, match="time limit"):
        rankNAS.compress(small_net, small_data, budget=0.5, time_limit=0)


def compared(model: nn.Module, data: Pair, **options: Any) -> pd.DataFrame:
    given = {"strategies": ["random", "uniform"], "budgets": [{"macs": 0.6}, {"macs": 0.4}]}
    given |= {"seeds": [0], "n_trials": 3, "settings": SETTINGS, "time_limit": 9.0}
    return rankNAS.compare(model, data, **(given | options))


def test_a_comparison_without_time_for_tables_has_no_rows(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    rows = compared(small_net, small_data, on_progress=clock.at("factorise"), seeds=[0, 1])
    assert set(rows.status) == {"not searched: the time limit of 9 s had ended"}
    assert len(rows) == 10 and rows.test.isna().all()


def test_the_study_that_a_limit_ends_gives_its_best_answer(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    whole = compared(small_net, small_data, time_limit=None)
    assert (whole.note == "").all() and (whole.search_cpu_seconds >= 0).all()
    rows = compared(small_net, small_data, on_progress=clock.at("trials", 2))
    assert rows.status.tolist()[:2] == ["ok"] * 2
    assert set(rows.status[2:]) == {"not searched: the time limit of 9 s had ended"}
    assert rows.note[0] == "" and "best trial so far" in rows.note[1]
    assert rows.evaluations[1] == 2 and whole.evaluations[1] == 3
    clock.now = 0.0
    again = compared(small_net, small_data, earlier=rows)
    times = [name for name in rows if name.endswith("seconds")]
    pd.testing.assert_frame_equal(
        again.drop(columns=times).sort_values(["strategy", "budget"], ignore_index=True),
        whole.drop(columns=times).sort_values(["strategy", "budget"], ignore_index=True),
    )


def test_a_fine_tuning_that_a_limit_ends_is_no_result(
    small_net: nn.Module, small_data: Pair, clock: Clock
) -> None:
    rows = compared(
        small_net,
        small_data,
        strategies=["uniform"],
        training=TrainingConfig(2),
        on_progress=clock.at("finetune"),
    )
    assert rows.finetuned_test.isna().all() and rows.test[:2].notna().all()
    assert "during the fine-tuning" in rows.note[1] and "not searched" in rows.status[2]
