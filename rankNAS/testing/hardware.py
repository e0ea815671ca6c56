"""Contract tests of hardware models, as a test class. Needs pytest."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from rankNAS.allocation import Choice
from rankNAS.hw_models.base import HardwareModel
from rankNAS.search_spaces.base import Layer
from rankNAS.search_spaces.policies import RankPolicy, candidate_choices
from rankNAS.testing.operators import LAYERS, LayerCase

__all__ = ["HardwareContract"]


class HardwareContract:
    """Contract of a hardware model, tested on every kind of layer.

    Set `hardware`. `layers` may be reduced or extended.
    """

    hardware: ClassVar[HardwareModel]
    layers: ClassVar[dict[str, LayerCase]] = LAYERS

    def priced(self, repeats: int = 1) -> list[tuple[Layer, Choice]]:
        """Every layer with a few of its choices; each layer has `repeats` calls per pass."""
        pairs = []
        for name, case in self.layers.items():
            shape = case.shape()
            shape = replace(shape, calls=shape.calls * repeats)
            choices, costs = candidate_choices(shape, RankPolicy(candidates=4))
            layer = Layer(name, (), shape, choices, costs)
            pairs += [(layer, choice) for choice in choices]
        return pairs

    def test_has_a_name(self) -> None:
        assert isinstance(self.hardware.name, str) and self.hardware.name

    def test_latencies_are_positive(self) -> None:
        for layer, choice in self.priced():
            seconds, sigma = self.hardware.latency(layer, choice)
            assert math.isfinite(seconds) and seconds > 0
            assert math.isfinite(sigma) and sigma >= 0

    def test_equal_arguments_give_equal_latencies(self) -> None:
        for layer, choice in self.priced():
            first = self.hardware.latency(layer, choice)
            assert self.hardware.latency(replace(layer), choice) == first

    def test_more_calls_take_longer(self) -> None:
        for once, thrice in zip(self.priced(), self.priced(3), strict=True):
            assert self.hardware.latency(*thrice)[0] > self.hardware.latency(*once)[0]
