"""Layers with a forward of their own: which of them are plain layers, and with which weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.allocation import Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.models import artifact
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.plain_layers import with_plain_layers


class Standardised(nn.Conv2d):
    """Weight standardisation, with a gain as in normaliser-free networks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        weight = self.gain * (self.weight - mean) / std
        return functional.conv2d(
            x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Rewritten(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, bias=self.bias)


class Positive(nn.Linear):
    """Biases may be computed too."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(
            x, self.weight.abs(), None if self.bias is None else 2 * self.bias
        )


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


class Same(nn.Conv2d):
    """Padding computed from the size of the input, as TensorFlow does it."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True)
        missing = [max(0, (-(-size // s) - 1) * s + k - size) for size, k, s in sizes]
        ends = [end for pad in missing for end in (pad // 2, pad - pad // 2)]
        x = functional.pad(x, ends) if any(ends) else x
        return functional.conv2d(x, self.weight, self.bias, self.stride)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Routed(nn.Linear):
    """A weight that depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * x.mean().sigmoid(), self.bias)


class Hidden(nn.Linear):
    """The same, out of sight of derivatives."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * x.mean().detach().sigmoid(), self.bias)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight + torch.randn_like(self.weight), self.bias)


class Counting(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


class Remembering(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return super().forward(x)


class Scaled(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": (1, 2)},
        {"groups": 4, "bias": False},
    ],
)
def test_a_computed_weight_becomes_the_weight(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(8, 16, 3, **options)).eval()
    plain = with_plain_layers(model)
    assert type(plain[0]) is nn.Conv2d and not plain[0].training
    assert type(model[0]) is Standardised  # the model is as it was
    x = torch.randn(2, 8, 11, 9)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_computed_bias_becomes_the_bias(bias: bool) -> None:
    model, x = Positive(6, 5, bias=bias), torch.randn(3, 6)
    plain = with_plain_layers(model)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)


def test_a_weight_that_is_used_as_it_is_stays_tied() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(7, 6), Rewritten(6, 7)
            self.layer.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.table(x))

    model = Net()
    plain = with_plain_layers(model)
    assert type(plain.layer) is nn.Linear and plain.layer.weight is plain.table.weight
    assert plain.layer.weight is not model.layer.weight


def test_a_shared_layer_stays_shared() -> None:
    layer = Positive(6, 6)
    plain = with_plain_layers(nn.ModuleList([layer, layer]))
    assert plain[0] is plain[1] and type(plain[0]) is nn.Linear


def test_plain_models_are_returned_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert with_plain_layers(model) is model


@pytest.mark.parametrize(
    "layer",
    [
        *(
            kind(6, 6)
            for kind in (Activated, Routed, Hidden, Noisy, Counting, Remembering, Scaled)
        ),
        Padded(3, 3, 3),
        Same(3, 3, 3),
        Same(3, 3, 2, stride=(1, 4)),
        Same(3, 3, (2, 1), stride=(4, 2)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_do_more_stay(layer: nn.Module) -> None:
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert with_plain_layers(layer) is layer
    torch.testing.assert_close(layer.state_dict(), before)
    assert "last" not in vars(layer)


def test_hooks_keep_a_layer() -> None:
    layer = Positive(6, 6)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    assert with_plain_layers(layer) is layer


def test_computed_padding_of_one_pixel_is_none() -> None:
    layer = Same(3, 3, 1, stride=2)
    plain = with_plain_layers(nn.Sequential(layer))[0]
    assert type(plain) is nn.Conv2d and plain.weight is not layer.weight
    x = torch.randn(1, 3, 7, 7)
    assert torch.equal(plain(x), layer(x))


def net() -> nn.Module:
    layers = (Standardised(8, 32, 3), nn.ReLU(), Standardised(32, 32, 3), nn.Flatten(1))
    return nn.Sequential(*layers, nn.Linear(32 * 16, 4)).eval()


def test_models_on_meta_have_the_same_space() -> None:
    model = net()
    space = compile_space(model, torch.zeros(1, 8, 8, 8))
    assert list(space.layers) == ["0", "2"]
    empty = compile_space(model.to("meta"), torch.zeros(1, 8, 8, 8, device="meta"))
    assert empty.layers == space.layers


def test_the_network_survives_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(2, 8, 8, 8)
    space = compile_space(model, x)
    full = {name: layer.choices[1] for name, layer in space.layers.items()}
    allocation = type(space.dense).of(full | {"2": Choice("svd", (8,))})
    small = factorise(model, space).materialise(allocation).eval()
    file = artifact.save(small, allocation, tmp_path / "small.safetensors")
    torch.testing.assert_close(artifact.load(file, net)(x), small(x))
