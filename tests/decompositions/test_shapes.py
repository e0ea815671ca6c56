"""Shapes of layers: geometry, cost, folding, building."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankNAS.decompositions import Cost, GroupedLinear, LayerShape
from rankNAS.decompositions.shapes import chain, is_hf_conv1d, pointwise

CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 2)), (2, 4, 9, 8)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=(1, 2), padding=2, bias=False), (1, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 5, 5)),
    "same": (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)), (2, 4, 7, 6)),
    "same_even": (nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 7, 6)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "one_dimension": (nn.Conv1d(4, 6, 5, stride=2, padding=1), (3, 4, 11)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_convolutions(name: str) -> None:
    module, size = CONVOLUTIONS[name]
    shape = LayerShape.of(module, ((size[0], *size[2:]),))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = module(torch.randn(size))
    assert shape.output_calls() == ((size[0], *y.shape[2:]),)
    cost = shape.cost()
    assert 2 * cost.macs == counter.get_total_flops()
    assert cost.params == sum(p.numel() for p in module.parameters())
    assert cost.weight_bytes == 4 * cost.params
    assert repr(shape.build()) == repr(module)
    assert all(p.is_meta for p in shape.build().parameters())
    folded = shape.fold(module.weight)
    assert folded.shape[:2] == (module.groups, module.out_channels // module.groups)
    assert folded.flatten(2).shape[2] == shape.width
    assert torch.equal(shape.unfold(folded), module.weight)
    assert torch.equal(shape.unfold(folded.flatten(2)), module.weight)


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_padding_is_torchs(kernel: int, dilation: int) -> None:
    module = nn.Conv1d(1, 1, kernel, padding="same", dilation=dilation, bias=False)
    ((before, after),) = LayerShape.of(module).explicit_padding
    x = torch.randn(1, 1, 9)
    explicit = nn.functional.conv1d(
        nn.functional.pad(x, (before, after)), module.weight, dilation=dilation
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(module(x), explicit)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    module = nn.Linear(5, 3, bias)
    shape = LayerShape.of(module, ((14,),))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(2, 7, 5))
    assert 2 * shape.cost().macs == counter.get_total_flops() == 2 * 14 * 15
    assert shape.cost().params == 15 + 3 * bias
    assert shape.fold(module.weight).shape == (1, 3, 5, 1, 1)
    assert torch.equal(shape.unfold(shape.fold(module.weight)), module.weight)
    assert shape.output_calls() == ((14,),)
    assert repr(shape.build()) == repr(module)


def test_the_transposed_linear_layer_of_hugging_face() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf = 3
            self.weight = nn.Parameter(torch.randn(5, 3))
            self.bias = nn.Parameter(torch.zeros(3))

    assert is_hf_conv1d(Conv1D())
    assert not is_hf_conv1d(nn.Conv1d(1, 1, 1))
    shape = LayerShape.of(Conv1D())
    assert (shape.inputs, shape.outputs, shape.bias, shape.kernel) == (5, 3, True, ())


def test_all_calls_count() -> None:
    module = nn.Conv2d(3, 4, 3, padding=1)
    one = LayerShape.of(module, ((1, 8, 8),)).cost()
    other = LayerShape.of(module, ((2, 5, 4),)).cost()
    both = LayerShape.of(module, ((1, 8, 8), (2, 5, 4))).cost()
    assert both.macs == one.macs + other.macs
    assert both.params == one.params == other.params


def test_bytes_follow_the_dtype() -> None:
    assert LayerShape.of(nn.Linear(4, 4).half()).cost().weight_bytes == 2 * 20
    assert LayerShape.of(nn.Linear(4, 4).double()).cost().weight_bytes == 8 * 20


def test_costs_add_and_are_looked_up() -> None:
    total = Cost(1, 2, 3) + Cost(10, 20, 30)
    assert total == Cost(11, 22, 33)
    assert [total[name] for name in ("macs", "params", "weight_bytes")] == [11, 22, 33]


def test_a_chain_hands_on_the_size_of_its_outputs() -> None:
    first = LayerShape(4, 6, (3, 3), (2, 2), (1, 1), (1, 1), calls=((2, 9, 8),), itemsize=2)
    last = pointwise(replace(first, groups=2, padding_mode="reflect"), 6, 10, 2)
    assert (last.kernel, last.stride, last.padding, last.padding_mode) == (
        (1, 1),
        (1, 1),
        (0, 0),
        "zeros",
    )
    shapes = chain(first, last)
    assert shapes[0] is first
    assert shapes[1].calls == ((2, 5, 4),)
    assert shapes[1].itemsize == 2
    assert shapes[1].cost().macs == 2 * 5 * 4 * 10 * 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_grouped_linear_is_block_diagonal(bias: bool, batch: tuple[int, ...]) -> None:
    layer = GroupedLinear(6, 4, 2, bias)
    if bias:
        nn.init.normal_(layer.bias)
    x = torch.randn(*batch, 6)
    dense = nn.functional.linear(x, torch.block_diag(*layer.weight), layer.bias)
    torch.testing.assert_close(layer(x), dense)
    assert layer.extra_repr() == "6, 4, groups=2"


def test_grouped_linear_from_a_shape_has_its_cost() -> None:
    shape = LayerShape(6, 4, groups=2, bias=True, calls=((5,),))
    module = shape.build("cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(5, 6))
    assert shape.cost() == Cost(5 * 12, 16, 64)
    assert 2 * shape.cost().macs == counter.get_total_flops()
    assert torch.equal(shape.unfold(shape.fold(module.weight)), module.weight)
