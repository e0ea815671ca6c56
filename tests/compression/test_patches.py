from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_cases import LAYERS
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.compression.patches import MAX_POSITIONS, folded, patches
from rankNAS.decompositions.shapes import LayerShape

# torch's notice that an even kernel with 'same' padding costs a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_patches_times_the_folded_weight_is_the_layer(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, x = make(), torch.randn(3, *shape)
    layer_shape = LayerShape.of(layer)
    W = layer_shape.fold(layer.weight).flatten(2)
    found = patches(layer_shape, x)[:, :, folded(layer_shape)]
    y = torch.einsum("gNn,gon->Ngo", found, W).flatten(1)
    expected = layer(x) if layer.bias is None else layer(x) - _broadcast(layer, layer.bias)
    if layer_shape.kernel:
        expected = expected.movedim(1, -1)
    torch.testing.assert_close(y, expected.reshape(y.shape), rtol=1e-4, atol=1e-5)


def _broadcast(layer: nn.Module, bias: Tensor) -> Tensor:
    return bias if isinstance(layer, nn.Linear) else bias.view(-1, *[1] * (layer.weight.dim() - 2))


def test_patches_are_those_of_unfold() -> None:
    x = torch.randn(2, 3, 9, 8)
    layer = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=(1, 2))
    columns = functional.unfold(x, (3, 2), (1, 2), 1, 2)  # (batch, n, positions)
    shape = LayerShape.of(layer)
    found = patches(shape, x)[:, :, folded(shape)]
    assert torch.equal(found[0], columns.transpose(1, 2).flatten(0, 1))


def test_large_images_are_subsampled() -> None:
    x = torch.randn(2, 3, 40, 40)
    shape = LayerShape.of(nn.Conv2d(3, 4, 1))
    every = patches(shape, x)
    drawn = patches(shape, x, torch.Generator().manual_seed(0))
    assert every.shape[1] == 2 * 1600 and drawn.shape[1] == 2 * MAX_POSITIONS < 2 * 1600
    rows = {tuple(row) for row in every[0].tolist()}
    chosen = [tuple(row) for row in drawn[0].tolist()]
    assert len(set(chosen)) == len(chosen) and set(chosen) <= rows
    small = torch.randn(2, 3, 1, MAX_POSITIONS)  # just as many positions: all of them, in order
    assert torch.equal(patches(shape, small), patches(shape, small, torch.Generator()))
