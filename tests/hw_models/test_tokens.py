"""Budgets for the latency of a few tokens, as in decoding."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language import tiny_llama
from test_inputs_of_any_form import BOARD, tokens
from tiny_transformers import tiny, tiny_inputs
from torch import nn

import rankNAS
from rankNAS.exceptions import UsageError
from rankNAS.hw_models import Host, Roofline, compile_latency
from rankNAS.hw_models.networks import built
from rankNAS.hw_models.plan import stages_of
from rankNAS.hw_models.tokens import first_tokens, space_of_tokens
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.trees import Inputs

FEW = rankNAS.Settings(calibration=8, validation=4, norm="weight", latency_tokens=1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_space_is_that_of_shorter_inputs(name: str, count: int) -> None:
    model, window = tiny(name), Inputs.of(tiny_inputs(tiny(name)))
    short = first_tokens(model, window, count)
    space = compile_space(model, window, min_weights=512)
    found = space_of_tokens(model, space, short)
    expected = compile_space(model, short, min_weights=512)
    assert found == replace(expected, skipped=space.skipped)
    assert all(stage.calls == ((2 * count,),) for stage in stages_of(found))


def test_all_tensors_of_a_window_are_cut() -> None:
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6)
    other = torch.zeros(2, 3)
    found = first_tokens(nn.Identity(), Inputs((ids,), {"mask": mask, "other": other}), 2)
    assert found.args[0].tolist() == [[0, 1], [6, 7]]
    assert found.kwargs["mask"].shape == (2, 2) and found.kwargs["other"].shape == (2, 3)
    same = Inputs.of(ids)
    assert first_tokens(nn.Identity(), same, None) is same


def test_a_search_within_a_part_of_the_latency_of_one_token() -> None:
    torch.manual_seed(0)
    items = [{"input_ids": row} for row in torch.randint(256, (20, 16))]

    def searched(settings: rankNAS.Settings) -> rankNAS.Study:
        return rankNAS.search(
            tiny_llama(),
            items,
            task="causal_lm",
            budget={"latency": 0.8},
            strategy="solve",
            hardware=Roofline(BOARD),
            settings=settings,
        )

    study = searched(FEW)
    one = compile_space(tiny_llama(), {"input_ids": items[0]["input_ids"][None, :1]})
    dense = compile_latency(Roofline(BOARD), one).predict(one.dense)[0]
    assert study.dense["predicted_latency"] == pytest.approx(dense)
    assert study.best.metrics["predicted_latency"] <= 0.8 * dense * (1 + 1e-9)
    whole = searched(rankNAS.Settings(calibration=8, validation=4, norm="weight"))
    assert whole.dense["predicted_latency"] > 2 * dense


def test_this_machine_is_measured_on_one_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankNAS.hw_models.host.LIMIT", 1e-6)
    seen: list[tuple[int, ...]] = []

    def recording(model: Any, allocation: Any, inputs: Any) -> Any:
        seen.append(tuple(Inputs.of(inputs).kwargs["input_ids"].shape))
        return built(model, allocation, inputs)

    monkeypatch.setattr("rankNAS.hw_models.host.built", recording)
    model, data = tokens()
    host = Host(file=tmp_path / "host.json", repeats=3, seconds=0.0, shapes=4, networks=2)
    study = rankNAS.search(
        model,
        data,
        task="causal_lm",
        budget={"latency": 1.0},
        strategy="random",
        n_trials=1,
        hardware=host,
        settings=FEW,
    )
    assert set(seen) == {(1, 1)}
    assert math.isfinite(study.best.metrics["predicted_latency"])


@pytest.mark.parametrize(
    ("inputs", "count", "message"),
    [
        (torch.zeros(2, 3, 8, 8), 1, "token ids"),
        (torch.zeros(2, 8), 1, "token ids"),
        (torch.zeros(2, 8, dtype=torch.int64), 9, "8 tokens"),
    ],
)
def test_inputs_without_as_many_tokens(inputs: Any, count: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        first_tokens(nn.Identity(), Inputs.of(inputs), count)


def test_an_encoder_does_not_decode() -> None:
    model = tiny("t5")
    with pytest.raises(UsageError, match="encoder"):
        first_tokens(model, Inputs.of(tiny_inputs(model)), 1)


def test_layers_without_input_are_named() -> None:
    class Halves(nn.Module):
        """Pools pairs of positions; the layer after it gets nothing from one position."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(9, 64), nn.Linear(64, 64)
            self.head = nn.Linear(64, 9)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.embedding(ids)
            pairs: torch.Tensor = self.head(self.layer(h[:, 1::2]))
            return pairs

    model, ids = Halves(), Inputs.of(torch.zeros(1, 8, dtype=torch.int64))
    space = compile_space(model, ids)
    with pytest.raises(UsageError, match=r"'layer' gets no input.*latency_tokens"):
        space_of_tokens(model, space, first_tokens(model, ids, 1))
    with pytest.raises(UsageError, match="latency_tokens"):
        rankNAS.Settings(latency_tokens=0)
