"""Statistics of experts: closed forms of the shrinkage, and experts without tokens."""

from __future__ import annotations

import logging

import pytest
import torch
from language_models import batches_of, samples_of, tiny_mixtral, tiny_space

from rankNAS.compression.calibration import calibrate
from rankNAS.compression.siblings import shrunk_towards_siblings
from rankNAS.decompositions.norms import Statistics
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import RankNASError
from rankNAS.search_spaces.base import Layer
from rankNAS.testing import random_statistics

WIDTH = 4


def layers(*names: str, roles: tuple[str, ...] = ("expert", "up")) -> dict[str, Layer]:
    shape = LayerShape(inputs=WIDTH, outputs=3, calls=((1,),))
    from rankNAS.search_spaces.policies import RankPolicy, candidate_choices

    choices, costs = candidate_choices(shape, RankPolicy())
    return {name: Layer(name, (), shape, choices, costs, roles) for name in names}


def known(seed: int) -> Statistics:
    shape = LayerShape(inputs=WIDTH, outputs=3, calls=((1,),))
    torch.manual_seed(seed)
    return random_statistics(shape)


def test_moments_are_those_of_as_many_further_tokens_of_the_mean() -> None:
    found = layers("experts.0.up", "experts.1.up")
    statistics = {name: known(i) for i, name in enumerate(found)}
    tokens = {"experts.0.up": 30, "experts.1.up": 10}
    mixed = shrunk_towards_siblings(found, statistics, tokens)
    first, second = (statistics[name].input_second_moment for name in found)
    mean = (30 * first + 10 * second) / 40
    assert torch.allclose(
        mixed["experts.1.up"].input_second_moment, (10 * second + WIDTH * mean) / (10 + WIDTH)
    )
    gradients = [statistics[name].output_gradient_second_moment for name in found]
    assert gradients[0] is not None and gradients[1] is not None
    expected = (30 * gradients[0] + WIDTH * (30 * gradients[0] + 10 * gradients[1]) / 40) / 34
    assert torch.allclose(mixed["experts.0.up"].output_gradient_second_moment, expected)


def test_an_expert_without_tokens_has_the_mean_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = layers("a.experts.0.up", "a.experts.1.up", "a.experts.2.up")
    statistics = {name: known(i) for i, name in enumerate(list(found)[:2])}
    tokens = dict(zip(found, (50, 50, 0), strict=True))
    with caplog.at_level(logging.WARNING):
        mixed = shrunk_towards_siblings(found, statistics, tokens)
    first, second = (statistics[name].mean for name in list(found)[:2])
    assert torch.allclose(mixed["a.experts.2.up"].mean, (first + second) / 2)
    assert "'a.experts.2.up' (0 tokens)" in caplog.text and "experts.1" not in caplog.text


def test_only_experts_of_one_block_and_one_place_are_siblings() -> None:
    names = ("a.experts.0.up", "b.experts.1.up", "a.experts.1.down", "a.mlp.up")
    found = layers(*names)
    statistics = {name: known(i) for i, name in enumerate(names)}
    assert shrunk_towards_siblings(found, statistics, dict.fromkeys(names, 5)) == statistics
    others = layers("a.experts.0.up", "a.experts.1.up", roles=())
    statistics = {name: known(i) for i, name in enumerate(others)}
    assert shrunk_towards_siblings(others, statistics, dict.fromkeys(others, 5)) == statistics


def test_a_model_with_an_expert_that_is_never_chosen() -> None:
    model, samples = tiny_mixtral(), samples_of(4)
    _, task = batches_of(samples, model)
    space = tiny_space(model, samples)
    statistics = calibrate(model, space, samples, task, norm="fisher", batch_size=2)
    name = "model.layers.0.mlp.experts.3.gate_proj"
    assert statistics[name].input_second_moment.any()
    assert statistics[name].output_gradient_second_moment is not None


def test_a_layer_that_is_never_called_is_an_error() -> None:
    class Sometimes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rare = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.head = torch.nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.always(x)
            found: torch.Tensor = self.head(self.rare(y) if bool((x > 9).any()) else y)
            return found

    model = Sometimes().eval()
    from rankNAS.search_spaces.compiler import compile_space

    space = compile_space(model, torch.full((1, 8), 10.0), min_weights=1)
    with pytest.raises(RankNASError, match="layer 'rare' is not called"):
        calibrate(model, space, torch.randn(6, 8), norm="input")
