"""Fused experts become layers that compute the same, and cost the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.allocation import Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.search_spaces.compiler import compile_space, count_macs
from rankNAS.search_spaces.experts import (
    SeparateExperts,
    balanced_routing,
    is_fused_experts,
    separate_experts,
)

HIDDEN, MIDDLE, EXPERTS, CHOSEN, TOKENS = 12, 20, 4, 2, 9


class Fused(nn.Module):
    """Experts in three-dimensional parameters, with the attributes of ``transformers``."""

    def __init__(self, gated: bool, turned: bool, concatenated: bool, biased: bool) -> None:
        super().__init__()
        self.has_gate, self.is_transposed = gated, turned
        self.is_concatenated, self.has_bias = concatenated, biased
        self.act_fn = nn.SiLU()
        rows, name = (2 * MIDDLE, "gate_up_proj") if gated else (MIDDLE, "up_proj")
        for own, outputs, inputs in ((name, rows, HIDDEN), ("down_proj", HIDDEN, MIDDLE)):
            size = (inputs, outputs) if turned else (outputs, inputs)
            self.register_parameter(own, nn.Parameter(0.3 * torch.randn(EXPERTS, *size)))
            if biased:
                bias = nn.Parameter(torch.randn(EXPERTS, outputs))
                self.register_parameter(f"{own}_bias", bias)

    def _apply_gate(self, joined: Tensor) -> Tensor:
        if self.is_concatenated:
            gate, up = joined.chunk(2, -1)
        else:
            gate, up = joined[..., ::2], joined[..., 1::2]
        activated: Tensor = self.act_fn(gate) * up
        return activated

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """A loop over the tokens, straight from the definition."""
        rows = []
        for token, chosen, shares in zip(x, index, weights, strict=True):
            row = torch.zeros_like(token)
            for expert, share in zip(chosen.tolist(), shares, strict=True):
                h = self._times("gate_up_proj" if self.has_gate else "up_proj", expert, token)
                h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
                row = row + share * self._times("down_proj", expert, h)
            rows.append(row)
        return torch.stack(rows)

    def _times(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        y: Tensor = x @ weight if self.is_transposed else weight @ x
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y


class Block(nn.Module):
    """A router and its experts, and an output layer."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(HIDDEN, EXPERTS), fused
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(CHOSEN)
        found: Tensor = self.head(self.experts(x, index, weights))
        return found


@pytest.fixture(params=[(1, 0, 1, 0), (1, 1, 0, 1), (0, 0, 1, 1), (1, 1, 1, 0)], ids=str)
def fused(request: pytest.FixtureRequest) -> Fused:
    torch.manual_seed(0)
    return Fused(*map(bool, request.param))


def routes() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    weights, index = torch.rand(TOKENS, EXPERTS).topk(CHOSEN)
    return torch.randn(TOKENS, HIDDEN), index, weights


def test_separate_experts_compute_the_same(fused: Fused) -> None:
    assert is_fused_experts(fused)
    separate = separate_experts(fused)
    assert isinstance(separate, SeparateExperts)
    assert torch.allclose(separate(*routes()), fused(*routes()), atol=1e-5)
    numbers = sum(p.numel() for p in separate.parameters())
    assert numbers == sum(p.numel() for p in fused.parameters())


def test_experts_without_tokens_are_not_run(fused: Fused) -> None:
    x, index, weights = routes()
    index = index % 2  # experts 2 and 3 receive nothing
    separate = separate_experts(fused)
    for number in (2, 3):
        separate.get_submodule(f"{number}").register_forward_hook(pytest.fail)
    assert torch.allclose(separate(x, index, weights), fused(x, index, weights), atol=1e-5)


def test_all_experts_have_equal_shares_in_costs(fused: Fused) -> None:
    model, x = Block(fused), torch.randn(2 * EXPERTS, HIDDEN)
    space = compile_space(model, x, min_weights=1)
    found = {name: layer for name, layer in space.layers.items() if "experts" in name}
    assert len(found) == EXPERTS * (3 if fused.has_gate else 2)
    matrices = sum(p.numel() for p in fused.parameters() if p.dim() == 3)
    assert sum(layer.costs[0].macs for layer in found.values()) == (
        2 * EXPERTS * CHOSEN * matrices // EXPERTS
    )
    assert {layer.shape.calls for layer in found.values()} == {((2 * CHOSEN,),)}
    assert sum(share["params"] for share in space.shares.values()) == pytest.approx(1)
    assert sum(share["macs"] for share in space.shares.values()) == pytest.approx(1)


def test_a_network_with_decomposed_experts_counts_what_its_allocation_says(fused: Fused) -> None:
    model, x = Block(fused).eval(), torch.randn(2 * EXPERTS, HIDDEN)
    space = compile_space(model, x, min_weights=1)
    name = next(name for name in space.layers if name.endswith("experts.2.down_proj"))
    allocation = {**space.dense, name: Choice("svd", (3,))}
    network = factorise(model, space).materialise(allocation)
    assert count_macs(network, x) == space.cost(allocation).macs
    assert torch.equal(network.get_submodule("router").weight, model.router.weight)
    whole = factorise(model, space).materialise(space.dense)
    assert torch.allclose(whole(x), model(x), atol=1e-5)


def test_balanced_routing_reads_no_values() -> None:
    with torch.device("meta"):
        separate: Any = separate_experts(Fused(True, False, True, False))
        index = torch.zeros(TOKENS, CHOSEN, dtype=torch.int64)
        given = torch.randn(TOKENS, HIDDEN), index, torch.rand(TOKENS, CHOSEN)
        with balanced_routing():
            assert separate(*given).shape == (TOKENS, HIDDEN)


@pytest.mark.parametrize("spoil", ["norm", "parallel", "hook", "forward"])
def test_experts_with_more_in_their_path_stay_fused(spoil: str) -> None:
    fused: Any = Fused(True, False, True, False)
    if spoil == "norm":
        fused.has_post_expert_norm = True
    elif spoil == "parallel":
        fused._is_expert_parallel = True
    elif spoil == "hook":
        fused.register_forward_hook(lambda *_: None)
    else:
        fused.forward = lambda x, *_: x
    assert not is_fused_experts(fused)
    model = Block(fused)
    assert separate_experts(model) is model


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_models_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=24,
        num_local_experts=4,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs = {"input_ids": torch.randint(0, 40, (2, 8)), "use_cache": False}
    separate = separate_experts(model)
    assert separate is not model
    assert torch.allclose(separate(**inputs).logits, model(**inputs).logits, atol=1e-4)
    space = compile_space(model, inputs, min_weights=1)
    assert space.dense_cost.macs == count_macs(model, inputs)
    roles = [layer.roles for name, layer in space.layers.items() if ".experts." in name]
    assert roles == 4 * [("expert", "gate"), ("expert", "up"), ("expert", "down")]
