"""Files with a right checksum and forged metadata: errors of ours, and nothing allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.exceptions import RankNASError, UsageError, WeightsError
from rankNAS.io.tensors import CHECKSUM, encoded, read_tensors, write_tensors
from rankNAS.models.artifact import load, read_inputs, read_metadata, save
from rankNAS.models.inputs import InputSpec
from rankNAS.search_spaces.compiler import compile_space

CHOICES = {"0": Choice("svd", (4,)), "2": Choice("tucker2", (5, 4))}


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], Any]:
    torch.manual_seed(0)
    dense, x = model(), torch.randn(2, 8, 8, 8)
    space = compile_space(dense, x[:1], min_weights=1)
    network = factorise(dense, space).materialise(Allocation.of(CHOICES)).eval()
    path = tmp_path_factory.mktemp("forged") / "n.safetensors"
    described = {"space": "mine.py:net", "num_classes": 4, "input_shape": [8, 8, 8]}
    described["inputs"] = InputSpec.of(x).to_json()
    save(network, Allocation.of(CHOICES), path, model=described)
    state, metadata = read_tensors(path)
    assert torch.equal(load(path, model)(x), network(x)) and "outputs" in metadata
    return path, state, metadata


def forged(written: tuple[Path, dict[str, Tensor], Any], key: str, value: Any) -> Path:
    path, state, metadata = written
    other = path.with_name("forged.safetensors")
    entries = {name: text for name, text in metadata.items() if name != CHECKSUM}
    text = value if isinstance(value, str) else json.dumps(value)
    other.write_bytes(encoded(state, entries | {key: text}))
    return other


@pytest.mark.parametrize(
    ("name", "choice", "words"),
    [
        ("0", "svd:-3", "a rank must be between 1 and 16"),
        ("0", "svd:999999999", "a rank must be between 1 and 16"),
        ("0", "svd", "expected 1 numbers"),
        ("0", "svd:4x4", "expected 1 numbers"),
        ("0", "svd:5", "does not fit the model"),
        ("1", "svd:4", "a ReLU cannot be decomposed"),
        ("", "svd:4", "no layer ''"),
        ("0", "magic:4", "no operator 'magic'"),
        ("0", "tucker2:2x2", "1 x 1 kernel"),
        ("2", "group_svd:3x3", "does not divide"),
        ("2", "tucker2:0x4", "a rank must be between"),
        ("2", "tucker2:4", "expected 2 numbers"),
        ("9", "svd:4", "no layer '9'"),
    ],
)
def test_a_forged_choice_is_named(written: Any, name: str, choice: str, words: str) -> None:
    labels = {k: str(c) for k, c in CHOICES.items()} | {name: choice}
    with pytest.raises(UsageError, match=words):
        load(forged(written, "allocation", labels), model)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("num_classes", 10**9, "asks for 1000000000 classes"),
        ("num_classes", True, "does not say how its model is built"),
        ("num_classes", 0, "asks for 0 classes"),
        ("num_classes", -4, "asks for -4 classes"),
        ("input_shape", [3, 10**6, 10**6], "asks for inputs of shape"),
        ("input_shape", [3, 0, 8], "asks for inputs of shape"),
        ("input_shape", [3, True, 8], "does not say how its model is built"),
    ],
)
def test_a_forged_recipe_is_named(written: Any, entry: str, value: Any, words: str) -> None:
    recipe = {"space": "vit_b_16", "num_classes": 4, "input_shape": [3, 32, 32]} | {entry: value}
    with pytest.raises(WeightsError, match=words):
        load(forged(written, "model", recipe))


@pytest.mark.parametrize(
    "node",
    [
        {"shape": [10**6, 10**6], "dtype": "float32", "batched": True},
        {"shape": [-1], "dtype": "float32", "batched": True},
        {"shape": [2], "dtype": "nn", "batched": True},
        {"shape": [2], "dtype": "int64", "batched": True, "least": 0, "largest": 2**70},
        {"shape": [2], "dtype": "int64", "batched": True, "least": 5, "largest": 1},
        {"shape": [1] * 100, "dtype": "float32", "batched": True},
        {"shape": [True], "dtype": "float32", "batched": True},
    ],
)
def test_forged_inputs_are_refused(written: Any, node: dict[str, Any]) -> None:
    described = {"inputs": {"args": [{"tensor": node}], "kwargs": {}}}
    with pytest.raises(WeightsError, match="is damaged"):
        read_inputs(forged(written, "model", described))
    several = {"inputs": {"args": [{"list": [{"value": 0}, {"tensor": node}]}], "kwargs": {}}}
    with pytest.raises(WeightsError, match="is damaged"):
        read_inputs(forged(written, "model", several))


def test_another_function_of_the_same_weights_is_an_error(written: Any) -> None:
    def other() -> nn.Module:
        found = model()
        found[1] = nn.Tanh()  # type: ignore[operator]
        return found

    with pytest.raises(WeightsError, match="not the function that was saved: the output of layer"):
        load(written[0], other)

    def failing() -> nn.Module:
        found = model()
        found[4] = nn.Identity()  # type: ignore[operator]
        return found

    with pytest.raises(WeightsError, match="it fails with RuntimeError"):
        load(written[0], failing)


def test_forged_counts_are_an_error(written: Any) -> None:
    stored = json.loads(written[2]["outputs"])
    for entry in ("params", "macs"):
        with pytest.raises(WeightsError, match=f"{entry} instead of 7"):
            load(forged(written, "outputs", stored | {entry: 7}), model)


def test_other_random_numbers_are_not_compared(
    written: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stored = json.loads(written[2]["outputs"])
    next(iter(stored["inputs"].values()))["norm"] *= 2
    assert load(forged(written, "outputs", stored), model) is not None
    assert "draws other random inputs" in caplog.text


def test_files_without_outputs_are_loaded(written: Any) -> None:
    path, state, metadata = written
    other = path.with_name("old.safetensors")
    write_tensors(other, state, {k: v for k, v in metadata.items() if k != "outputs"})
    assert load(other, model) is not None


def numbers() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.integers(),
        st.integers(-3, 20),
        st.sampled_from([0, -1, 10**9, 2**31, 2**63, 10**30, True, 1e308, float("nan")]),
    )


def keys() -> st.SearchStrategy[str]:
    known = ["0", "1", "2", "5", "0.0", "space", "num_classes", "input_shape", "inputs", "args"]
    known += ["kwargs", "tensor", "shape", "dtype", "batched", "least", "largest", "list", "value"]
    known += ["outputs", "layers", "params", "macs", "rounding", "norm", "values"]
    return st.one_of(st.sampled_from(known), st.text(max_size=4))


def values() -> st.SearchStrategy[Any]:
    labels = st.sampled_from(
        ["svd:-3", "svd:4", "svd:999999999", "group_svd:3x3", "group_svd:2x2", "dense", "dense:1"]
        + ["tucker2:4x4", "tucker2:4", "svd", "", ":", "spatial_svd:2", "svd:" + "9" * 5000]
    )
    leaves = st.one_of(st.none(), st.booleans(), numbers(), st.text(max_size=6), labels)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(keys(), inner, max_size=4),
        ),
        max_leaves=8,
    )


KEYS, VALUES = keys(), values()  # made once: hypothesis examines each strategy anew


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """The document with one value replaced at a random place, or another document."""
    if not isinstance(document, dict | list) or not document or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    if isinstance(document, list):
        at = draw(st.integers(0, len(document) - 1))
        return [draw(changed(x)) if i == at else x for i, x in enumerate(document)]
    name = draw(st.one_of(st.sampled_from(sorted(document)), KEYS))
    return document | {name: draw(changed(document.get(name)))}


@pytest.mark.slow
@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_document_ends_in_another_error(written: Any, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(["allocation", "model", "shared", "outputs", "metrics"]))
    path = forged(written, key, data.draw(changed(json.loads(written[2][key]))))
    for attempt in (lambda: load(path, model), lambda: load(path), lambda: read_inputs(path)):
        try:
            attempt()
        except RankNASError as error:
            assert str(error)
    try:
        read_metadata(path)
    except RankNASError as error:
        assert str(error)
