"""Split projections compute the same, with a rank for each part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.models.artifact import load, save
from rankNAS.search_spaces.compiler import compile_space, count_macs, prepared_model
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.search_spaces.projections import (
    SplitProjection,
    fused_projections,
    split_projections,
)

SPLIT = RankPolicy(split_fused=True)


class Attention(nn.Module):
    """Causal attention on a fused projection, with grouped keys and values."""

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.size, self.groups = width // heads, groups
        self.keys = groups * self.size
        self.qkv_proj = nn.Linear(width, width + 2 * self.keys)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv_proj(x).split([x.shape[-1], self.keys, self.keys], -1)
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x + self.attention(x))
        return found


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))


def test_parts_follow_from_the_output_projection(net: Net) -> None:
    assert fused_projections(net) == {"attention.qkv_proj": {"q": 16, "k": 8, "v": 8}}


def test_split_projections_compute_the_same(net: Net) -> None:
    split = split_projections(net, ["attention.qkv_proj"])
    assert isinstance(split.get_submodule("attention.qkv_proj"), SplitProjection)
    assert torch.allclose(split(X), net(X), atol=1e-6)
    assert count_macs(split, X) == count_macs(net, X)
    assert split_projections(net, []) is net


def test_a_space_has_the_parts_if_its_policy_says_so(net: Net) -> None:
    whole = compile_space(net, X, min_weights=1)
    assert "attention.qkv_proj" in whole.layers
    space = compile_space(net, X, policy=SPLIT, min_weights=1)
    roles = {name.rpartition(".")[2]: layer.roles for name, layer in space.layers.items()}
    assert roles == {"q": ("q",), "k": ("k",), "v": ("v",), "o_proj": ("o",)}
    assert space.dense_cost == whole.dense_cost


def test_a_layer_that_is_read_elsewhere_is_not_split(net: Net) -> None:
    class Reader(Net):
        def forward(self, x: Tensor) -> Tensor:
            own = self.attention.qkv_proj
            y = functional.linear(x, own.weight[:16]) + own(x)[..., :16]
            found: Tensor = self.head(self.attention.o_proj(y))
            return found

    model = Reader()
    assert prepared_model(model, X, SPLIT) is model


def test_a_file_with_split_projections_loads(net: Net, tmp_path: Any) -> None:
    space = compile_space(net, X, policy=SPLIT, min_weights=1)
    allocation = Allocation.of({**space.dense, "attention.qkv_proj.k": Choice("svd", (2,))})
    network = factorise(net, space).materialise(allocation)
    file = save(network, allocation, tmp_path / "small.safetensors")
    assert torch.equal(load(file, Net)(X), network(X))


def test_names_decide_what_is_split(net: Net) -> None:
    assert with_plain_layers(net, ["attention.qkv_proj.weight"]) is net
    split = with_plain_layers(net, ["attention.qkv_proj.v.weight"])
    assert "attention.qkv_proj.q.bias" in split.state_dict()


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Phi3", "Bloom"])
def test_models_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"n_positions": 16} if kind == "GPT2" else {}),
        **({"num_key_value_heads": 2} if kind == "Phi3" else {}),
    )
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs = {"input_ids": torch.randint(0, 40, (2, 8)), "use_cache": False}
    split = prepared_model(model, inputs, SPLIT)
    assert torch.allclose(split(**inputs).logits, model(**inputs).logits, atol=1e-4)
    space = compile_space(model, inputs, policy=SPLIT, min_weights=1)
    found = {layer.roles for layer in space.layers.values()}
    assert {("q",), ("k",), ("v",)} <= found
    assert (("gate",) in found) == (kind == "Phi3")


def test_rows_of_heads_go_to_their_parts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, rotary_pct=0.5
    )
    model = transformers.GPTNeoXForCausalLM(config)
    path = "gpt_neox.layers.0.attention.query_key_value"
    rows = model.get_submodule(path).weight.detach().view(2, 3, 4, 8)  # heads, parts, size
    split = split_projections(model, [path])
    for number, part in enumerate("qkv"):
        weight = split.get_submodule(f"{path}.{part}").weight
        assert torch.equal(weight, rows[:, number].reshape(8, 8))
