from __future__ import annotations

import torch
from torch import Tensor, nn

from rankNAS.compression.batch_norm import is_tracking
from rankNAS.compression.incremental import IncrementalExecutor
from rankNAS.trees import Inputs


class Plain(nn.Linear):
    """A subclass that changes nothing."""


class NormAct(nn.BatchNorm1d):
    """A norm with its activation, as in timm: functional, with operations of its own."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            1.0 / float(self.num_batches_tracked or 1),
            self.eps,
        )
        return self.act(y)  # type: ignore[no-any-return]


def test_derived_layers_and_norms_are_single_operations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Plain(8, 8), NormAct(8), Plain(8, 4)).eval()
    x = torch.randn(6, 8)
    executor = IncrementalExecutor.of(model, {"0": ["0"], "2": ["2"]}, [Inputs.of(x)])
    assert executor is not None
    cut = executor.cut_points["2"]
    values = executor.advance({}, 0, cut, Inputs.of(x))
    assert torch.equal(executor.input_of(cut, values), model[1](model[0](x)))
    assert any(is_tracking(module) for module in executor.network.modules())


def test_the_statistics_of_a_derived_norm_are_updated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Plain(8, 8), NormAct(8), Plain(8, 4)).eval()
    x = torch.randn(16, 8) + 3
    executor = IncrementalExecutor.of(model, {"0": ["0"], "2": ["2"]}, [Inputs.of(x)])
    assert executor is not None
    model[1].train()
    with torch.no_grad():
        executor.run({}, 0, Inputs.of(x))
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0).detach())
