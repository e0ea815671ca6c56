"""What a strategy sees."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.strategies.history import History, Trial
from rankNAS.strategies.problem import Problem

CHOICES = (DENSE, Choice("svd", (4,)), Choice("svd", (1,)))
PROBLEM = Problem(
    {"a": CHOICES, "b": CHOICES},
    (np.array([0, 0.1, 0.5]),) * 2,
    {"macs": (np.array([10.0, 6, 2]),) * 2},
    {"macs": 0.0},
    {"macs": 0.5},
    objectives=("accuracy",),
    directions=("maximize",),
)


def allocation(a: int, b: int) -> Allocation:
    return Allocation.of({"a": CHOICES[a], "b": CHOICES[b]})


trials = st.lists(
    st.builds(
        lambda a, b, state, probe, target: Trial(
            0, allocation(a, b), state, (0.5,), probe=probe, budget_key=target
        ),
        st.integers(0, 2),
        st.integers(0, 2),
        st.sampled_from(["complete", "failed", "pruned"]),
        st.booleans(),
        st.sampled_from(["macs<=0.5", "macs<=0.3"]),
    ),
    max_size=12,
)


@given(trials, st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=3))
def test_a_history_that_grows_equals_one_that_is_read_at_once(
    found: list[Trial], waiting: list[tuple[int, int]]
) -> None:
    pending = tuple(allocation(*pair) for pair in waiting)
    grown = History()
    for trial in found:
        _ = grown.complete, grown.found, grown.feasible(PROBLEM), grown.candidates(PROBLEM)
        grown = grown.extended(trial)
    grown, whole = grown.awaiting(pending), History(tuple(found), pending)
    assert grown == whole
    assert grown.complete == whole.complete == tuple(t for t in found if t.state == "complete")
    assert grown.found == whole.found
    assert grown.feasible(PROBLEM) == whole.feasible(PROBLEM)
    assert grown.candidates(PROBLEM) == whole.candidates(PROBLEM)
    tried = {t.allocation for t in found if not t.probe}
    assert set(grown.tried) == tried | set(pending)
    assert set(grown.proposed) == {t.allocation for t in found} | set(pending)
    for trial in found:
        known = [t for t in found if t.allocation == trial.allocation]
        assert grown.has(trial.allocation, probe=True)
        assert grown.has(trial.allocation, probe=False) == (not all(t.probe for t in known))
        wanted = [t for t in known if not t.probe] or known
        assert grown.found[trial.allocation] == wanted[-1]
    kept = {t.allocation: PROBLEM.fractions(PROBLEM.indices(t.allocation)) for t in found}
    assert whole.feasible(PROBLEM) == tuple(
        t for t in whole.complete if kept[t.allocation]["macs"] <= 0.5
    )


def test_an_allocation_finds_itself_in_another_process() -> None:
    # Hashes of strings differ between processes; one that came along would never match.
    own = allocation(1, 2)
    known = {own: 1}
    script = (
        "import pickle, sys; own = pickle.load(sys.stdin.buffer); hash(own);"
        "sys.stdout.buffer.write(pickle.dumps(own))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(own), capture_output=True, check=True
    )
    assert known[pickle.loads(done.stdout)] == 1
