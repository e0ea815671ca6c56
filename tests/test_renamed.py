"""Names of version 0.1 are accepted with a warning that says the new one."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pytest
import torch
from searches import linear_search
from torch import nn

import rankNAS
from rankNAS import hw_models, objectives, search_spaces, strategies
from rankNAS.allocation import Allocation
from rankNAS.cli.options.search import SearchOptions
from rankNAS.decompositions import norms
from rankNAS.hw_models import HardwareModel, compile_latency
from rankNAS.objectives import Metric, base, make_objective
from rankNAS.renamed import (
    OBJECTIVE_CLASSES,
    OBJECTIVES,
    OPTIONS,
    RenamedWarning,
    renamed,
    renamed_exports,
)
from rankNAS.search_spaces import compile_space

# Their types know the current names alone.
Settings: Any = rankNAS.Settings
RankPolicy: Any = search_spaces.RankPolicy
Problem: Any = strategies.Problem
Trial: Any = strategies.Trial
LatencyTables: Any = hw_models.LatencyTables
Statistics: Any = norms.Statistics


@renamed(colour="color", paint="draw")
@dataclass(frozen=True)
class Shape:
    """What the tests of the helper rename."""

    color: str = "red"

    def draw(self) -> str:
        return f"a {self.color} shape"


AnyShape: Any = Shape


def test_keywords_attributes_and_methods() -> None:
    with pytest.warns(RenamedWarning, match=r"Shape\(colour=\) is now Shape\(color=\)\."):
        shape = AnyShape(colour="blue")
    assert shape == Shape(color="blue") == Shape("blue")
    with pytest.warns(RenamedWarning, match=r"Shape\.colour is now Shape\.color\."):
        assert shape.colour == "blue"
    with pytest.warns(RenamedWarning, match=r"Shape\.paint is now Shape\.draw\."):
        assert shape.paint() == "a blue shape"
    with pytest.warns(RenamedWarning):
        assert replace(shape, colour="green") == Shape("green")


def test_the_current_names_give_no_warning() -> None:
    shape = Shape(color="blue")
    assert shape.draw() == "a blue shape" and asdict(shape) == {"color": "blue"}
    assert [f.name for f in fields(Shape)] == ["color"]
    assert pickle.loads(pickle.dumps(shape)) == replace(shape)
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        AnyShape(size=3)
    with pytest.raises(AttributeError, match="no attribute 'size'"):
        _ = shape.size


def test_a_warning_blames_the_caller_and_is_shown_by_default() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        _ = AnyShape(colour="blue").colour
    assert [w.filename for w in caught] == [__file__] * 2
    assert issubclass(RenamedWarning, FutureWarning)


def test_a_subclass_may_override_under_the_old_name() -> None:
    with pytest.warns(RenamedWarning, match=r"the method Old\.paint is now Old\.draw"):

        class Old(Shape):
            def paint(self) -> str:
                return f"old, {super().paint()}"

    with pytest.warns(RenamedWarning):
        assert Old().draw() == Old().paint() == "old, a red shape"

    class New(Shape):
        def draw(self) -> str:
            return f"new, {super().draw()}"

    assert New().draw() == "new, a red shape"
    with pytest.warns(RenamedWarning):
        assert New().paint() == "new, a red shape"


def test_a_subclass_may_use_an_old_name_for_something_else() -> None:
    @dataclass(frozen=True)
    class Other(Shape):
        colour: int = 3

    assert Other(colour=4).colour == 4

    class Plain:
        pass

    class Own(renamed(colour="color")(Plain)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.colour = 5

    assert Own().colour == 5


def test_names_of_a_module() -> None:
    find = renamed_exports("rankNAS.objectives.base", {"Candidate": "EvaluationResult"})
    with pytest.warns(RenamedWarning, match=r"base\.Candidate is now .*base\.EvaluationResult"):
        assert find("Candidate") is base.EvaluationResult
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        find("nothing")


# ------------------------------------------------------------------------------- what is renamed


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: Settings(metric="input"), Settings(norm="input")),
        (lambda: replace(Settings(), metric="input"), Settings(norm="input")),
        (lambda: RankPolicy(latency_steps=0.1), RankPolicy(latency_tolerance=0.1)),
        (lambda: RankPolicy(only_faster=True), RankPolicy(require_speedup=True)),
        (lambda: make_objective("agreement"), make_objective("kl_divergence")),
        (lambda: make_objective("reverse_agreement"), make_objective("reverse_kl")),
        (lambda: objectives.Accuracy(), Metric("accuracy", "maximize")),
        (lambda: objectives.Loss(), Metric("loss", "minimize")),
        (lambda: objectives.Agreement(), Metric("kl_divergence", "minimize")),
        (lambda: objectives.ReverseAgreement(), Metric("reverse_kl", "minimize")),
        (lambda: base.Candidate, base.EvaluationResult),
        (
            lambda: Trial(0, Allocation.of({}), "complete", target="macs<=0.5").target,
            "macs<=0.5",
        ),
        (lambda: Problem({}, (), {}, rest={}, budget={"macs": 0.5}).label, "macs<=0.5"),
        (lambda: LatencyTables({}, {}, {}, rest=(1.0, 0.0)).rest, (1.0, 0.0)),
    ],
)
def test_old_and_new_are_the_same(make: Callable[[], Any], same: object) -> None:
    with pytest.warns(RenamedWarning):
        assert make() == same


def test_settings_still_check_what_they_are_given() -> None:
    with pytest.warns(RenamedWarning), pytest.raises(rankNAS.UsageError, match="`norm` must be"):
        Settings(metric="fischer")


def test_statistics() -> None:
    moment, gradient = torch.eye(2)[None], torch.eye(3)[None]
    with pytest.warns(RenamedWarning):
        statistics = Statistics(moment=moment, mean=torch.zeros(1, 2), gradient=gradient)
    assert statistics.input_second_moment is moment
    with pytest.warns(RenamedWarning):
        assert statistics.moment is moment and statistics.gradient is gradient


def test_studies_and_spaces() -> None:
    study = linear_search()
    with pytest.warns(RenamedWarning):
        assert study.answer(study.problem) == study.best
    space = study.evaluator.factorisation.space
    with pytest.warns(RenamedWarning):
        assert space.rest == space.remainder_cost


def test_a_hardware_model_with_the_old_method() -> None:
    with pytest.warns(RenamedWarning, match=r"Board\.rest is now Board\.remainder_cost"):

        class Board(HardwareModel):
            name = "board"

            def latency(self, layer: Any, choice: Any) -> tuple[float, float]:
                return 1e-6, 0.0

            def rest(self, space: Any) -> tuple[float, float]:
                return 5e-3, 0.0

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    space = compile_space(model, torch.zeros(1, 64))
    tables = compile_latency(Board().bind(model, space), space)
    assert tables.remainder_cost == (5e-3, 0.0)
    assert tables.predict(space.dense)[0] == pytest.approx(5e-3 + 2e-6)


def test_the_tables_lead_to_names_that_exist() -> None:
    assert {*OPTIONS.values()} <= {f.name for f in fields(SearchOptions)}
    assert not {*OPTIONS} & {f.name for f in fields(SearchOptions)}
    assert {*OBJECTIVES.values(), *OBJECTIVE_CLASSES.values()} <= {*objectives.OBJECTIVES}
    assert not {*OBJECTIVES} & {*objectives.OBJECTIVES}
