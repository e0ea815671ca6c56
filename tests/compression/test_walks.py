"""Walks through networks that cannot be traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.compression.block_walk import BlockWalk
from rankNAS.compression.walks import StagedWalk, walk_through
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.tasks.feeding import InputBatches, input_batches


class Attention(nn.Module):
    """One attention block; it may fill a cache among its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if cache is not None:
            cache.append(k)
            k = cache[-1] + 0 * len(cache)
        x = x + self.out((q @ k.mT).softmax(-1) @ v)
        y: Tensor = x + self.mlp(x)
        return y


class Transformer(nn.Module):
    """Blocks in a list; the head may also read the output of the first block."""

    def __init__(self, traced: bool, far: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(8, 8)
        self.traced, self.far, self.runs = traced, far, 0

    def forward(self, x: Tensor) -> Tensor:
        cache: list[Tensor] | None = None
        if not self.traced and bool(x.sum() < torch.inf):
            self.runs += 1
            cache = []
        first = x
        for number, block in enumerate(self.blocks):
            x = block(x, cache)
            first = x if number == 0 else first
        y: Tensor = self.head(x + first if self.far else x)
        return y


def walked(network: nn.Module, x: Tensor) -> tuple[Any, list[tuple[list[str], list[Tensor]]]]:
    """The walk and what it finds; each layer is changed after its inputs are read."""
    batches = input_batches(x, 10)
    assert isinstance(batches, InputBatches)
    space = compile_space(network, x[:1], min_weights=1, keep_output_dense=False)
    walk, found = walk_through(network, space.layers, batches), []
    with torch.no_grad():
        for names, inputs in walk.sites():
            found.append((names, [part.clone() for part in inputs if part is not None]))
            for name in names:
                network.get_submodule(name).weight.mul_(0.9)  # type: ignore[union-attr,operator]
    return walk, found


@pytest.mark.parametrize("far", [False, True])
def test_blocks_give_the_inputs_of_a_traced_network(far: bool) -> None:
    x = torch.randn(30, 5, 8, generator=torch.Generator().manual_seed(1))
    staged, expected = walked(Transformer(True, far).eval(), x)
    network = Transformer(False, far).eval()
    blocks, found = walked(network, x)
    assert isinstance(staged, StagedWalk) and isinstance(blocks, BlockWalk)
    assert [names for names, _ in found] == [names for names, _ in expected]
    assert found[0][0] == ["blocks.0.q", "blocks.0.k", "blocks.0.v"]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(a), torch.cat(b))
    assert len(blocks._blocks) == 4 and blocks._frees is not far


def test_the_network_runs_once_for_each_block() -> None:
    x = torch.randn(10, 5, 8, generator=torch.Generator().manual_seed(1))
    network = Transformer(False).eval()
    space = compile_space(network, x[:1], min_weights=1, keep_output_dense=False)
    walk = BlockWalk(network, space.layers, input_batches(x, 10), 10)
    network.runs, calls = 0, [0]
    handle = network.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for _, inputs in walk.sites():
        assert all(part is not None for part in inputs)
    handle.remove()
    assert network.runs == 4  # three blocks and the head
    assert not any("forward" in vars(block) for block in network.blocks)
    assert calls  # the hooks of blocks are kept
