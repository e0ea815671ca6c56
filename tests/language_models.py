"""Small language models, with and without padding, for tests of streaming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.data.samples import Samples
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.tasks.base import Task
from rankNAS.tasks.feeding import InputBatches, input_batches
from rankNAS.tasks.language import CausalLanguageModelling

__all__ = [
    "LENGTH",
    "TinyGpt",
    "batches_of",
    "samples_of",
    "tiny_llama",
    "tiny_mixtral",
    "tiny_space",
]

TOKENS, LENGTH = 60, 12
SIZES: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


class Block(nn.Module):
    """A block as in GPT-2: one fused projection, biases, an MLP of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )
        x = x + self.out(y)
        found: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.second(x))))
        return found


class TinyGpt(nn.Module):
    """A language model of one's own whose head shares the weight of its embedding."""

    def __init__(self, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids) + self.positions.weight[: input_ids.shape[1]]
        mask = None
        if attention_mask is not None:
            causal = torch.ones(2 * [input_ids.shape[1]], dtype=torch.bool).tril()
            mask = causal & attention_mask.bool()[:, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) @ self.embedding.weight.T


def tiny_llama(blocks: int = 3) -> nn.Module:
    """A Llama with grouped queries."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        intermediate_size=32,
        num_hidden_layers=blocks,
        **SIZES,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def tiny_mixtral(blocks: int = 2) -> nn.Module:
    """A mixture of experts, of which the last one is never chosen in the first block."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        intermediate_size=24,
        num_hidden_layers=blocks,
        num_local_experts=4,
        num_experts_per_tok=1,
        **SIZES,
    )
    model: nn.Module = with_plain_layers(transformers.MixtralForCausalLM(config).eval())
    with torch.no_grad():
        router: Any = model.get_submodule("model.layers.0.mlp.gate")
        router.weight[3] = 0.0
        router.weight[2] = -router.weight[1]  # one of the two is above zero
    return model


def samples_of(count: int, *, padded: bool = False, seed: int = 1) -> Samples:
    """Random tokens; with padding, every third sample has only a few of them."""
    generator = torch.Generator().manual_seed(seed)
    items: list[dict[str, Tensor]] = []
    for number in range(count):
        ids = torch.randint(0, TOKENS, (LENGTH,), generator=generator)
        mask = torch.ones(LENGTH, dtype=torch.long)
        if padded and number % 3 == 0:
            mask[5:] = 0
        items.append({"input_ids": ids, **({"attention_mask": mask} if padded else {})})
    return Samples.of(items)


def batches_of(samples: Samples, model: nn.Module, size: int = 2) -> tuple[InputBatches, Task]:
    """The inputs of samples, and the task that reads them."""
    task = CausalLanguageModelling().bound(samples.example(1), model)
    return input_batches(samples, size, task=task), task


def tiny_space(
    model: nn.Module, samples: Samples, operators: tuple[str, ...] = ("svd",)
) -> SearchSpace:
    """All linear layers of a tiny model."""
    inputs: Any = samples.example(1)
    return compile_space(model, inputs, policy=RankPolicy(operators=operators), min_weights=1)
