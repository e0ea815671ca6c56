"""Truncation by measured sensitivity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.exceptions import BudgetError
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sensitivity.strs import Measured, Strs, _Truncated, truncate
from rankNAS.testing import StrategyContract, random_problem, random_trial


class TestStrs(StrategyContract):
    strategy = Strs()


class TestStrsOfEveryOperator(StrategyContract):
    strategy = Strs(operators=None)


PERPLEXITY = {(0, 0.5): 20.0, (0, 0.9): 11.0, (1, 0.5): 12.0, (1, 0.9): 10.5}
KEPT = {0.9: 1, 0.5: 2}


def spec(target: float) -> list[int] | None:
    """Two layers of 100 parameters at keep-ratios 0.5 and 0.9."""
    measured = [Measured(layer, r, KEPT[r], ppl) for (layer, r), ppl in PERPLEXITY.items()]
    size = np.array([100.0, 90.0, 50.0])
    return truncate(measured, [[size, size]], [target * 200])


def test_strs_case_of_two_layers() -> None:
    """Stopping on the last midpoint would return 0.9 for both: 0.90 instead of exactly 0.70."""
    assert spec(0.70) == [KEPT[0.9], KEPT[0.5]]
    # every cut, from the least to the most harmful measurement
    assert spec(1.0) == [0, 0]
    assert spec(0.99) == spec(0.95) == [0, KEPT[0.9]]
    assert spec(0.94) == spec(0.90) == [KEPT[0.9], KEPT[0.9]]
    assert spec(0.89) == spec(0.71) == [KEPT[0.9], KEPT[0.5]]
    assert spec(0.69) == spec(0.50) == [KEPT[0.5], KEPT[0.5]]
    assert spec(0.49) is None


def test_a_layer_gets_its_smallest_selected_ratio() -> None:
    """A smaller ratio that happens to do less harm is not undone by a larger one."""
    measured = [Measured(0, 0.5, 2, 1.0), Measured(0, 0.9, 1, 2.0), Measured(1, 0.9, 1, 3.0)]
    size = np.array([100.0, 90.0, 50.0])
    assert truncate(measured, [[size, size]], [140.0]) == [2, 1]


@settings(max_examples=80, deadline=None)
@given(
    scores=st.lists(st.integers(0, 9).map(float), min_size=12, max_size=12),
    sizes=st.lists(st.floats(1, 100), min_size=3, max_size=3),
    share=st.floats(0.3, 1.1),
)
def test_the_largest_of_all_cuts_within_the_target(
    scores: list[float], sizes: list[float], share: float
) -> None:
    ratios = [0.9, 0.8, 0.6, 0.4]
    measured = [
        Measured(layer, ratio, j + 1, scores[4 * layer + j])
        for layer in range(3)
        for j, ratio in enumerate(ratios)
    ]
    tables = [[size * np.array([1.0, *ratios]) for size in sizes]]
    target = share * sum(sizes)
    ordered = sorted(measured, key=lambda m: (m.score, -m.ratio, m.layer))
    totals = []
    for cut in range(len(ordered) + 1):
        kept = [1.0] * 3
        for m in ordered[:cut]:
            kept[m.layer] = min(kept[m.layer], m.ratio)
        totals.append(float(np.dot(kept, sizes)))
    assert totals == sorted(totals, reverse=True)
    within = [t for t in totals if t <= target * (1 + 1e-9)]
    found = truncate(measured, tables, [target])
    if not within:
        assert found is None
        return
    total = sum(float(t[i]) for t, i in zip(tables[0], found, strict=True))
    assert total == pytest.approx(max(within))


def layered(layers: int = 3, budget: float = 0.7, kept: tuple[float, ...] = ()) -> Problem:
    """Equal layers with a choice at every tenth; errors grow with what is removed."""
    kept = kept or tuple(k / 10 for k in range(9, 0, -1))
    options = (DENSE, *(Choice("svd", (round(100 * k),)) for k in kept))
    fractions = np.array([1.0, *kept])
    names = [f"layer{i}" for i in range(layers)]
    return Problem(
        dict.fromkeys(names, options),
        tuple((1 - fractions) * (0.1 + 0.2 * i) for i in range(layers)),
        {"macs": (100 * fractions,) * layers},
        {"macs": 0.0},
        {"macs": budget},
        objectives=("accuracy",),
        directions=("maximize",),
    )


def probed(problem: Problem, strategy: Strs, slopes: list[float], metric: bool) -> History:
    """Each probe measured: harm grows with the removed share at a slope of the layer."""
    trials = []
    for number, allocation in enumerate(strategy.probes(problem, History())):
        indices = problem.indices(allocation)
        removed = [1 - c[i] / c[0] for c, i in zip(problem.costs["macs"], indices, strict=True)]
        harm = float(np.dot(slopes, removed))
        metrics = {"loss": harm} if metric else {}
        value = 0.0 if metric else -harm
        trials.append(Trial(number, allocation, "complete", (value,), metrics, probe=True))
    return History(tuple(trials))


def kept(problem: Problem, allocation: Allocation) -> list[float]:
    indices = problem.indices(allocation)
    return [float(c[i] / c[0]) for c, i in zip(problem.costs["macs"], indices, strict=True)]


def alone(problem: Problem, allocation: Allocation) -> tuple[int, float]:
    (layer,) = [i for i, k in enumerate(kept(problem, allocation)) if k < 1]
    return layer, kept(problem, allocation)[layer]


def test_probes_are_each_layer_alone_at_each_ratio_in_order() -> None:
    problem = layered()
    probes = Strs().probes(problem, History())
    points = [alone(problem, a) for a in probes]
    assert sorted(points) == [(i, k / 10) for i in range(3) for k in range(4, 10)]
    rows = [problem.indices(a) for a in probes]
    assert rows == sorted(rows)
    assert Strs().probes(problem, probed(problem, Strs(), [1, 1, 1], True)) == probes


def test_further_ratios_are_measured_where_the_budget_needs_them() -> None:
    def least(budget: float) -> float:
        problem = layered(budget=budget, kept=(*(k / 10 for k in range(9, 0, -1)), 0.04))
        return min(alone(problem, a)[1] for a in Strs().probes(problem, History()))

    assert [least(b) for b in (0.5, 0.4, 0.39, 0.25, 0.1, 0.05)] == [0.4, 0.4, 0.3, 0.2, 0.1, 0.04]


def test_without_a_budget_nothing_is_measured_and_all_is_dense() -> None:
    problem = replace(layered(), budget={})
    assert Strs().probes(problem, History()) == []
    (found,) = Strs().propose(problem, History(), 2, np.random.default_rng(0))
    assert kept(problem, found) == [1.0] * 3


def test_a_ratio_takes_the_most_accurate_choice_within_it() -> None:
    """Two choices fit a ratio of 0.9; the cheaper one is the better."""
    problem = replace(
        layered(layers=1),
        choices={"layer0": (DENSE, Choice("svd", (90,)), Choice("svd", (80,)))},
        errors=(np.array([0.0, 0.3, 0.1]),),
        costs={"macs": (np.array([100.0, 90.0, 80.0]),)},
        budget={"macs": 0.9},
    )
    (probe,) = Strs().probes(problem, History())
    assert kept(problem, probe) == [0.8]


@pytest.mark.parametrize("metric", [True, False], ids=["loss", "objective"])
def test_the_measured_order_decides_not_the_errors(metric: bool) -> None:
    """Equal errors per removed share would spare layer 2; measured, layer 0 is sensitive."""
    problem = layered(budget=0.6)
    history = probed(problem, Strs(), [10.0, 1.0, 0.1], metric)
    (found,) = Strs().propose(problem, history, 1, np.random.default_rng(0))
    # harm 0.06 and 0.6 at 0.4 for layers 2 and 1; a tenth of layer 0 does 1.0
    assert kept(problem, found) == pytest.approx([1.0, 0.4, 0.4])
    (by_errors,) = Strs().propose(problem, History(), 1, np.random.default_rng(0))
    assert kept(problem, by_errors)[0] == pytest.approx(0.4)


def test_the_first_objective_may_be_minimised() -> None:
    problem = replace(layered(budget=0.6), objectives=("loss",), directions=("minimize",))
    history = probed(problem, Strs(), [10.0, 1.0, 0.1], False)
    worse = tuple(replace(t, values=(-t.values[0],)) for t in history.trials)
    (found,) = Strs().propose(problem, History(worse), 1, np.random.default_rng(0))
    assert kept(problem, found) == pytest.approx([1.0, 0.4, 0.4])


def test_probes_that_failed_are_the_last_to_be_applied() -> None:
    problem = layered(budget=0.6)
    history = probed(problem, Strs(), [10.0, 1.0, 0.1], True)
    failed = History(
        tuple(
            replace(t, state="failed", values=(), metrics={})
            if alone(problem, t.allocation)[0] == 2
            else t
            for t in history.trials
        )
    )
    (found,) = Strs().propose(problem, failed, 1, np.random.default_rng(0))
    assert kept(problem, found) == pytest.approx([0.4, 0.4, 1.0])


problems = st.builds(
    random_problem,
    st.integers(0, 10**6),
    layers=st.integers(1, 6),
    choices=st.integers(2, 12),
    budgets=st.integers(1, 2),
)


@settings(max_examples=60, deadline=None)
@given(problem=problems, share=st.floats(0.3, 1))
def test_the_answer_meets_every_budget_and_a_tighter_one_keeps_no_more(
    problem: Problem, share: float
) -> None:
    def solution(p: Problem) -> list[int] | None:
        try:
            p.check()
        except BudgetError:
            return None
        probes = Strs().probes(p, History())
        history = History(tuple(random_trial(p, i, a) for i, a in enumerate(probes)))
        found = _Truncated(history.found, Strs().operators).solve(p)
        assert p.meets(p.indices(found))
        # what was measured as a probe is not proposed again
        new = [] if found in history.found else [found]
        assert Strs().propose(p, history, 1, np.random.default_rng(0)) == new
        return p.indices(found)

    tight = replace(problem, budget={n: share * b for n, b in problem.budget.items()})
    wide, narrow = solution(problem), solution(tight)
    if len(problem.budget) == 1 and wide and narrow:
        assert problem.fractions(narrow)["macs"] <= problem.fractions(wide)["macs"] * (1 + 1e-9)


def test_operators_that_cannot_meet_the_budget_are_named() -> None:
    problem = layered(budget=0.3)
    options = (DENSE, Choice("svd", (60,)), Choice("cp", (1,)))
    fractions = np.array([1.0, 0.6, 0.1])
    problem = replace(
        problem,
        choices=dict.fromkeys(problem.choices, options),
        errors=(1 - fractions,) * 3,
        costs={"macs": (100 * fractions,) * 3},
    )
    with pytest.raises(BudgetError, match=r"of the choices of svd: .*smallest possible is 0\.6"):
        Strs().propose(problem, History(), 1, np.random.default_rng(0))
    (found,) = Strs(operators=None).propose(problem, History(), 1, np.random.default_rng(0))
    assert problem.meets(problem.indices(found))


def test_where_a_cost_is_an_objective_every_budget_of_the_sweep_is_answered() -> None:
    problem = replace(
        layered(budget=0.8), objectives=("accuracy", "macs"), directions=("maximize", "minimize")
    )
    probes = Strs().probes(problem, History())
    assert min(alone(problem, a)[1] for a in probes) == 0.1
    trials = tuple(random_trial(problem, i, a) for i, a in enumerate(probes))
    found = Strs().propose(problem, History(trials), 20, np.random.default_rng(0))
    macs = [problem.fractions(problem.indices(a))["macs"] for a in found]
    assert len(found) > 5
    assert macs == sorted(macs, reverse=True)
