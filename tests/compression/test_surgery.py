from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mixed_net import assert_close, drawn, mixed
from torch import nn

from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.compression.surgery import changeable_copy, shared_copy
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.compiler import compile_space


def test_a_shared_copy_has_the_parameters_of_the_model_and_its_own_buffers() -> None:
    model, _, x = mixed()
    own: Any = model.head.bias
    copied = shared_copy(model, own=[own])
    assert torch.equal(copied(x), model(x))
    theirs = dict(copied.named_parameters())
    assert all(
        (p.data_ptr() == theirs[n].data_ptr()) == (p is not own)
        for n, p in model.named_parameters()
    )
    assert copied.tied.weight is copied.shared.weight
    copied.train()(x)
    assert not torch.equal(copied.norm.running_mean, model.norm.running_mean)


@pytest.mark.parametrize("norm", ["weight", "fisher"])
def test_heavy_weights_are_multiplied_out_where_they_are_read(
    norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, space, x = mixed()
    statistics = calibrate(model, space, x, norm=norm)
    factorisation = factorise(model, space, statistics, norm=norm)
    before = copy.deepcopy(model.state_dict())
    light = changeable_copy(model, factorisation.layers)
    assert type(light.head) is nn.Linear
    monkeypatch.setattr("rankNAS.compression.surgery.LIGHT", 0)
    heavy = changeable_copy(model, factorisation.layers)
    assert torch.equal(heavy(x), model(x))
    for seed in range(4):
        for name, choice in drawn(space, seed).items():
            for network in (light, heavy):
                factorisation.layers[name].write(network, choice)
        assert torch.equal(heavy(x), light(x)) and not torch.allclose(heavy(x), model(x))
    lie = {p.data_ptr() for p in model.parameters()}
    biases = {p.numel() for n, p in model.named_parameters() if n.endswith("bias")}
    assert all(p.data_ptr() in lie or p.numel() in biases for p in heavy.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("norm", ["weight", "fisher"])
def test_layers_that_are_made_when_called_are_those_of_the_network(norm: Any) -> None:
    model, space, x = mixed()
    statistics = calibrate(model, space, x, norm=norm)
    factorisation = factorise(model, space, statistics, norm=norm)
    for allocation in (space.dense, *(drawn(space, seed) for seed in range(4))):
        network = factorisation.made_when_called(allocation)
        assert_close(network(x), factorisation.materialise(allocation)(x))
        lie = {p.data_ptr() for p in model.parameters()}
        assert all(p.data_ptr() in lie for p in network.parameters())
    with pytest.raises(UsageError, match="no choice for layer"):
        factorisation.made_when_called({})


def test_layers_that_are_called_by_keyword_are_made_when_called() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(input=self.layer(input=x))

    model, x = Keyword().eval(), torch.randn(3, 32)
    factorisation = factorise(model, compile_space(model, x))
    choices = {name: layer.choices[-1] for name, layer in factorisation.space.layers.items()}
    lazy, built = factorisation.made_when_called(choices), factorisation.materialise(choices)
    assert_close(lazy(x), built(x))
