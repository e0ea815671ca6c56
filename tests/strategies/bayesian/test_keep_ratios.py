"""Shared keep-ratios: which layers share one, and the allocations that ratios stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankNAS.allocation import DENSE, Choice
from rankNAS.decompositions import LayerShape, Svd
from rankNAS.exceptions import BudgetError
from rankNAS.strategies.bayesian.keep_ratios import BAND, KeepRatios, kind
from rankNAS.strategies.problem import Array, Problem
from rankNAS.testing import random_problem

WIDTH, HIDDEN = 4096, 11008  # LLaMA 7B
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}


def llama(budget: float, blocks: int = 4, multiple_of: int = 8) -> Problem:
    """The decomposed layers of LLaMA 7B, with fewer blocks; an error is what a rank leaves out."""
    choices, errors, costs = {}, [], []
    for block in range(blocks):
        for name, (inputs, outputs) in SHAPES.items():
            shape, operator = LayerShape(inputs, outputs), Svd()
            ranks = [r for (r,) in operator.families(shape, multiple_of)[0]][::-1]
            dense = shape.cost().params
            ranks = [r for r in ranks if operator.cost(shape, (r,)).params < dense]
            kept = [operator.cost(shape, (r,)).params for r in ranks]
            options = (DENSE, *(Choice("svd", (r,)) for r in ranks))
            choices[f"model.layers.{block}.{name}"] = options
            costs.append(np.array([dense, *kept], dtype=float))
            errors.append(1 - np.array([WIDTH, *ranks]) / WIDTH)
    params = {"params": tuple(costs)}
    return Problem(choices, tuple(errors), params, {"params": 0.0}, {"params": budget})


def decoded_ranks(problem: Problem, ratios: KeepRatios, values: list[float]) -> list[int | None]:
    """Ranks by layer; None is dense."""
    (row,) = ratios.decode(np.array([values]))
    choices = ratios.problem.allocation(row.tolist()).values()
    return [c.rank[0] if c.rank else None for c in choices]


def test_kinds() -> None:
    attention = "bert.encoder.layer.{}.attention.self.{}"
    assert kind(attention.format(7, "query")) == kind(attention.format(3, "key"))
    assert kind(attention.format(7, "query")) != kind(attention.format(7, "value"))
    assert kind("bert.encoder.layer.0.attention.output.dense") != kind(
        "bert.encoder.layer.0.output.dense"
    )
    blocks = [kind(f"layer{s}.{b}.conv{c}") for s in (1, 2) for b in (0, 1) for c in (1, 2)]
    assert set(blocks) == {"layer.conv1", "layer.conv2"}
    assert kind("0") == kind("4") == "layers"


@pytest.mark.parametrize(("stages", "variables"), [(1, 5), (4, 20)])
def test_five_variables_a_stage_and_never_the_values(stages: int, variables: int) -> None:
    problem = llama(0.8, blocks=8)
    ratios = KeepRatios.of(problem, stages)
    assert len(ratios.variables) == variables
    names = list(problem.choices)
    grouped = [[names[i] for i in layers] for layers in ratios.variables.values()]
    assert sorted(sum(grouped, [])) == sorted(n for n in names if not n.endswith("v_proj"))
    for group, attention in zip(grouped, ratios.attention, strict=True):
        blocks = {int(name.split(".")[2]) for name in group}
        first, size = min(blocks), 8 // stages
        assert first % size == 0 and blocks == set(range(first, first + size))
        assert all(("self_attn" in name) == attention for name in group)
        tail = {name.rsplit(".", 1)[1] for name in group}
        assert len(tail) == 1 or tail == {"q_proj", "k_proj"}


def test_queries_and_keys_of_a_block_are_in_one_stage() -> None:
    ratios = KeepRatios.of(llama(0.8, blocks=6), 4)
    names = list(ratios.problem.choices)
    for layers in ratios.variables.values():
        tails = [names[i].rsplit(".", 1)[1] for i in layers]
        assert tails.count("q_proj") == tails.count("k_proj")


def test_t_c3_ranks() -> None:
    problem = llama(0.8, blocks=1)
    ratios = KeepRatios.of(problem, 1)  # q and k; o; gate; up; down
    assert decoded_ranks(problem, ratios, [0.5, 0.5, 0.5, 0.8, 0.8]) == [
        *(1024, 1024, None, 1024),
        *(1488, 2384, 2384),
    ]
    for (inputs, outputs), full in (((WIDTH, WIDTH), 2048), ((WIDTH, HIDDEN), 2985)):
        cost, dense = Svd().cost(LayerShape(inputs, outputs), (full,)).params, inputs * outputs
        assert cost <= dense < cost + inputs + outputs  # one more rank costs more than dense


@pytest.mark.parametrize(
    ("budget", "stages", "published"),
    [
        (0.8, 1, [744, 1616, 2512, 2408, None]),
        (0.7, 1, [656, 1392, 2128, 2352, 2312]),
        (
            0.8,
            4,
            [
                *(680, 1728, 2960, None, None),
                *(968, 1888, 2536, 2640, 2632),
                *(408, 1488, None, 2272, 2864),
                *(656, 496, 2824, 2448, 2280),
            ],
        ),
        (
            0.7,
            4,
            [
                *(1016, 1632, 2376, 2384, 2384),
                *(840, 1632, 2384, 2376, 2384),
                *(408, 992, 2376, 2384, 2384),
                *(408, 560, 2384, 1896, 1792),
            ],
        ),
    ],
)
def test_t_c3_published_allocations_use_up_their_budgets(
    budget: float, stages: int, published: list[int | None]
) -> None:
    problem = llama(budget)
    ratios = KeepRatios.of(problem, stages)
    values = []
    for rank, layers in zip(published, ratios.variables.values(), strict=True):
        inputs, outputs = SHAPES[".".join(list(problem.choices)[layers[0]].split(".")[3:])]
        values.append(1.0 if rank is None else rank * (inputs + outputs) / (inputs * outputs))
    indices = ratios.decode(np.array([values]))
    found = decoded_ranks(problem, ratios, values)
    for rank, layers in zip(published, ratios.variables.values(), strict=True):
        assert {found[i] for i in layers} == {rank}
    assert found[2::7] == [None] * 4
    kept = problem.fractions(indices[0].tolist())["params"]
    assert budget - 0.002 <= kept <= budget
    assert ratios.feasible(indices).all()
    # the variables of an allocation are the ratios that it was made of
    np.testing.assert_allclose(ratios.kept(problem, indices)[0], values, atol=1e-12)


def test_t_c7_what_is_not_just_within_the_budget_is_rejected() -> None:
    ratios = KeepRatios.of(llama(0.8, blocks=1), 1)
    h = HIDDEN / WIDTH
    dense = 4 + 3 * h

    def accepted(values: list[float]) -> bool:
        return bool(ratios.feasible(ratios.decode(np.array([values])))[0])

    for x in (0.3, 0.6, 0.7, 0.75, 0.85, 1.0):
        values = [x] * 5
        kept = (3 * x + 1 + 3 * h * x) / dense  # the values stay
        assert accepted(values) == (0.7 < kept < 0.8)
    assert decoded_ranks(ratios.problem, ratios, [1.0] * 5) == [None] * 7


@settings(max_examples=8, deadline=None)
@given(budget=st.floats(0.15, 0.95), stages=st.integers(1, 4), seed=st.integers(0, 1000))
def test_t_c7_samples_are_feasible_and_leave_values_alone(
    budget: float, stages: int, seed: int
) -> None:
    problem = coarse(budget)
    ratios = KeepRatios.of(problem, stages)
    rng = np.random.default_rng(seed)
    rows = ratios.draw(rng, 40)
    assert len(rows) >= 5
    near = ratios.around(rng, ratios.kept(ratios.problem, rows[:1])[0], 60)
    for row in np.concatenate([rows, near]).tolist():
        allocation = ratios.problem.allocation(row)
        assert problem.meets(problem.indices(allocation))
        kept = problem.fractions(problem.indices(allocation))["params"]
        assert budget - BAND - 1e-9 <= kept <= budget * (1 + 1e-9)
        assert all(c == DENSE for name, c in allocation.items() if name.endswith("v_proj"))


def coarse(budget: float) -> Problem:
    return llama(budget, multiple_of=128)


def test_the_default_keeps_the_published_proportions_on_the_budget() -> None:
    problem = llama(0.8)
    ratios = KeepRatios.of(problem, 1)
    default = ratios.default()
    kept = ratios.kept(problem, np.array([problem.indices(default)]))[0]
    others = kept[~ratios.attention].mean()
    np.testing.assert_allclose(kept, np.where(ratios.attention, 0.5 / 0.8, 1) * others, atol=5e-3)
    assert 0.79 < problem.fractions(problem.indices(default))["params"] <= 0.8


def test_values_alone_can_be_too_much() -> None:
    with pytest.raises(BudgetError, match="smallest possible"):
        KeepRatios.of(llama(0.05), 1)
    problem = llama(0.05)
    problem.check()  # although compressing them would do


@given(st.integers(0, 10**5), st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_a_layer_takes_its_most_accurate_choice_within_its_ratio(seed: int, budgets: int) -> None:
    problem = random_problem(seed, budgets=budgets)
    ratios = KeepRatios.of(problem, 1)
    values: Array = np.random.default_rng(seed).uniform(0, 1, (7, len(ratios.variables)))
    for row, point in zip(ratios.decode(values), values, strict=True):
        for layer, (i, x) in enumerate(zip(row, point, strict=True)):
            tables = [table[layer] / table[layer][0] for table in problem.budgeted()]
            relative = np.max(tables, axis=0)
            if (within := relative <= x).any():
                assert within[i]
                assert problem.errors[layer][i] == problem.errors[layer][within].min()
            else:
                assert relative[i] == relative.min()


def test_choices_too_coarse_for_the_band_are_still_found() -> None:
    problem = replace(random_problem(0, layers=1, choices=2), budget={"macs": 0.999})
    ratios = KeepRatios.of(problem, 1)
    rows = ratios.draw(np.random.default_rng(0), 5)
    assert len(rows) and (rows == 1).all()
