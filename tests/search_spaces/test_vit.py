"""The small vision transformer of the zoo."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model
from rankNAS.search_spaces.zoo.vit import Attention, Block, CifarViT

SHAPE = (3, 32, 32)


def test_the_number_of_parameters() -> None:
    with torch.device("meta"):
        network = build_model("vit_cifar", num_classes=10, input_shape=SHAPE)
    d, tokens = 192, 65
    block = 4 * (d * d + d) + 2 * (2 * d * d) + 3 * d + 4 * d  # attention, feed-forward, norms
    rest = (48 * d + d) + d + tokens * d + 2 * d + (10 * d + 10)
    found = sum(parameter.numel() for parameter in network.parameters())
    assert found == 9 * block + rest == 2_697_610


def test_every_projection_is_a_layer_with_its_role() -> None:
    network = build_model("vit_cifar", num_classes=10, input_shape=SHAPE)
    space = compile_space(network, torch.zeros(1, *SHAPE))
    for role, name in {
        "q": "attention.query",
        "k": "attention.key",
        "v": "attention.value",
    }.items():
        paths = [layer.name for layer in space.layers.values() if layer.roles == (role,)]
        assert paths == [f"blocks.{i}.{name}" for i in range(9)]
    roles = {layer.roles for layer in space.layers.values()}
    assert roles >= {("o",), ("fc1",), ("fc2",)}
    assert all(layer.shape.calls == ((65,),) for n, layer in space.layers.items() if "blocks" in n)
    # d / 3 needs 2 d d / 3 weights instead of d d.
    query = space.layers["blocks.0.attention.query"]
    (third,) = (choice for choice in query.choices if str(choice) == "svd:64")
    assert (query[third].params - 192) / (query.costs[0].params - 192) == pytest.approx(2 / 3)


def test_attention_is_that_of_the_reference() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(24, 4).eval(), nn.MultiheadAttention(24, 4, batch_first=True).eval()
    layers = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([layer.weight.data for layer in layers])
    theirs.in_proj_bias.data = torch.cat([layer.bias.data for layer in layers])
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_stochastic_depth_keeps_the_mean_and_ends_in_evaluation() -> None:
    torch.manual_seed(0)
    block, branch = Block(8, 2, 0.25), torch.ones(4000, 1, 8)
    kept = block._kept(branch)
    assert sorted(set(kept[:, 0, 0].tolist())) == pytest.approx([0, 4 / 3])
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)
    assert block.eval()._kept(branch) is branch
    rates = [float(b.dropped) for b in CifarViT(10).blocks]
    assert rates[0] == 0 and rates[-1] == 0.1 and rates == sorted(rates)


def test_images_that_patches_do_not_cover() -> None:
    with pytest.raises(UsageError, match="multiples of 4"):
        build_model("vit_cifar", num_classes=10, input_shape=(3, 30, 32))
    network = build_model("vit_cifar", num_classes=4, input_shape=(1, 8, 16))
    assert network(torch.zeros(2, 1, 8, 16)).shape == (2, 4)
