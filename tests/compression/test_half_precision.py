"""Half precision: every sum is formed in float32 or more, so large activations work."""

from __future__ import annotations

import pytest
import torch
from searches import evaluator_of
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.compression.batch_norm import reestimate_batch_norm, tracking_layers
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.search_spaces.compiler import compile_space

Y = torch.arange(64) % 4


def model_and_samples(scale: float) -> tuple[nn.Module, Tensor]:
    """Running variances fit into float16, those of the batches do not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.BatchNorm2d(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    x = torch.randn(64, 3, 8, 8)
    for layer in tracking_layers(model):
        layer.momentum = None  # type: ignore[assignment]
    model(x)
    return model.eval(), scale * x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [3.0, 1000.0])
@pytest.mark.parametrize("low_memory", [False, True])
def test_metrics_are_those_of_float32(dtype: torch.dtype, scale: float, low_memory: bool) -> None:
    found = []
    for kind in (torch.float32, dtype):
        model, x = model_and_samples(scale)
        model, x = model.to(kind), x.to(kind)
        space = compile_space(model, x[:1])
        statistics = calibrate(model, space, x, norm="fisher")
        factors = factorise(model, space, statistics)
        evaluator = evaluator_of(factors, x, Y, sequential=True, low_memory=low_memory)
        chosen = Allocation.of({n: layer.choices[-2] for n, layer in space.layers.items()})
        metrics = evaluator.evaluate(chosen, final=True)
        assert evaluator.network(chosen)(x).isfinite().all()
        found.append((evaluator.dense()["loss"], metrics["loss"]))
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_statistics_of_large_activations_are_finite() -> None:
    model, x = model_and_samples(3000.0)
    expected = [layer.running_mean for layer in tracking_layers(reestimate_batch_norm(model, x))]
    half, x = model_and_samples(3000.0)
    reestimate_batch_norm(half.half(), x.half())
    layers = tracking_layers(half)
    assert all(layer.running_mean.dtype == torch.float16 for layer in layers)  # type: ignore[union-attr]
    for layer, mean in zip(layers, expected, strict=True):
        assert layer.running_mean is not None and mean is not None
        assert (layer.running_mean.float() - mean).norm() <= 0.02 * mean.norm() + 1
