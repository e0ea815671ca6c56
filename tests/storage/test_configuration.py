"""What a study was made with, described and held against what is given now."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankNAS.recovery import TrainingConfig
from rankNAS.settings import Settings
from rankNAS.storage.configuration import canonical, differences
from rankNAS.strategies import STRATEGIES, make_strategy


class Plain:
    """Prints as its address."""


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)
    unseen: Any = field(default=0, repr=False)
    needed: int = field(kw_only=True)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(canonical(value)))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("class"), inner),
)


@given(values)
def test_nothing_differs_from_itself(value: Any) -> None:
    assert list(differences(through_json(value), value)) == []


@given(values, values)
def test_what_differs_is_found(one: Any, other: Any) -> None:
    differs = bool(list(differences(through_json({"x": one}), {"x": other})))
    assert differs == (through_json(one) != through_json(other))


@pytest.mark.parametrize(
    "value",
    [*map(make_strategy, STRATEGIES), Settings(), Settings(recovery=TrainingConfig(3))],
    ids=str,
)
def test_strategies_and_settings_survive_storage(value: Any) -> None:
    assert list(differences(through_json(value), value)) == []


def test_fields_are_named_by_their_path() -> None:
    before, now = Outer(needed=1), Outer(Inner(5), (1, 2, 3), "x", needed=1)
    assert list(differences(through_json({"of": before}), {"of": now})) == [
        "of.inner.size was 1, is 5",
        "of.sizes was [1, 2], is [1, 2, 3]",
    ]


def test_a_field_newer_than_the_study_counts_as_its_default() -> None:
    stored = through_json(Outer(needed=1))
    del stored["inner"], stored["sizes"]
    assert list(differences(stored, Outer(needed=1))) == []
    assert list(differences(stored, Outer(Inner(2), needed=1))) == [
        "inner was not known, is {'class': 'Inner', 'size': 2}"
    ]
    del stored["needed"]
    assert list(differences(stored, Outer(needed=1))) == ["needed was not known, is 1"]


def test_a_field_that_is_gone_differs() -> None:
    stored = through_json(Inner()) | {"weight": 2}
    assert list(differences(stored, Inner())) == ["weight was 2, is not known"]


def test_another_class_differs() -> None:
    assert list(differences(through_json(Inner()), Outer(needed=1), "x")) == [
        "x was 'Inner', is 'Outer'"
    ]
    assert list(differences("Inner(size=1)", Inner(), "x")) == [
        "x was 'Inner(size=1)', is {'class': 'Inner', 'size': 1}"
    ]


def test_no_address_is_described() -> None:
    assert canonical([Plain(), Plain, through_json]) == ["Plain", "Plain", "through_json"]
