"""Figures of a search, from a document made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rankNAS.reporting.figures import latency, pareto, progress, ranks

Document = dict[str, Any]


def trial(number: int, accuracy: float, macs: float, target: str, **other: Any) -> Document:
    metrics = {"accuracy": accuracy, "macs": macs}
    made = {"number": number, "state": "complete", "probe": False, "budget_key": target}
    return {**made, "values": [accuracy], "metrics": metrics, "seconds": 1.0, **other}


def document(**changes: Any) -> Document:
    a, b = "macs<=0.6", "macs<=0.4"
    lost: Document = {"values": [], "metrics": {}, "reason": "<b>no</b>"}
    layers = {
        "conv<1>": {
            **{"macs": 100, "best_macs": 40, "shape": "8 to 8", "operator": "svd", "rank": [4]},
            **{"break_even_rank": [9], "full_rank": [12], "full_macs": 120},
        },
        "fc": {
            **{"macs": 50, "best_macs": 50, "shape": "8 to 8", "operator": "dense", "rank": []},
            **{"break_even_rank": None, "full_rank": None, "full_macs": None},
        },
    }
    best = {"accuracy": 0.8, "macs": 60, "allocation": {"conv<1>": "svd:4", "fc": "dense"}}
    solutions = [
        {"budget_key": a, "budget": {"macs": 0.6}, "best": best, "layers": layers, "trial": 1}
        | {"feasible": [0, 1, 3], "pareto_front": [1]},
        {"budget_key": b, "budget": {"macs": 0.4}, "best": best, "layers": layers, "trial": 3}
        | {"feasible": [3], "pareto_front": [3]},
    ]
    trials = [
        trial(0, 0.7, 60, a),
        trial(1, 0.8, 55, a),
        trial(2, 0.85, 90, a, probe=True),
        trial(3, 0.6, 40, b),
        trial(4, 0, 0, b, state="failed", **lost),
    ]
    made: Document = {"objectives": ["accuracy"], "directions": ["maximize"], "cost": "macs"}
    made |= {"dense": {"accuracy": 0.9, "macs": 100}, "solutions": solutions, "trials": trials}
    return {**made, **changes}


def traces(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data}


def test_progress_has_every_trial_once_and_the_best_so_far() -> None:
    found = traces(progress(document()))
    assert list(found["macs&lt;=0.6, trials"].x) == [0, 1]
    assert list(found["macs&lt;=0.6, trials"].y) == [0.7, 0.8]
    assert list(found["macs&lt;=0.6, probes"].x) == [2]
    assert list(found["failed"].x) == [4]
    # Trial 3 was made for the other budget and is within this one too; the probe is not.
    best = found["best so far, macs&lt;=0.6"]
    assert list(zip(best.x, best.y, strict=True)) == [(0, 0.7), (1, 0.8), (3, 0.8)]
    dots = [t for t in found.values() if t.mode == "markers"]
    assert sum(len(t.x) for t in dots) == 5


def test_the_best_so_far_follows_the_direction() -> None:
    best = traces(progress(document(directions=["minimize"])))["best so far, macs&lt;=0.6"]
    assert list(best.y) == [0.7, 0.7, 0.6]


def test_one_objective_is_drawn_against_the_cost_that_is_kept() -> None:
    (figure,) = pareto(document())
    found = traces(figure)
    front = found["Pareto front"]
    assert list(front.x) == [0.4, 0.55, 0.9] and list(front.y) == [0.6, 0.8, 0.85]
    assert "trial 3" in front.hovertext[0] and "40.0 % kept" in front.hovertext[0]
    assert list(found["dense network"].x) == [1.0]


def test_several_objectives_are_drawn_against_the_first() -> None:
    both = document(objectives=["accuracy", "macs"], directions=["maximize", "minimize"])
    for t in both["trials"]:
        t["values"] = list(t["metrics"].values())
    (figure,) = pareto(both)
    found = traces(figure)
    assert list(found["Pareto front, macs&lt;=0.6"].x) == [55]
    assert list(found["Pareto front, macs&lt;=0.4"].x) == [40]
    both["objectives"], both["directions"] = ["accuracy", "macs", "x"], ["maximize"] * 3
    for t in both["trials"]:
        t["values"] += [1.0] * bool(t["values"])
    assert len(pareto(both)) == 2


def test_a_search_that_has_not_ended_has_the_front_of_all_its_trials() -> None:
    (figure,) = pareto(document(solutions=[], dense={}))
    assert list(traces(figure)["Pareto front"].x) == [40, 55, 90]
    assert len(progress(document(solutions=[], dense={})).data) == 4


def test_ranks_are_shares_of_break_even() -> None:
    found = traces(ranks(document()["solutions"][0]))
    assert list(found["svd"].x) == [pytest.approx(0.4)] and list(found["svd"].y) == [0]
    assert list(found["dense"].x) == [1.0]
    assert list(found["full rank"].x) == [pytest.approx(1.2)]
    hover = found["svd"].hovertext[0]
    assert "break-even rank 9" in hover and "full rank 12" in hover and "svd:4" in hover
    assert "conv&lt;1&gt;" in hover and "conv<1>" not in hover
    assert list(found["kept MACs"].x) == [40, 50]


def test_latency_is_drawn_where_it_is_known() -> None:
    assert latency(document()) is None
    made = document()
    made["dense"] |= {"predicted_latency": 0.004, "predicted_latency_std": 1e-4}
    made["dense"]["measured_latency"] = {"seconds": 0.005, "spread": 1e-5, "rounds": 9}
    figure = latency(made)
    assert figure is not None
    found = traces(figure)
    assert list(found["predicted"].y) == [pytest.approx(4.0)]
    assert list(found["measured"].y) == [pytest.approx(5.0)]
    assert list(found["measured"].error_y.array) == [pytest.approx(0.01)]


def test_user_text_is_escaped() -> None:
    hover = traces(progress(document()))["failed"].hovertext[0]
    assert "&lt;b&gt;no&lt;/b&gt;" in hover
