"""Greedy PCA: its spectrum, its score, and the path it takes."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankNAS
from rankNAS.allocation import DENSE, Choice
from rankNAS.strategies.one_shot.pca_greedy import PcaGreedy, removal_scores
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.spectra import output_spectrum
from rankNAS.testing import StrategyContract, random_problem

seeds = st.integers(0, 10**6)


class TestPcaGreedy(StrategyContract):
    strategy = PcaGreedy()


def layered(spectra: list[np.ndarray], per_rank: list[float], kept: float) -> Problem:
    """Layers that offer every rank below full, whose errors are the tails of their spectra."""
    names = [f"layer{i}" for i in range(len(spectra))]
    ranks = [np.arange(len(s) - 1, 0, -1) for s in spectra]
    return Problem(
        {
            n: (DENSE, *(Choice("svd", (int(x),)) for x in r))
            for n, r in zip(names, ranks, strict=True)
        },
        tuple(
            np.append(0, [s[x:].sum() / s.sum() for x in r])
            for s, r in zip(spectra, ranks, strict=True)
        ),
        {
            "macs": tuple(
                c * np.append(len(s), r) for c, s, r in zip(per_rank, spectra, ranks, strict=True)
            )
        },
        {"macs": 0.0},
        {"macs": kept},
    )


def bound(problem: Problem, spectra: list[np.ndarray]) -> PcaGreedy:
    pairs = zip(problem.choices, spectra, strict=True)
    return PcaGreedy(spectra={name: tuple(s.tolist()) for name, s in pairs})


def chosen(strategy: PcaGreedy, problem: Problem, spectra: list[np.ndarray]) -> list[int]:
    pairs = zip(strategy.solve(problem).values(), spectra, strict=True)
    return [len(s) if c == DENSE else c.rank[0] for c, s in pairs]


def by_definition(spectra: list[np.ndarray], per_rank: list[float], limit: float) -> list[int]:
    """The ranks of the published greedy: again and again remove the component of least score."""
    ranks = [len(s) for s in spectra]

    def score(i: int) -> float:
        s, r = spectra[i], ranks[i]
        return float(s[r - 1] / s[:r].sum() / per_rank[i]) if r > 1 else float("inf")

    while sum(c * r for c, r in zip(per_rank, ranks, strict=True)) > limit * (1 + 1e-9):
        ranks[min(range(len(ranks)), key=score)] -= 1
    return ranks


def test_scores_are_shares_of_the_energy_that_is_left() -> None:
    scores = removal_scores(np.array([4.0, 2, 1, 1, 0]), 2.0)
    assert scores.tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 14, 1 / 16, 0])
    assert removal_scores(np.zeros(3), 1.0).tolist() == [0, 0, 0]


def test_a_worked_example() -> None:
    """Layer b loses 1/12 first, then 2/11; then a, whose 3/10 is less than b's 4/9."""
    spectra = [np.array([7.0, 3.0]), np.array([5.0, 4.0, 2.0, 1.0])]
    per_rank = [1.0, 1.0]
    for ranks_left, expected in [(6, [2, 4]), (5, [2, 3]), (4, [2, 2]), (3, [1, 2]), (2, [1, 1])]:
        problem = layered(spectra, per_rank, ranks_left / 6)
        assert chosen(bound(problem, spectra), problem, spectra) == expected


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[np.ndarray], list[float], float]:
    rng = np.random.default_rng(draw(seeds))
    layers = draw(st.integers(1, 5))
    sizes = rng.integers(2, 9, layers)
    spectra = [np.sort(rng.uniform(0.01, 1, n) ** rng.uniform(1, 6))[::-1] for n in sizes]
    per_rank = rng.uniform(1, 9, layers).tolist()
    least = sum(per_rank) / sum(c * n for c, n in zip(per_rank, sizes, strict=True))
    return spectra, per_rank, float(rng.uniform(least, 1))


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_the_path_is_the_published_one(case: tuple[list[np.ndarray], list[float], float]) -> None:
    spectra, per_rank, kept = case
    problem = layered(spectra, per_rank, kept)
    expected = by_definition(spectra, per_rank, kept * problem.dense["macs"])
    assert chosen(bound(problem, spectra), problem, spectra) == expected
    # where every rank is offered, differences of the errors are the eigenvalues
    assert chosen(PcaGreedy(), problem, spectra) == expected


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_the_scale_of_a_layer_does_not_matter(
    case: tuple[list[np.ndarray], list[float], float],
) -> None:
    spectra, per_rank, kept = case
    problem = layered(spectra, per_rank, kept)
    scaled = [s * 2.0**i for i, s in enumerate(spectra)]
    assert bound(problem, scaled).solve(problem) == bound(problem, spectra).solve(problem)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, layers=st.integers(1, 6), size=st.integers(3, 12), steps=st.integers(1, 30))
def test_equal_layers_get_equal_ranks(seed: int, layers: int, size: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    falling = np.sort(rng.uniform(0.1, 1, size))[::-1].cumprod()  # so that scores fall as well
    problem = layered([falling] * layers, [1.0] * layers, max(layers, steps) / (layers * size))
    if max(layers, steps) > layers * size:
        return
    found = chosen(bound(problem, [falling] * layers), problem, [falling] * layers)
    assert max(found) - min(found) <= 1
    assert sum(found) == max(layers, steps)


def test_ranks_that_are_not_offered_become_the_next_lower_one() -> None:
    """Of 8 ranks only 5 and 2 are offered: dense until 5 are left, then 5 until 2 are."""
    spectrum = 0.5 ** np.arange(8)
    full = layered([spectrum], [1.0], 1.0)
    keep = [0, 3, 6]
    for kept, expected in [(8, 8), (7.9, 5), (5, 5), (4.9, 2), (2, 2)]:
        problem = Problem(
            {"layer0": tuple(full.choices["layer0"][j] for j in keep)},
            (full.errors[0][keep],),
            {"macs": (full.costs["macs"][0][keep],)},
            {"macs": 0.0},
            {"macs": kept / 8},
        )
        for strategy in (bound(problem, [spectrum]), PcaGreedy()):
            assert chosen(strategy, problem, [spectrum]) == [expected]


@settings(max_examples=60, deadline=None)
@given(seed=seeds, layers=st.integers(1, 6), choices=st.integers(2, 9), budgets=st.integers(1, 2))
def test_budgets_are_never_exceeded(seed: int, layers: int, choices: int, budgets: int) -> None:
    problem = random_problem(seed, layers=layers, choices=choices, budgets=budgets)
    assert problem.meets(problem.indices(PcaGreedy().solve(problem)))


def test_white_inputs_give_squared_singular_values() -> None:
    W = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.svdvals(W).square().sum(0)  # the groups share their rank
    found = output_spectrum(W @ W.mT, 9)
    assert found.tolist() == pytest.approx([*expected.tolist(), 0, 0, 0, 0, 0])


def test_the_search_binds_the_spectra_of_the_outputs(
    small_net: nn.Module, small_data: object
) -> None:
    study = rankNAS.search(
        small_net,
        small_data,
        budget={"macs": 0.5},
        strategy=PcaGreedy(),
        n_trials=2,
        settings=rankNAS.Settings(calibration=64, validation=50, norm="input"),
    )
    assert len(study.trials) == 1
    strategy = study.strategy
    assert isinstance(strategy, PcaGreedy)
    assert pickle.loads(pickle.dumps(strategy)) == strategy != PcaGreedy()
    for name, found in study.context.factorisation.layers.items():
        spectrum = np.array(strategy.spectra[name])
        assert all(a >= b for a, b in itertools.pairwise(spectrum))
        for choice, error in zip(found.layer.choices, found.errors(), strict=True):
            if choice.operator == "svd":  # its error in the input metric is the tail
                tail = spectrum[choice.rank[0] :].sum() / spectrum.sum()
                assert error == pytest.approx(tail, rel=1e-4, abs=1e-6)
    assert study.best.metrics["macs"] <= 0.5 * study.dense["macs"]
