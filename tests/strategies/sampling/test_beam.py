"""Beam search over ranks: known traps, exhaustive search on small spaces, shared levels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import evaluator_of
from torch import nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.decompositions.stable_rank import modified_stable_rank
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.strategies.base import Request
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.sampling.beam import Beam, State, beam_search
from rankNAS.strategies.tables import build_problem
from rankNAS.testing import StrategyContract, random_problem, random_trial


class TestBeam(StrategyContract):
    strategy = Beam()


class TestNarrowBeam(StrategyContract):
    """Greedy, on the objective, few children, everything that can be decomposed."""

    strategy = Beam(width=1, step=1.0, score="objective", children=2, operators=None)


Measure = Callable[[Problem, int, Allocation], Trial]


def searched(
    strategy: Beam,
    problem: Problem,
    history: History | None = None,
    measure: Measure = random_trial,
) -> History:
    """The history after a whole search: all probes, then all proposals."""
    history = history or History()
    while True:
        probes = [a for a in strategy.probes(problem, history) if a not in history.found]
        wanted = probes or strategy.propose(problem, history, 1, np.random.default_rng(0))
        if not wanted:
            return history
        for a in wanted:
            trial = measure(problem, len(history.trials), a)
            trial = replace(trial, probe=bool(probes), budget_key=problem.budget_key)
            history = History((*history.trials, trial))


def ranks(layers: int, full: int, budget: float) -> Problem:
    """Layers of equal size, whose ranks cost the same everywhere; choice i has rank full - i."""
    options = (DENSE, *(Choice("svd", (r,)) for r in range(full - 1, 0, -1)))
    names = [f"layer{i}" for i in range(layers)]
    cost, error = np.arange(full, 0, -1.0), np.linspace(0, 1, full)
    return Problem(
        dict.fromkeys(names, options),
        (error,) * layers,
        {"macs": (cost,) * layers},
        {"macs": 0.0},
        {"macs": budget},
        ("accuracy",),
        ("maximize",),
    )


def measured(table: Mapping[tuple[int, ...], float], full: int) -> Measure:
    """Trials whose values are looked up by the ranks."""

    def measure(problem: Problem, number: int, allocation: Allocation) -> Trial:
        key = tuple(full - i for i in problem.indices(allocation))
        return Trial(number, allocation, "complete", (table[key],))

    return measure


TRAP = {(3, 3): 90.0, (2, 3): 88.0, (3, 2): 87.0, (1, 3): 70.0, (2, 2): 80.0, (3, 1): 86.0}


@pytest.mark.parametrize(
    ("width", "best", "evaluations"), [(1, (2, 2), 4), (2, (3, 1), 5)], ids=["greedy", "beam"]
)
def test_t_b3_a_beam_escapes_the_trap_of_greedy(
    width: int, best: tuple[int, int], evaluations: int
) -> None:
    problem = ranks(2, 3, budget=4 / 6)
    strategy = Beam(width=width, step=1 / 3)  # one of six ranks, of two layers
    history = searched(strategy, problem, measure=measured(TRAP, 3))
    assert len(history.trials) == evaluations
    solution = strategy.select(problem, history)
    assert problem.allocation([3 - r for r in best]) == solution.allocation
    assert solution.values == (TRAP[best],)
    assert {t.allocation for t in history.trials if not t.probe} == {
        t.allocation for t in history.feasible(problem)
    }


def test_t_b4_a_target_that_is_met_needs_no_search() -> None:
    problem = ranks(3, 4, budget=1.0)
    history = searched(Beam(), problem)
    assert [t.allocation for t in history.trials] == [problem.allocation([0, 0, 0])]
    assert not history.trials[0].probe


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 3),
    full=st.integers(2, 4),
    removed=st.integers(0, 6),
    seed=st.integers(0, 10**6),
)
def test_t_b4_a_wide_beam_is_exhaustive(layers: int, full: int, removed: int, seed: int) -> None:
    target = max(layers * full - removed, layers)
    problem = ranks(layers, full, budget=target / (layers * full))
    generator = np.random.default_rng(seed)
    table = {
        key: float(generator.uniform())
        for key in itertools.product(range(1, full + 1), repeat=layers)
    }
    # a level is never more than one rank below the one before it
    strategy = Beam(width=1000, step=1 / full)
    history = searched(strategy, problem, measure=measured(table, full))
    on_target = {key: value for key, value in table.items() if sum(key) == target}
    assert strategy.select(problem, history).values == (max(on_target.values()),)
    proposed = {t.values[0] for t in history.trials if not t.probe}
    assert proposed == set(on_target.values())


def test_the_missing_states_are_those_of_the_first_unknown_level() -> None:
    cost = [np.array([[3.0, 2.0, 1.0]])] * 2
    error = [np.array([0.0, 0.5, 1.0])] * 2
    levels = [np.array([5.0]), np.array([4.0]), np.array([3.0])]
    known: dict[State, float] = {}
    first = beam_search(error, cost, levels, 1, known.get)
    assert (first.missing, first.finished) == (((0, 1), (1, 0)), ())
    known |= {(0, 1): 2.0, (1, 0): 1.0}
    second = beam_search(error, cost, levels, 1, known.get)
    assert (second.missing, second.finished) == (((0, 2), (1, 1)), ())
    known |= {(0, 2): 1.0, (1, 1): 1.0}  # of equals, the one of the smaller error: here none
    third = beam_search(error, cost, levels, 1, known.get)
    assert third.missing == () and third.finished == ((1, 2),)


def test_a_level_that_no_single_layer_reaches_is_approached_in_smaller_steps() -> None:
    cost = [np.array([[4.0, 3.0]])] * 3
    error = [np.array([0.0, e]) for e in (0.3, 0.1, 0.2)]
    known: dict[State, float] = {}
    levels = [np.array([9.0])]  # all three layers must be lowered
    while missing := (found := beam_search(error, cost, levels, 1, known.get)).missing:
        known |= dict.fromkeys(missing, 0.0)
    assert found.finished == ((1, 1, 1),)
    assert sorted(map(sum, known)) == [1, 1, 1, 2, 2]
    assert (0, 1, 1) in known  # the least error first


def test_a_failed_state_is_never_lowered_further_while_others_live() -> None:
    problem = ranks(2, 4, budget=4 / 8)

    def measure(problem: Problem, number: int, allocation: Allocation) -> Trial:
        trial = random_trial(problem, number, allocation)
        failed = problem.indices(allocation)[0] == 1
        return replace(trial, state="failed", values=()) if failed else trial

    history = searched(Beam(width=1, step=1 / 4), problem, measure=measure)
    states = {tuple(problem.indices(t.allocation)): t for t in history.trials}
    assert states[(1, 0)].state == "failed"
    assert (2, 0) not in states and (0, 2) in states


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 6),
    budgets=st.integers(1, 2),
    width=st.integers(1, 3),
    children=st.sampled_from([None, 1, 3]),
)
def test_every_search_ends_within_its_budgets_and_its_limit(
    seed: int, layers: int, budgets: int, width: int, children: int | None
) -> None:
    problem = random_problem(seed, layers=layers, budgets=budgets)
    history = searched(Beam(width=width, children=children), problem)
    proposed = [t for t in history.trials if not t.probe]
    assert 1 <= len(proposed) <= width * layers
    for trial in proposed:
        assert problem.meets(problem.indices(trial.allocation))
    for trial in history.trials:
        if trial.probe:
            assert not problem.meets(problem.indices(trial.allocation))


def test_probes_are_in_the_order_of_their_layers() -> None:
    problem = random_problem(5, layers=6)
    reduced = problem.within(("svd",))
    rows = [reduced.indices(a) for a in Beam().probes(problem, History())]
    assert rows == sorted(rows) and 1 < len(rows) <= 6


def fine(budget: float) -> Problem:
    generator = np.random.default_rng(3)
    kept = np.linspace(1, 0.02, 50)
    sizes = generator.uniform(1, 10, 6)
    powers = generator.uniform(0.5, 3, 6)
    return Problem(
        {f"layer{i}": (DENSE, *(Choice("svd", (r,)) for r in range(49, 0, -1))) for i in range(6)},
        tuple((1 - kept) ** p for p in powers),
        {"macs": tuple(size * kept for size in sizes)},
        {"macs": 1.0},
        {"macs": budget},
        objectives=("accuracy",),
        directions=("maximize",),
    )


def test_budgets_share_the_levels_above_them() -> None:
    high, low = fine(0.6), fine(0.4)
    alone = {t.allocation for t in searched(Beam(), low).trials if t.probe}
    both = searched(Beam(), low, searched(Beam(), high))
    first = {t.allocation for t in both.trials if t.probe and t.budget_key == high.budget_key}
    again = {t.allocation for t in both.trials if t.probe and t.budget_key == low.budget_key}
    assert first and first < alone
    assert first | again | {t.allocation for t in both.trials if not t.probe} >= alone
    assert not first & again


def test_levels_remove_equal_cost_and_the_budget_is_used_up() -> None:
    problem = fine(0.5)
    history = searched(Beam(width=2, step=0.5), problem)
    share = 1 - 0.5 / 6
    layers = problem.dense["macs"] - 1.0
    widest = max(float(c[0]) for c in problem.costs["macs"]) * 0.02  # between two choices
    levels = [layers * share**k for k in range(1, 20)]
    for trial in history.trials:
        cost = problem.fractions(problem.indices(trial.allocation))["macs"] * (layers + 1) - 1
        near = [*levels, problem.limits["macs"]]
        assert any(level - widest - 1e-9 <= cost <= level + 1e-9 for level in near)


def test_the_score_of_accuracy_is_the_loss() -> None:
    """Equal accuracies, different losses: only the loss tells the children apart."""
    problem = ranks(2, 3, budget=4 / 6)

    def measure(problem: Problem, number: int, allocation: Allocation) -> Trial:
        first, second = problem.indices(allocation)
        metrics = {"loss": 2.0 * second + first}
        return Trial(number, allocation, "complete", (0.5,), metrics)

    def lowered(strategy: Beam, problem: Problem = problem) -> set[tuple[int, ...]]:
        history = searched(strategy, problem, measure=measure)
        return {tuple(problem.indices(t.allocation)) for t in history.trials if not t.probe}

    narrow = Beam(width=1, step=1 / 3)
    assert lowered(narrow) == {(2, 0), (1, 1)}
    assert lowered(replace(narrow, score="objective")) == {(0, 2), (1, 1)}  # the first of equals
    other = replace(problem, objectives=("own",))
    assert lowered(narrow, other) == {(0, 2), (1, 1)}


def test_a_minimised_objective_is_minimised() -> None:
    problem = replace(ranks(2, 3, 4 / 6), objectives=("loss",), directions=("minimize",))
    table = {key: -value for key, value in TRAP.items()}
    history = searched(Beam(step=1 / 3), problem, measure=measured(table, 3))
    assert Beam().select(problem, history).values == (-86.0,)


def test_t_b5_exact_ranks_are_found_without_loss() -> None:
    torch.manual_seed(0)

    def layer(rank: int) -> nn.Linear:
        linear = nn.Linear(12, 12, bias=False)
        linear.weight = nn.Parameter(torch.randn(12, rank) @ torch.randn(rank, 12) / 4)
        return linear

    model = nn.Sequential(layer(2), layer(3)).eval()
    x = torch.randn(200, 12)
    y = model(x).argmax(-1)  # so that the dense model is always right
    space = compile_space(model, x[:1], min_weights=1, keep_output_dense=False)
    factorisation = factorise(model, space)
    # rank r costs 24 r of 144
    problem = build_problem(
        factorisation.space,
        factorisation.errors(),
        {"macs": (2 + 3) * 24 / 288},
        objectives=[("accuracy", "maximize")],
    )
    evaluator = evaluator_of(factorisation, x, y)

    def measure(problem: Problem, number: int, allocation: Allocation) -> Trial:
        metrics = evaluator.evaluate(allocation)
        return Trial(number, allocation, "complete", (metrics["accuracy"],), metrics)

    strategy = Beam()
    solution = strategy.select(problem, searched(strategy, problem, measure=measure))
    assert [c.rank for c in solution.allocation.values()] == [(2,), (3,)]
    assert solution.values == (1.0,) and solution.metrics["kl_divergence"] == pytest.approx(
        0, abs=1e-6
    )
    for module, rank in zip(model, (2, 3), strict=True):
        weight = module.weight.detach()
        assert float(modified_stable_rank(weight, rank)) == pytest.approx(0, abs=1e-6)
        assert float(modified_stable_rank(weight, rank - 1)) > 0.05


def test_what_it_cannot_do_is_refused() -> None:
    request = Request({}, ["accuracy"], 100)
    with pytest.raises(UsageError, match="until a budget is met"):
        Beam().check(request)
    Beam().check(replace(request, budget={"params": 0.5}))
    for wrong in ({"width": 0}, {"step": 0.0}, {"step": 1.5}, {"children": 0}):
        with pytest.raises(UsageError, match="must be at least 1"):
            Beam(**wrong)
    with pytest.raises(UsageError, match="'loss', 'objective'.*, got 'taste'"):
        Beam(score="taste")
