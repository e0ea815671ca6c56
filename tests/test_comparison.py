"""Strategies side by side, on equal terms."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from networks import small, split
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.allocation import Allocation
from rankNAS.comparison import compare
from rankNAS.data.samples import Samples
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.exceptions import BudgetError, UnknownNameError, UsageError
from rankNAS.recovery.config import Refinement, TrainingConfig
from rankNAS.recovery.trainer import train
from rankNAS.reporting.comparison import markdown
from rankNAS.reporting.rows import COLUMNS, OK, Row, summarise
from rankNAS.strategies import Energy, Random, Uniform
from rankNAS.strategies.base import Request, Strategy
from rankNAS.strategies.history import History
from rankNAS.strategies.problem import Problem
from rankNAS.tasks.infer import infer_task

Pair = tuple[TensorDataset, TensorDataset]
SETTINGS = rankNAS.Settings(calibration=64, validation=50)
BUDGETS = [{"macs": 0.6}, {"macs": 0.4}]
TIMES = ["search_seconds", "setup_seconds", "search_cpu_seconds", "setup_cpu_seconds"]


def run(model: Any, data: Pair, strategies: Any, **kwargs: Any) -> pd.DataFrame:
    given = {"budgets": BUDGETS, "seeds": range(2), "n_trials": 3, "settings": SETTINGS}
    return compare(model, data, strategies, **(given | kwargs))


def accuracy(model: nn.Module, data: Pair) -> float:
    return network_metrics(
        copy.deepcopy(model), Samples.of(data[1]), infer_task(model, data[1][:32])
    )["accuracy"]


def untimed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=TIMES).sort_values(["seed", "strategy", "budget"], ignore_index=True)


@dataclass(frozen=True)
class Probing(Strategy):
    """Measures the dense network and the cheapest one, then proposes what `Uniform` would."""

    name = "probing"

    def probes(self, problem: Problem, history: History) -> list[Allocation]:
        cheapest = [len(e) - 1 for e in problem.errors]
        return [problem.allocation([0] * len(cheapest)), problem.allocation(cheapest)]

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        return Uniform().propose(problem, history, n, rng)


@dataclass(frozen=True)
class Refusing(Strategy):
    """Wants parameters to be bounded."""

    name = "refusing"

    def check(self, request: Request) -> None:
        if "params" not in request.budget:
            raise UsageError(f"`budget` must bound params, got {sorted(request.budget)}.")

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        raise AssertionError


@dataclass(frozen=True)
class Breaking(Strategy):
    """Answers budgets of at least a half, and fails at others."""

    name = "breaking"
    error: type[Exception] = ZeroDivisionError

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        if problem.budget["macs"] < 0.5:
            raise self.error("no such\nbudget")
        return Uniform().propose(problem, history, n, rng)


@dataclass(frozen=True)
class Unbound(Strategy):
    """Cannot look at the model."""

    name = "unbound"
    needs_spectra = ("energy",)

    def bind(self, spectra: object) -> Strategy:
        raise RuntimeError("nothing to see")

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        raise AssertionError


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_wrapped_models_are_compared_as_what_they_wrap(wrap: Any) -> None:
    torch.manual_seed(0)
    model, data = small(), split()
    given: dict[str, Any] = {
        "seeds": range(1),
        "n_trials": 1,
        "training": TrainingConfig(epochs=1),
    }
    expected = untimed(run(model, data, ["uniform"], **given))
    pd.testing.assert_frame_equal(untimed(run(wrap(model), data, ["uniform"], **given)), expected)
    per_seed = run(lambda seed: wrap(model), data, ["uniform"], **given)
    pd.testing.assert_frame_equal(untimed(per_seed), expected)


def test_rows_are_what_a_search_of_all_budgets_finds(
    small_net: nn.Module, small_data: Pair
) -> None:
    rows = run(small_net, small_data, ["random"])
    assert tuple(rows.columns) == COLUMNS and (rows.status == OK).all()
    assert rows.strategy.tolist() == ["dense", "random", "random"] * 2
    for seed in range(2):
        study = rankNAS.search(
            small_net,
            small_data,
            budget=BUDGETS,
            strategy="random",
            n_trials=3,
            settings=SETTINGS,
            seed=seed,
        )
        dense, *solutions = rows[rows.seed == seed].to_dict("records")
        assert dense["validation"] == study.dense["accuracy"]
        assert dense["test"] == accuracy(small_net, small_data)
        assert dense["test_divergence"] == 0
        for i, (row, problem) in enumerate(zip(solutions, study.problems, strict=True)):
            # When the first budget is answered, the trials for the second do not exist yet.
            then = History(study.trials[: 3 * (i + 1)])
            solution = study.strategy.select(problem, then)
            assert row["budget"] == problem.budget_key
            assert row["evaluations"] == 3 * (i + 1)
            network = study.materialise(solution.allocation)
            validation = study.measure(network, study.splits.validation)
            assert row["validation"] == validation["accuracy"]
            assert row["test"] == study.test(network)["accuracy"]
            x = small_data[1].tensors[0]
            with torch.no_grad():
                logs = [m(x).double().log_softmax(1) for m in (network, small_net)]
            divergence = nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)
            # Logits are float32: a divergence of some 1e-6 is not known to all its digits.
            assert row["test_divergence"] == pytest.approx(float(divergence), rel=1e-6, abs=1e-10)
            assert row["test_divergence"] > 0
            for name in ("macs", "params"):
                fraction = solution.metrics[name] / study.dense[name]
                assert row[f"{name}_fraction"] == pytest.approx(fraction, rel=1e-12)
            assert row["macs_fraction"] <= problem.budget["macs"]


def test_every_strategy_measures_for_itself(small_net: nn.Module, small_data: Pair) -> None:
    """Equal strategies propose equal networks; each pays for them."""
    calls = []

    def counted(network: nn.Module, data: object) -> float:
        calls.append(1)
        return 0.5

    def count(strategies: dict[str, Strategy]) -> int:
        calls.clear()
        run(
            small_net,
            small_data,
            strategies,
            seeds=[0],
            objectives=["accuracy", rankNAS.Objective(counted)],
        )
        return len(calls)

    once = count({"first": Random()})
    assert once == 3 * len(BUDGETS)
    assert count({"first": Random(), "second": Random()}) == 2 * once


def test_the_networks_of_every_strategy_are_refined(
    small_net: nn.Module, small_data: Pair
) -> None:
    config = Refinement(samples=64, steps=20, learning_rate=3e-3, batch_size=8)
    plain, refined = (
        run(small_net, small_data, ["uniform", "energy"], seeds=[0], settings=settings)
        for settings in (SETTINGS, replace(SETTINGS, refine=config))
    )
    assert refined.macs_fraction.tolist() == plain.macs_fraction.tolist()
    changed = refined.test_divergence != plain.test_divergence
    # A network that has random weights and hardly diverges may be left as it is.
    assert not changed[0] and changed.any()


def test_probes_are_counted_and_budgets_share_them(small_net: nn.Module, small_data: Pair) -> None:
    rows = run(small_net, small_data, [Probing(), "uniform"], seeds=[0])
    counts = rows.set_index(["strategy", "budget"]).evaluations
    assert counts["probing"].tolist() == [3, 4]
    assert counts["uniform"].tolist() == [1, 2]
    seconds = rows.set_index(["strategy", "budget"]).search_seconds
    assert 0 < seconds["probing", "macs<=0.6"] < seconds["probing", "macs<=0.4"]
    assert (rows.setup_seconds > 0).all() and rows.setup_seconds.nunique() == 1


def test_one_that_refuses_or_fails_does_not_stop_the_others(
    small_net: nn.Module, small_data: Pair
) -> None:
    rows = run(
        small_net, small_data, [Refusing(), Breaking(), Unbound(), "uniform"], seeds=[0]
    ).set_index(["strategy", "budget"])
    assert set(rows.loc["refusing"].status) == {"`budget` must bound params, got ['macs']."}
    assert set(rows.loc["unbound"].status) == {"RuntimeError: nothing to see"}
    assert rows.loc["breaking"].status.tolist() == [OK, "ZeroDivisionError: no such budget"]
    strict = run(small_net, small_data, [Breaking(BudgetError)], seeds=[0])
    assert strict.status.tolist() == [OK, OK, "no such budget"]
    assert (rows.loc["uniform"].status == OK).all()
    failed = rows[rows.status != OK]
    assert failed[["validation", "test", "search_seconds"]].isna().to_numpy().all()
    both = ["validation", "test", "macs_fraction"]
    assert rows.loc[("breaking", "macs<=0.6"), both].tolist() == (
        rows.loc[("uniform", "macs<=0.6"), both].tolist()
    )


def test_only_refusals_need_no_model(small_data: Pair) -> None:
    def model(seed: int) -> nn.Module:
        raise AssertionError

    rows = run(model, small_data, [Refusing()], seeds=[0])
    assert len(rows) == len(BUDGETS)


@pytest.fixture(scope="module")
def whole() -> pd.DataFrame:
    """The rows of a comparison that was not interrupted. Read them only, or copy them."""
    return run(small(), split(), ["random", "energy"])


@pytest.mark.parametrize("lost", [[1, 2], [4], [3], [0, 5], range(6, 12)])
def test_an_interrupted_comparison_goes_on_as_if_it_never_was(
    whole: pd.DataFrame, small_net: nn.Module, small_data: Pair, lost: Iterable[int]
) -> None:
    """Rows 0 to 5 are dense, random, random, bo, bo and a row of the other seed."""
    seeds: list[int] = []
    new: list[Row] = []

    def model(seed: int) -> nn.Module:
        seeds.append(seed)
        return small_net

    earlier = whole.drop(index=list(set(lost) & set(whole.index)))
    missing = whole.drop(index=earlier.index)
    rows = run(model, small_data, ["random", "energy"], earlier=earlier, on_row=new.append)
    pd.testing.assert_frame_equal(untimed(rows), untimed(whole))
    assert [row.key for row in new] == [
        tuple(key) for key in missing[["strategy", "budget", "seed"]].itertuples(index=False)
    ]
    assert seeds == missing.seed.unique().tolist()


def test_failures_are_tried_again(small_net: nn.Module, small_data: Pair) -> None:
    failed = run(small_net, small_data, {"mine": Breaking()}, seeds=[0])
    rows = run(small_net, small_data, {"mine": Uniform()}, seeds=[0], earlier=failed)
    assert (rows.status == OK).all()
    assert not rows.duplicated(["strategy", "budget", "seed"]).any()


def test_each_seed_has_its_own_model(small_net: nn.Module, small_data: Pair) -> None:
    """The other one says the rarest class whatever it sees."""
    other = copy.deepcopy(small_net)
    rarest = small_data[1].tensors[1].bincount().argmin()
    with torch.no_grad():
        other.head.bias[rarest] += 100
    models = [small_net, other]
    rows = run(lambda seed: models[seed], small_data, ["energy"])
    dense = rows[rows.strategy == "dense"].test.tolist()
    assert dense == [accuracy(m, small_data) for m in models]
    assert dense[0] != dense[1]


@pytest.mark.parametrize("samples", [None, 40, 10_000])
def test_fine_tuning_is_the_training_of_the_answer_on_samples_of_the_seed(
    small_net: nn.Module, small_data: Pair, samples: int | None
) -> None:
    config = TrainingConfig(8, learning_rate=0.05, distill=0.3, seed=99)
    rows = run(
        small_net,
        small_data,
        ["energy"],
        budgets=BUDGETS[:1],
        seeds=[1],
        training=config,
        training_samples=samples,
    )
    study = rankNAS.search(
        small_net, small_data, budget=BUDGETS[0], strategy="energy", settings=SETTINGS, seed=1
    )
    network, data = study.materialise(), study.splits.training
    if samples == 40:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
        data = data.take(order[:40].sort().values)
    train(network, data, replace(config, seed=1), teacher=small_net)
    solution = rows[rows.strategy == "energy"].iloc[0]
    assert solution.finetuned_test == study.test(network)["accuracy"]
    assert solution.finetuned_test != solution.test
    assert rows[rows.strategy == "dense"].finetuned_test.isna().all()


def test_progress_reaches_its_ends(small_net: nn.Module, small_data: Pair) -> None:
    last: dict[str, tuple[int, int]] = {}
    run(
        small_net,
        small_data,
        [Probing(), "random"],
        on_progress=lambda stage, done, total: last.update({stage: (done, total)}),
    )
    assert last["rows"] == (10, 10)
    assert {"calibrate", "factorise"} <= set(last)
    assert all(done == total for done, total in last.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strategies": []}, UsageError, "one or more with different names"),
        ({"strategies": ["bo", "bo"]}, UsageError, "a mapping gives them names"),
        ({"strategies": [Energy(), "energy"]}, UsageError, "a mapping gives them names"),
        ({"strategies": {"dense": "bo"}}, UsageError, "none of them 'dense'"),
        ({"strategies": ["bow"]}, UnknownNameError, "Did you mean 'bo'"),
        ({"n_trials": 0}, UsageError, "`n_trials` must be at least 1, got 0"),
        ({"training_samples": 0}, UsageError, "`training_samples` must be at least 1, got 0"),
        ({"budgets": [{"macs": 0.5}] * 2}, UsageError, "given twice"),
        ({"budgets": [{"macs": 1e-4}]}, UsageError, "the smallest possible is"),
    ],
)
def test_wrong_arguments_are_named(
    small_net: nn.Module,
    small_data: Pair,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(small_net, small_data, **({"strategies": ["uniform"]} | change))


def regression(rows: int = 60) -> Pair:
    """Real targets that `small_net` predicts, with some noise."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2 * rows, 3, 8, 8, generator=generator)
    with torch.no_grad():
        y = small()(x) + 1e-4 * torch.randn(2 * rows, 4, generator=generator)
    return TensorDataset(x[:rows], y[:rows]), TensorDataset(x[rows:], y[rows:])


def test_real_targets_are_compared_by_r2(small_net: nn.Module) -> None:
    rows = run(small_net, regression(), ["uniform"], seeds=[0], training=TrainingConfig(1))
    assert set(rows.metric) == {"r2"} and set(rows.direction) == {"maximize"}
    dense, *solutions = rows.to_dict("records")
    assert dense["test"] > 0.8 and dense["test_divergence"] == 0
    assert all(row["test"] < dense["test"] and row["test_divergence"] > 0 for row in solutions)
    assert rows.finetuned_test.notna().tolist() == [False, True, True]
    with pytest.raises(UsageError, match="'accuracy' is no metric of this data"):
        run(small_net, regression(), ["uniform"], objectives=["accuracy"])


def test_the_task_may_be_given(small_net: nn.Module) -> None:
    rows = run(small_net, regression(), ["uniform"], seeds=[0], task="matching")
    assert set(rows.metric) == {"distance"} and set(rows.direction) == {"minimize"}
    assert rows.test.tolist() == pytest.approx(rows.test_divergence.tolist(), abs=1e-9)


def test_without_test_data_only_validation_is_known(small_net: nn.Module) -> None:
    x = regression()[0].tensors[0]
    rows = run(small_net, x, ["uniform", "energy"], seeds=[0], training=TrainingConfig(1))
    assert (rows.status == OK).all() and set(rows.metric) == {"distance"}
    assert rows.validation.notna().all() and rows.validation[0] == pytest.approx(0, abs=1e-9)
    assert rows[["test", "test_divergence", "finetuned_test"]].isna().all(axis=None)
    order = summarise(rows).query("budget == 'macs<=0.4'").validation.tolist()
    assert order == sorted(order)


def test_rows_of_earlier_versions_are_kept(
    small_net: nn.Module, small_data: Pair, whole: pd.DataFrame
) -> None:
    names = {"validation": "validation_accuracy", "test": "test_accuracy"}
    names |= {"finetuned_test": "finetuned_test_accuracy"}
    earlier = whole.rename(columns=names).drop(columns=["metric", "direction"])
    rows = run(small_net, small_data, ["random", "energy"], earlier=earlier)
    pd.testing.assert_frame_equal(rows, whole)


def test_the_summary_is_means_and_deviations_of_what_is_ok() -> None:
    accuracies = {"a": [0.5, 0.7, 0.9], "b": [0.8], "c": [0.6, 0.6]}
    rows = [
        Row(name, budget, seed, test=value - shift, evaluations=seed)
        for budget, shift in (("macs<=0.5", 0.0), ("macs<=0.9", 0.1))
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    rows.append(Row("a", "macs<=0.5", 3, test=0.0, status="failed"))
    table = summarise(pd.DataFrame(map(asdict, rows)))
    assert table.strategy.tolist() == ["b", "a", "c"] * 2
    assert table.budget.tolist() == ["macs<=0.5"] * 3 + ["macs<=0.9"] * 3
    assert table.seeds.tolist() == [1, 3, 2] * 2
    np.testing.assert_allclose(table.test[:3], [0.8, 0.7, 0.6])
    np.testing.assert_allclose(table.test[3:], [0.7, 0.6, 0.5])
    np.testing.assert_allclose(table.test_std[:3], [np.nan, 0.2, 0.0], atol=1e-12)
    assert table.evaluations.tolist() == [0, 1, 0.5] * 2


def test_the_summary_puts_the_most_accurate_after_training_first() -> None:
    rows = [
        Row("a", "dense", 0, test=0.9, finetuned_test=0.91),
        Row("b", "dense", 0, test=0.8, finetuned_test=0.92),
    ]
    assert summarise(pd.DataFrame(map(asdict, rows))).strategy.tolist() == ["b", "a"]


def test_the_summary_follows_the_direction() -> None:
    rows = [
        Row("a", "b", 0, test=2.0, metric="mae", direction="minimize"),
        Row("b", "b", 0, test=1.0, metric="mae", direction="minimize"),
    ]
    table = summarise(pd.DataFrame(map(asdict, rows)))
    assert table.strategy.tolist() == ["b", "a"] and set(table.metric) == {"mae"}


def test_answers_are_recovered_by_a_recipe(small_net: nn.Module, small_data: Pair) -> None:
    """The recipe ``plain`` gives the networks that `training` gives; another one gives others."""
    given: dict[str, Any] = {"seeds": range(1), "n_trials": 1, "budgets": [{"macs": 0.5}]}
    config = TrainingConfig(
        1, batch_size=64, learning_rate=0.02, distill=0.5, clip=1.0, optimizer="sgd"
    )
    trained = run(small_net, small_data, ["uniform"], training=config, **given)
    plain = "plain:epochs=1,batch=64,lr=0.02"
    pd.testing.assert_frame_equal(
        untimed(run(small_net, small_data, ["uniform"], recipe=plain, **given)), untimed(trained)
    )
    rows = run(
        small_net,
        small_data,
        ["uniform"],
        recipe="distil:epochs=1,batch=64,lr=0.3,speed=plain",
        training_samples=128,
        **given,
    )
    assert rows.finetuned_test.notna()[1] and rows.test[1] == trained.test[1]
    dense, _ = rows.to_dict("records")  # the control is the dense model after the same recipe
    assert dense["strategy"] == "dense" and 0 < dense["finetuned_test"] <= 1
    text = markdown(rows, command="", about="")
    assert f"trained alike: {100 * dense['finetuned_test']:.2f} %." in text
    with pytest.raises(UsageError, match="give it or `recipe`, not both"):
        run(small_net, small_data, ["uniform"], recipe=plain, training=config, **given)
