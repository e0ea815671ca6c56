"""Tiny random models of transformers, one of each family, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rankNAS.allocation import Allocation
from rankNAS.compression.factorisation import factorise
from rankNAS.search_spaces.compiler import compile_space

VOCABULARY = 100
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {n: v for n, v in DECODER.items() if n not in ("num_key_value_heads", "bos_token_id")}
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _gpt2(t: Any) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, **sizes, **ENDS))


def _opt(t: Any) -> Any:
    sizes = {n: v for n, v in DECODER.items() if n not in ("intermediate_size", *ENDS)}
    del sizes["num_key_value_heads"]
    return t.OPTForCausalLM(t.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **sizes, **ENDS))


def _t5(t: Any) -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    return t.T5ForConditionalGeneration(t.T5Config(vocab_size=VOCABULARY, **sizes, **ends))


def _vit(t: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    images = {"num_attention_heads": 4, "image_size": 32, "patch_size": 8, "num_labels": 5}
    return t.ViTForImageClassification(t.ViTConfig(**sizes, **images))


def _qwen3_moe(t: Any) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(head_dim=8, **experts, **DECODER))


#: By name, a function of the package that returns a model.
FAMILIES: dict[str, Callable[[Any], Any]] = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(tie_word_embeddings=True, **DECODER)),
    "qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(head_dim=8, **DECODER)),
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**ENCODER)),
    "bert_classifier": lambda t: t.BertForSequenceClassification(
        t.BertConfig(num_labels=3, **ENCODER)
    ),
    "t5": _t5,
    "vit": _vit,
    "mixtral": lambda t: t.MixtralForCausalLM(
        t.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **DECODER)
    ),
    "qwen3_moe": _qwen3_moe,
}


def tiny(name: str) -> Any:
    """The model of a family, with the same weights each time, in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return FAMILIES[name](transformers).eval()


def tiny_inputs(model: Any) -> dict[str, Tensor]:
    """Arguments of two samples for a model."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    return {"input_ids": tokens}


def compressed(model: Any, operators: tuple[str, ...] = ()) -> tuple[Any, Allocation]:
    """A network with a choice of middle cost for every layer, and its allocation."""
    space = compile_space(model, tiny_inputs(model), min_weights=512)
    choices = {}
    for name, layer in space.layers.items():
        known = [c for c in layer.choices if not operators or c.operator in operators]
        choices[name] = known[len(known) // 2]
    allocation = Allocation.of(choices)
    return factorise(model, space).materialise(allocation).eval(), allocation


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a model."""
    found: Tensor = model(**inputs).logits
    return found


def generated(model: Any, inputs: dict[str, Tensor], use_cache: bool) -> list[list[int]]:
    """Tokens that a model adds to its inputs, the most likely ones."""
    tokens = inputs["input_ids"]
    found: list[list[int]] = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
    ).tolist()
    return found
