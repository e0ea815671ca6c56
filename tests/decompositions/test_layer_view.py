from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.decompositions.layer_view import LayerView


class Conv1D(nn.Module):
    """As in Hugging Face's transformers: the weight has the inputs first."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf, self.weight = outputs, nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: Conv1D(2, 3)])
@pytest.mark.parametrize("computed", [False, True])
def test_weights_have_the_outputs_first_however_they_are_stored(make: Any, computed: bool) -> None:
    model = nn.Sequential(make())
    view = LayerView(model, ["0"])
    own = view.weight.clone()
    assert own.shape == (2, 3)
    if computed:
        view.compute_weight()
        assert torch.equal(view.weight, own)
    W, b, x = torch.randn(2, 3), torch.randn(2), torch.randn(4, 3)
    view.write_from(lambda: (W, b))
    torch.testing.assert_close(model(x), x @ W.T + b)
    assert torch.equal(LayerView(model, ["0"]).weight, W)
    assert computed == (view.parameter is not model[0]._parameters.get("weight"))


def test_a_layer_at_two_paths_is_exchanged_at_both() -> None:
    layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight, other.bias = layer.weight, layer.bias
    model = nn.Sequential(layer, nn.Sequential(other), layer)
    view = LayerView(model, ["0", "1.0", "2"])
    view.write(torch.ones(3, 3))
    assert torch.equal(other.weight, torch.ones(3, 3)) and view.bias is not None
    view.replace(nn.Identity())
    assert model[0] is model[1][0] is model[2] and isinstance(model[0], nn.Identity)
