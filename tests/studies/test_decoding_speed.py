"""The study of decoding speed: what is timed is decoding with a cache, and the rates are those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import compressed, generated, tiny, tiny_inputs

from rankNAS.plugins import load_callable

FILE = Path(__file__).parents[2] / "studies" / "smollm2" / "decode.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="not in a checkout")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoded_tokens_are_those_of_generate(name: str) -> None:
    model = tiny(name)
    inputs = {key: tokens[:1] for key, tokens in tiny_inputs(model).items()}
    fed: list[Any] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    load_callable(f"{FILE}:timed")(model, inputs["input_ids"], 6)
    handle.remove()
    assert [tokens.shape for tokens in fed] == [(1, 12), *[(1, 1)] * 6]
    (expected,) = generated(model, inputs, use_cache=True)
    found = torch.cat(fed, 1)[0].tolist()
    assert found[: len(expected)] == expected  # generate ends at the end of a text


def test_rates_of_networks_that_take_turns() -> None:
    model = tiny("llama")
    networks = {"dense": model, "small": compressed(model)[0]}
    found = load_callable(f"{FILE}:speeds")(networks, 8, 2, 3)
    assert list(found) == ["dense", "small"]
    for kind in ("prefill", "decode"):
        assert found["dense"][kind]["ratio"] == 1
        assert all(
            0 < row[kind]["low"] <= row[kind]["median"] <= row[kind]["high"]
            for row in found.values()
        )
    assert load_callable(f"{FILE}:table")(found).count("\n") == 3
