"""Candidates that strategies need, the norms of their papers, and what a user gives instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.allocation import DENSE, Choice
from rankNAS.cli.loading import named_strategy
from rankNAS.cli.options.common import SpaceOptions
from rankNAS.decompositions import OPERATORS
from rankNAS.engine import objectives_of
from rankNAS.exceptions import UsageError
from rankNAS.pipeline import prepare
from rankNAS.search_spaces import RankPolicy, compile_space
from rankNAS.strategies import Alds, Bolaco, Drone, Energy, Haloc, Strs
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.needed import needed_choices, with_choices
from rankNAS.strategies.spectra import spectral_errors
from rankNAS.tasks.classification import Classification
from rankNAS.tasks.infer import resolve_task

Pair = tuple[TensorDataset, TensorDataset]


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()


def data() -> Pair:
    torch.manual_seed(1)
    x, y = torch.randn(300, 3, 6, 6), torch.randint(0, 4, (300,))
    return TensorDataset(x[:260], y[:260]), TensorDataset(x[260:], y[260:])


SETTINGS = rankNAS.Settings(calibration=64, validation=64)


def offered(strategy: Strategy, **options: Any) -> set[Choice]:
    """The choices of the wide layer after preparation."""
    loaded = rankNAS.load_data(data())
    model = convolutions()
    task = resolve_task(None, model, loaded)
    _, (problem,) = prepare(
        model,
        loaded,
        task,
        strategies=[strategy],
        budgets=[{"macs": 0.5}],
        objectives=objectives_of(None, task),
        settings=replace(SETTINGS, **options),
    )
    return set(problem.choices["2"])


def test_haloc_is_offered_equal_ranks_in_multiples_whatever_dominates_them() -> None:
    equal = {Choice("tucker2", (r, r)) for r in range(4, 29, 4)}  # 28 x 28 is below break-even
    assert equal <= offered(Haloc(batch_size=8))
    assert not equal <= offered(Energy())
    coarse = {Choice("tucker2", (r, r)) for r in (8, 16, 24)}
    assert coarse <= offered(Haloc(batch_size=8, granularity=8))
    without = offered(Haloc(batch_size=8), policy=RankPolicy(operators=("svd",)))
    assert not any(c.operator == "tucker2" for c in without)


def test_alds_is_offered_what_its_own_bound_does_not_dominate() -> None:
    found = offered(Alds())
    weight = convolutions().get_submodule("2").weight.detach().unsqueeze(0)  # type: ignore[operator]
    space = compile_space(convolutions(), torch.zeros(1, 3, 6, 6))
    needed = needed_choices([Alds()], convolutions(), space, RankPolicy(), ["macs"], 64)["2"]
    assert set(needed) <= found

    def bound(choice: Choice) -> float:
        k = 1 if choice.operator == "svd" else choice.rank[0]
        return float(np.sqrt(k) * spectral_errors(weight, k)[choice.rank[-1]])

    points = [(bound(c), cost.macs) for c, cost in needed.items()]
    assert not any(a[0] <= b[0] and a[1] <= b[1] and a != b for a in points for b in points)
    shape = space.layers["2"].shape
    everything = Alds().candidates(space.layers["2"], weight)
    for choice, error in everything.items():
        assert error == pytest.approx(bound(choice))
        cost = OPERATORS[choice.operator].cost(shape, choice.rank)
        dense = space.layers["2"][DENSE]
        if cost.macs < dense.macs and cost.params < dense.params and len(points) < 64:
            assert any(e <= error + 1e-12 and m <= cost.macs for e, m in points)


def test_a_restricted_space_and_a_multiple_offer_no_more() -> None:
    space = compile_space(convolutions(), torch.zeros(1, 3, 6, 6))
    few = space.restrict({"2": [DENSE, Choice("tucker2", (8, 8)), Choice("svd", (4,))]})
    arguments = ([Haloc()], convolutions())
    needed = needed_choices(*arguments, few, RankPolicy(), ["macs"], 64)
    assert set(with_choices(few, needed).layers["2"].choices) == set(few.layers["2"].choices)
    policy = RankPolicy(multiple_of=8)
    space = compile_space(convolutions(), torch.zeros(1, 3, 6, 6), policy=policy)
    needed = needed_choices(*arguments, space, policy, ["macs"], 64)
    assert set(needed["2"]) == {Choice("tucker2", (r, r)) for r in (8, 16, 24)}


def test_each_method_has_its_own_norm_unless_the_settings_name_one() -> None:
    norms = {s.name: rankNAS.Settings().of(s).norm for s in (Bolaco(), Drone(), Alds(), Strs())}
    assert norms == {"bolaco": "pooled", "drone": "input", "alds": "weight", "strs": "asvd"}
    given = rankNAS.Settings(norm="input")
    assert {given.of(s).norm for s in (Bolaco(), Alds(), Energy())} == {"input"}
    with pytest.raises(UsageError, match="different norms, pooled, input"):
        prepare(
            convolutions(),
            rankNAS.load_data(data()),
            Classification(),
            strategies=[Bolaco(), Drone()],
            budgets=[{"macs": 0.5}],
            objectives=[],
            settings=SETTINGS,
        )


def test_operators_that_are_given_replace_those_of_the_method() -> None:
    options = SpaceOptions(operators="svd, spatial_svd")
    assert named_strategy("bolaco", options).operators == ("svd", "spatial_svd")
    assert named_strategy("strs", options).operators == ("svd", "spatial_svd")
    assert named_strategy("alds", options).operators == ("svd",)
    assert named_strategy("energy", options).operators is None
    assert named_strategy("bolaco", SpaceOptions()).operators == ("svd",)
    assert named_strategy("alds", SpaceOptions(operators="tucker2")) == Alds()


def test_a_comparison_decomposes_each_method_in_its_own_norm() -> None:
    """Its rows are those of a search with that method alone."""
    quick = {"bolaco": Bolaco(epochs=1, samples=64, sensitive=16), "alds": Alds()}
    budgets = [{"macs": 0.5}]
    arguments = (convolutions(), data(), {**quick, "energy": Energy()}, budgets, [0])
    rows = rankNAS.compare(*arguments, n_trials=3, settings=SETTINGS)
    assert (rows.status == "ok").all()
    assert sorted(rows.strategy) == ["alds", "bolaco", "dense", "energy"]
    for name, strategy in {**quick, "energy": Energy()}.items():
        study = rankNAS.search(
            convolutions(),
            data(),
            budget={"macs": 0.5},
            strategy=strategy,
            n_trials=3,
            settings=SETTINGS,
        )
        (row,) = rows[rows.strategy == name].to_dict("records")
        assert row["test"] == pytest.approx(study.test()["accuracy"])
        assert row["test_divergence"] == pytest.approx(study.test()["kl_divergence"], rel=1e-4)
        # What the factors are relative to: C is the identity without data.
        layer = study.context.factorisation.layers["2"]
        white = float(layer.weight.square().sum())
        assert (layer.energy == pytest.approx(white, rel=1e-3)) == (name == "alds")


def test_bolaco_measures_its_samples_and_trains_its_answer() -> None:
    strategy = Bolaco(epochs=1, samples=64, sensitive=16)
    study = rankNAS.search(
        convolutions(),
        data(),
        budget={"macs": 0.5},
        strategy=strategy,
        n_trials=4,
        settings=SETTINGS,
    )
    least = min(
        study.trials,
        key=lambda t: t.metrics["loss@sensitive"] + 0.5 * t.metrics["reverse_kl@sensitive"],
    )
    assert study.best == least
    plain = study.evaluator.network(least.allocation)
    trained = study.materialise()
    differing = {
        name
        for name, p in trained.named_parameters()
        if not torch.equal(p, plain.get_parameter(name))
    }
    assert differing and all(name.endswith("1.weight") for name in differing)
    assert study.metrics_of(study.best, trained)["loss"] != least.metrics["loss"]
    untrained = replace(strategy, epochs=0)
    assert untrained.finish(plain, least.allocation, study.context) is plain


@pytest.mark.parametrize("strategy", [Bolaco(epochs=1, samples=64, sensitive=16), Drone(walks=2)])
def test_a_resumed_search_gives_the_same_answer(strategy: Strategy, tmp_path: Path) -> None:
    """The samples, the norm and the walks follow from the arguments and the record alone."""
    options: dict[str, Any] = {
        "budget": {"macs": 0.5},
        "strategy": strategy,
        "settings": SETTINGS,
    }
    whole = rankNAS.search(convolutions(), data(), n_trials=4, **options)
    storage = f"sqlite:///{tmp_path}/study.db"
    for n_trials, resume in ((1, False), (4, True)):
        study = rankNAS.search(
            convolutions(), data(), n_trials=n_trials, storage=storage, resume=resume, **options
        )
    found = [[(t.allocation, t.metrics) for t in s.trials] for s in (whole, study)]
    assert found[0] == found[1]
    assert whole.best.allocation == study.best.allocation
