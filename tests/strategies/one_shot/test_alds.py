"""ALDS against the closed forms and claims of its paper.

References:
    Liebenwein et al., NeurIPS 2021: Theorem 1, equation 4 and the alternation.
"""

from __future__ import annotations

import itertools
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankNAS
from rankNAS.allocation import DENSE, Choice
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.decompositions import ErrorNorm, GroupSvd, LayerShape, Operator, Svd, Target
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces import RankPolicy, compile_space
from rankNAS.solver.min_max import min_max
from rankNAS.strategies.one_shot.alds import Alds, bound, iterate
from rankNAS.strategies.one_shot.energy import Energy
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.spectra import make_spectra, spectral_errors
from rankNAS.strategies.tables import build_problem
from rankNAS.testing import StrategyContract

seeds = st.integers(0, 10**6)


class TestAlds(StrategyContract):
    strategy = Alds()


class TestAldsOfOneGroup(StrategyContract):
    strategy = Alds(sqrt_k=False, operators=("svd",))


def folded(W: Tensor) -> Tensor:  # (o, n) -> (1, o, n, 1, 1)
    return W.double()[None, :, :, None, None]


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values).double())


def normal(seed: int, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def benched(
    model: nn.Module, inputs: Tensor, budget: dict[str, float]
) -> tuple[Factorisation, Problem]:
    """A model's factors, and the problem."""
    policy = RankPolicy(operators=("svd", "group_svd"))
    space = compile_space(model, inputs, policy=policy, exclude=("head",), min_weights=1)
    factorisation = factorise(model, space, norm="weight")
    problem = build_problem(factorisation.space, factorisation.errors(), budget)
    return factorisation, problem


def bound_to(factorisation: Factorisation, sqrt_k: bool = True) -> Alds:
    bound_ = Alds(sqrt_k=sqrt_k).bind(make_spectra(factorisation, ("weight",)))
    assert isinstance(bound_, Alds)
    return bound_


def grouped_problem(seed: int, layers: int) -> Problem:
    """Random spectral errors of one to several groups, squared, at the costs of ALDS."""
    rng = np.random.default_rng(seed)
    choices, errors, costs = {}, [], []
    for i in range(layers):
        f, n = int(rng.integers(4, 9)), int(rng.choice([6, 12]))
        rows = [(DENSE, 0.0, f * n)]
        for k in [1, *rng.choice([2, 3, 6], 2, replace=False).tolist()]:
            falling = np.sort(rng.uniform(0, 1, min(f, n // k)))[::-1]
            for j, error in enumerate(falling, 1):
                choice = Choice("svd", (j,)) if k == 1 else Choice("group_svd", (k, j))
                rows.append((choice, float(error), j * (n + k * f)))
        rows = [rows[0], *(r for r in rows[1:] if r[2] < f * n)]
        choices[f"layer{i}"] = tuple(c for c, *_ in rows)
        errors.append(np.array([e for _, e, _ in rows]) ** 2)
        costs.append(np.array([float(c) for *_, c in rows]))
    least = sum(c.min() for c in costs) / sum(c[0] for c in costs)
    kept = float(rng.uniform(least, 1))
    return Problem(
        choices, tuple(errors), {"params": tuple(costs)}, {"params": 0.0}, {"params": kept}
    )


def rooted(problem: Problem) -> Problem:
    """The problem as `Alds` sees it when it is not bound."""
    table = tuple(np.sqrt(e) for e in problem.errors)
    return Problem(problem.choices, table, problem.costs, problem.remainder_cost, problem.budget)


def worst(problem: Problem, indices: tuple[int, ...] | list[int]) -> float:
    return max(float(e[i]) for e, i in zip(problem.errors, indices, strict=True))


# ---------------------------------------------------------------------------------- the errors


def test_t_a1_error_is_the_next_singular_value() -> None:
    errors = spectral_errors(folded(diagonal(8, 4, 2, 1)), 1)
    assert errors.tolist() == pytest.approx([1, 0.5, 0.25, 0.125, 0])
    assert int((errors > 0.3).sum()) == 2  # the rank for threshold 0.3


def test_t_a2_two_groups_and_both_bounds() -> None:
    errors = spectral_errors(folded(diagonal(8, 4, 2, 1)), 2)
    assert errors.tolist() == pytest.approx([1, 0.5, 0])
    assert bound(errors, 2, sqrt_k=True)[1] == pytest.approx(2**0.5 * 4 / 8)
    assert bound(errors, 2, sqrt_k=False)[1] == pytest.approx(0.5)


def test_t_a3_without_the_root_the_error_is_underestimated() -> None:
    A = diagonal(2, 1)
    errors = spectral_errors(folded(torch.cat([A, A], 1)), 2)
    assert bound(errors, 2, sqrt_k=True)[1] == pytest.approx(0.5)  # the actual error
    assert bound(errors, 2, sqrt_k=False)[1] == pytest.approx(0.5 / 2**0.5)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    g=st.integers(1, 2),
    outputs=st.integers(1, 5),
    k=st.integers(1, 4),
    width=st.integers(1, 3),
    data=st.data(),
)
def test_t_a4_the_actual_error_lies_between_the_bounds(
    seed: int, g: int, outputs: int, k: int, width: int, data: st.DataObject
) -> None:
    W = normal(seed, g, outputs, k * width)
    errors = spectral_errors(W[..., None, None], k)
    assert len(errors) == min(outputs, width) + 1
    assert (np.diff(errors) <= 1e-12).all()
    j = data.draw(st.integers(1, len(errors) - 1))
    shape = LayerShape(g * k * width, g * outputs, groups=g)
    operator, rank = (Svd(), (j,)) if k == 1 else (GroupSvd(), (k, j))
    factors = operator.factorise(shape, Target(W[..., None, None], ErrorNorm()), [rank])
    norm = torch.linalg.matrix_norm
    actual = norm(torch.block_diag(*(W - factors.weight(rank))), 2)
    relative = float(actual / norm(torch.block_diag(*W), 2))
    assert bound(errors, k, sqrt_k=False)[j] - 1e-7 <= relative
    assert relative <= bound(errors, k, sqrt_k=True)[j] + 1e-7


def test_a_zero_weight_has_no_error() -> None:
    assert spectral_errors(torch.zeros(1, 3, 4, 1, 1), 2).tolist() == [0, 0, 0]


def test_t_a7_counts() -> None:
    shape = LayerShape(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), calls=((1, 8, 8),))
    dense = shape.cost().params

    def params(k: int, j: int) -> int:
        operator: Operator = Svd() if k == 1 else GroupSvd()
        return operator.cost(shape, (j,) if k == 1 else (k, j)).params

    for k, per_rank, most in [(1, 640, 57), (2, 704, 52), (64, 4672, 7)]:
        assert params(k, 1) == per_rank
        assert params(k, most) < dense <= params(k, most + 1)
    assert params(1, 16) == 10240
    assert params(2, 16) == 11264


def test_t_a8_the_grouped_pair_computes_the_truncated_blocks() -> None:
    module = nn.Conv2d(6, 8, 3, stride=2, padding=1).double().requires_grad_(False)
    shape, x = LayerShape.of(module), normal(0, 2, 6, 7, 7)
    W = module.weight.flatten(1)
    factors = GroupSvd().factorise(shape, Target(shape.fold(module.weight), ErrorNorm()), [(3, 8)])
    for j in range(1, 9):
        blocks = []
        for block in W.chunk(3, 1):
            U, S, Vh = torch.linalg.svd(block, full_matrices=False)
            blocks.append((U[:, :j] * S[:j]) @ Vh[:j])
        What = torch.cat(blocks, 1).reshape(module.weight.shape)
        expected = nn.functional.conv2d(x, What, module.bias, stride=2, padding=1)
        actual = factors.truncate((3, j), module.bias)(x)
        torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.detach(), module(x), rtol=0, atol=1e-6)  # full rank


# ------------------------------------------------------------------------------ the allocation


def spectra(power: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What 1 .. 4 ranks leave of the two spectra of T-A5: the largest value, the share of all."""
    both = [np.array([1, 0.5, 0.25, 0.125]), np.array([1, 0.9, 0.8, 0.7])]
    largest = [np.append(s[1:], 0) for s in both]
    shares = [1 - np.cumsum(s**power) / (s**power).sum() for s in both]
    return largest, shares


def five_ranks(errors: list[np.ndarray]) -> Problem:
    """Two layers, of equal cost per rank, that may have five ranks together."""
    return Problem(
        dict.fromkeys(("a", "b"), (DENSE, *(Choice("svd", (r,)) for r in range(1, 5)))),
        tuple(np.append(0, e.clip(0)) for e in errors),
        {"macs": (np.array([50.0, 1, 2, 3, 4]),) * 2},
        {"macs": 0.0},
        {"macs": 0.05},
    )


def ranks(strategy: Alds | Energy, problem: Problem) -> tuple[int, ...]:
    return tuple(choice.rank[0] for choice in strategy.solve(problem).values())


def test_t_a5_the_worst_spectral_error_and_the_energies_differ() -> None:
    spectral = five_ranks([e**2 for e in spectra(1)[0]])
    assert ranks(Alds(), spectral) == (1, 4)
    assert Alds().certificate(spectral).exact == pytest.approx(0.5)
    energy, nuclear = five_ranks(spectra(2)[1]), five_ranks(spectra(1)[1])
    assert ranks(Energy(), energy) == (2, 3)
    assert worst(energy, energy.indices(Energy().solve(energy))) == pytest.approx(1 / 6)
    assert ranks(Energy(), nuclear) == (2, 3)


def two_directions(budget: int) -> tuple[Alds, Problem]:
    """T-A6: 4 x 16, of rank two, but of rank one in either half of the inputs."""
    W = torch.zeros(4, 16)
    W[0, 0], W[1, 8] = 3, 2
    model = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(W)
    factorisation, problem = benched(model, torch.zeros(1, 16), {})
    kept = (budget + problem.remainder_cost["params"]) / problem.dense["params"]
    problem = build_problem(factorisation.space, factorisation.errors(), {"params": kept})
    assert problem.limits["params"] == pytest.approx(budget)
    strategy = bound_to(factorisation)
    assert isinstance(strategy, Alds)
    return strategy, problem


def as_seen(strategy: Alds, problem: Problem) -> Problem:
    """The problem with the spectral errors of a bound strategy."""
    table = tuple(
        np.array([strategy.spectral[name][c] for c in choices])
        for name, choices in problem.choices.items()
    )
    return Problem(problem.choices, table, problem.costs, problem.remainder_cost, problem.budget)


def test_t_a6_the_local_step_takes_the_groups_that_are_exact() -> None:
    strategy, problem = two_directions(24)
    table = as_seen(strategy, problem)
    (choices,) = problem.choices.values()
    cost = dict(zip(choices, *problem.costs["params"], strict=True))
    assert cost[Choice("svd", (1,))] == 20
    assert cost[Choice("group_svd", (2, 1))] == 24
    assert cost[Choice("group_svd", (8, 1))] == 48
    plain = min_max(*_only(table, "svd"), list(table.limits.values()))
    assert plain.value == pytest.approx(2 / 3)
    assert list(strategy.solve(problem).values()) == [Choice("group_svd", (2, 1))]
    assert strategy.certificate(problem).exact == pytest.approx(0, abs=1e-7)


def _only(problem: Problem, operator: str) -> tuple[object, object]:
    kept = problem.within((operator,))
    return kept.errors, kept.budgeted()


def test_the_alternation_repicks_groups_at_the_budget_that_a_layer_has() -> None:
    """Rank one of one group costs 6; at that, two groups of one are better: cost 6, error 0.2."""
    rows = [(DENSE, 0, 20), ("svd:2", 0.4, 12), ("svd:1", 0.9, 6), ("group_svd:2x1", 0.2, 6)]
    choices = tuple(c if c == DENSE else Choice.parse(c) for c, *_ in rows)
    errors, costs = (np.array([float(r[i]) for r in rows]) for i in (1, 2))

    def problem(kept: float) -> Problem:
        table = {"params": (costs, costs)}
        pair = {"a": choices, "b": choices}
        return Problem(pair, (errors, errors), table, {"params": 0.0}, {"params": kept})

    found = iterate(problem(12 / 40), n_seeds=1)
    assert found.traces == ((0.9, 0.2),)
    assert found.indices == (3, 3)
    once = iterate(problem(12 / 40), n_seeds=1, iterations=1)
    assert once.epsilon == 0.9
    impossible = iterate(problem(11 / 40))
    assert impossible.indices == ()
    assert impossible.epsilon == float("inf")


def test_the_alternation_from_one_start_may_stop_short_of_the_optimum() -> None:
    """T-A6 with slack that no layer holds: one group costs 20, the exact two groups 24."""
    strategy, problem = two_directions(30)
    stuck = iterate(as_seen(strategy, problem), n_seeds=1)
    assert stuck.epsilon == pytest.approx(2 / 3)
    assert strategy.certificate(problem).exact == pytest.approx(0, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, layers=st.integers(1, 6))
def test_t_a9_the_answer_is_never_worse_than_the_alternation(seed: int, layers: int) -> None:
    problem = grouped_problem(seed, layers)
    table = rooted(problem)
    found = iterate(table)
    certificate = Alds().certificate(problem)
    indices = problem.indices(Alds().solve(problem))
    assert problem.meets(indices)
    assert worst(table, indices) == certificate.exact
    assert certificate.iterated == found.epsilon
    assert certificate.gap >= 0
    if found.indices:
        assert problem.meets(found.indices)
        assert worst(table, found.indices) == found.epsilon


@settings(max_examples=60, deadline=None)
@given(seed=seeds, layers=st.integers(1, 6))
def test_t_a9_the_error_never_increases_and_plain_svd_is_a_start(seed: int, layers: int) -> None:
    table = rooted(grouped_problem(seed, layers))
    found = iterate(table, iterations=6)
    assert len(found.traces) == 15
    for trace in found.traces:
        assert all(after <= before for before, after in itertools.pairwise(trace))
    plain = table.within(("svd",))
    try:
        least = min_max(plain.errors, plain.budgeted(), list(plain.limits.values())).value
    except rankNAS.BudgetError:
        return
    assert found.traces[0][0] == least
    assert found.epsilon <= least


@settings(max_examples=30, deadline=None)
@given(seed=seeds, layers=st.integers(1, 2))
def test_the_answer_is_the_best_of_all_allocations(seed: int, layers: int) -> None:
    problem = grouped_problem(seed, layers)
    table = rooted(problem)
    space = itertools.product(*(range(len(e)) for e in problem.errors))
    best = min(worst(table, i) for i in space if problem.meets(i))
    assert worst(table, problem.indices(Alds().solve(problem))) == best


def test_t_a9_fine_ranks_use_the_budget_to_half_a_percent() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(200, 0, -1)
    names = [f"layer{i}" for i in range(6)]
    for kept in (0.8, 0.5, 0.2):
        problem = Problem(
            dict.fromkeys(names, (DENSE, *(Choice("svd", (int(r),)) for r in steps))),
            tuple(np.append(0, (1 - steps / 201) ** rng.uniform(1, 4)) for _ in names),
            {"params": tuple(rng.uniform(1, 9) * np.append(201, steps) for _ in names)},
            {"params": 100.0},
            {"params": kept},
        )
        used = problem.fractions(problem.indices(Alds().solve(problem)))["params"]
        assert 0.995 * kept <= used <= kept * (1 + 1e-9)


# -------------------------------------------------------------------------------------- binding


@pytest.mark.parametrize("sqrt_k", [True, False])
def test_bound_errors_belong_to_their_choices(small_net: nn.Module, sqrt_k: bool) -> None:
    factorisation, problem = benched(small_net, torch.zeros(1, 3, 8, 8), {"params": 0.6})
    strategy = bound_to(factorisation, sqrt_k)
    assert isinstance(strategy, Alds)
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert strategy == bound_to(factorisation, sqrt_k)
    assert strategy != Alds(sqrt_k=sqrt_k)
    groups = set()
    for name, choices in problem.choices.items():
        assert set(strategy.spectral[name]) == set(choices)
        assert strategy.spectral[name][DENSE] == 0
        weight = factorisation.layers[name].weight
        for choice in choices[1:]:
            k = choice.rank[0] if choice.operator == "group_svd" else 1
            groups.add(k)
            expected = spectral_errors(weight, k)[choice.rank[-1]] * (k**0.5 if sqrt_k else 1)
            assert strategy.spectral[name][choice] == pytest.approx(expected)
    assert len(groups) > 2
    table = as_seen(strategy, problem)
    indices = problem.indices(strategy.solve(problem))
    assert problem.meets(indices)
    assert worst(table, indices) == strategy.certificate(problem).exact


def test_choices_of_other_operators_are_left_out(small_net: nn.Module) -> None:
    space = compile_space(small_net, torch.zeros(1, 3, 8, 8))
    factorisation = factorise(small_net, space, norm="weight")
    problem = build_problem(factorisation.space, factorisation.errors(), {"macs": 0.5})
    assert {"tucker2", "spatial_svd"} <= {c.operator for x in problem.choices.values() for c in x}
    for strategy in (Alds(), bound_to(factorisation)):
        assert isinstance(strategy, Alds)
        allocation = strategy.solve(problem)
        assert {c.operator for c in allocation.values()} <= {"dense", "svd", "group_svd"}
        assert strategy.certificate(problem).gap >= 0


def test_the_search_binds_and_logs_the_certificate(
    small_net: nn.Module, small_data: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="rankNAS.strategies.one_shot.alds"):
        study = rankNAS.search(
            small_net,
            small_data,
            budget={"params": 0.5},
            strategy=Alds(),
            n_trials=2,
            settings=rankNAS.Settings(calibration=64, validation=50),
        )
    assert len(study.trials) == 1
    certificate = study.strategy.certificate(study.problems[0])
    assert f"worst error {certificate.exact:.6g}" in caplog.text
    assert f"reaches {certificate.iterated:.6g}" in caplog.text


@pytest.mark.parametrize("operators", [None, ("svd", "tucker2")])
def test_operators_without_a_bound_are_refused(operators: tuple[str, ...] | None) -> None:
    with pytest.raises(UsageError, match="must be among svd, group_svd"):
        Alds(operators=operators)
