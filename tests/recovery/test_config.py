from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rankNAS.exceptions import UsageError
from rankNAS.recovery import TrainingConfig, default_config, default_steps


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("max_steps", 0), ("batch_size", 1), ("learning_rate", 0.0)]
    + [("learning_rate", math.nan), ("weight_decay", -1.0), ("optimizer", "lion")]
    + [("distill", 1.5), ("temperature", 0.0), ("label_smoothing", 1.0)],
)
def test_bad_configurations(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        replace(TrainingConfig(epochs=4), **{field: value})


def test_default_length_follows_from_the_cost() -> None:
    assert default_steps(37_000_000, 1150, 64) == 500_000_000_000 // (37_000_000 * 64)
    assert default_steps(1000, 640, 64) == 60 * 10
    assert default_steps(10**13, 640, 64) == 1
    config = default_config(41_000_000, 49_000, seed=5)
    assert config.epochs == 1 and config.max_steps == 190 and config.seed == 5
