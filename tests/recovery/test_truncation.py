"""Truncation in depth: which blocks are kept, and networks built of these blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankNAS.exceptions import UsageError
from rankNAS.recovery.truncation import RULES, chosen_blocks, with_blocks
from rankNAS.search_spaces.zoo.vit import CifarViT

ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KEPT = [0, 2, 5]


def gpt2(layers: int = 6) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=layers, n_head=2, n_positions=32, **ENDS
    )
    return spread(transformers.GPT2LMHeadModel(config))


def llama(layers: int = 6) -> Any:
    transformers = pytest.importorskip("transformers")
    return spread(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(layers))))


def qwen(layers: int = 6) -> Any:
    """With a list of the kinds of its blocks: a window in every second one."""
    transformers = pytest.importorskip("transformers")
    kinds = ["full_attention", "sliding_attention"] * 3
    config = transformers.Qwen2Config(
        layer_types=kinds[:layers], use_sliding_window=True, sliding_window=4, **sizes(layers)
    )
    return spread(transformers.Qwen2ForCausalLM(config))


def sizes(layers: int) -> dict[str, Any]:
    found = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    found |= {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return found | {"max_position_embeddings": 32, **ENDS}


def spread(model: Any) -> Any:
    """The model with larger weights, so that every block counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


MODELS = {"gpt2": gpt2, "llama": llama, "qwen": qwen}


def layers_of(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = (
        model.transformer.h if hasattr(model, "transformer") else model.model.layers
    )
    return found


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_network_built_of_these_blocks(name: str, tmp_path: Path) -> None:
    whole = MODELS[name]()
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    short = with_blocks(whole, KEPT)
    other = type(whole)(copy.deepcopy(short.config))  # built anew, from the configuration
    assert short.config.num_hidden_layers == 3 and whole.config.num_hidden_layers == 6
    assert len(layers_of(other)) == 3
    renamed = whole.state_dict()
    path = "transformer.h" if name == "gpt2" else "model.layers"
    for new, old in enumerate(KEPT):
        for key in list(before):
            if key.startswith(f"{path}.{old}."):
                renamed[key.replace(f".{old}.", f".{new}.", 1)] = before[key]
    kept = {key: renamed[key] for key in other.state_dict()}
    other.load_state_dict(kept)
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = other.eval()(input_ids=ids).logits
    assert torch.equal(short(input_ids=ids).logits, logits)
    assert not torch.allclose(whole(input_ids=ids).logits, logits, atol=1e-2)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, before[key])
    short.save_pretrained(tmp_path)
    again = type(whole).from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, logits)


@pytest.mark.parametrize("name", MODELS)
def test_it_generates_with_cached_keys(name: str) -> None:
    short = with_blocks(MODELS[name](), KEPT)
    numbers = [block_number(block) for block in layers_of(short)]
    assert numbers == [0, 1, 2]
    ids = torch.randint(3, 50, (1, 5), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    cached, plain = (short.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (1, 15)
    past = short(input_ids=ids, use_cache=True).past_key_values
    assert len(past.layers) == 3


def block_number(block: Any) -> int:
    found = {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")}
    (number,) = found
    return int(number)


def test_kinds_of_blocks_follow_them() -> None:
    short = with_blocks(qwen(), [1, 2, 3])
    assert short.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_all_blocks_are_the_network() -> None:
    whole = llama(3)
    ids = torch.arange(3, 10)[None]
    assert torch.equal(with_blocks(whole, range(3))(ids).logits, whole(ids).logits)


def test_a_sequence_of_blocks() -> None:
    torch.manual_seed(0)
    whole = CifarViT(5, 3, (2, 2), depth=4, width=8, heads=2).eval()
    short = with_blocks(whole, [1, 3])
    assert isinstance(short, CifarViT) and isinstance(short.blocks, nn.Sequential)
    assert [len(whole.blocks), len(short.blocks)] == [4, 2]
    for block, wanted in zip(short.blocks, (whole.blocks[1], whole.blocks[3]), strict=True):
        for own, other in zip(block.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(own, other)
    assert short(torch.zeros(1, 3, 8, 8)).shape == (1, 5)


def test_rules() -> None:
    assert chosen_blocks(12, 6, "first") == list(range(6))
    assert chosen_blocks(12, 6, "last") == list(range(6, 12))
    assert chosen_blocks(5, 3, "ends") == [0, 1, 4] and chosen_blocks(5, 1, "even") == [0]
    for rule in RULES:
        for kept in range(1, 8):
            numbers = chosen_blocks(7, kept, rule)
            assert len(numbers) == kept and numbers == sorted(set(numbers)) and numbers[-1] < 7
        assert chosen_blocks(7, 7, rule) == list(range(7))
    for kept, rule, message in ((0, "even", "keep 1 to 12"), (13, "first", "13 of 12")):
        with pytest.raises(UsageError, match=message):
            chosen_blocks(12, kept, rule)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one of even, alternate"):
        chosen_blocks(12, 6, "some")  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [[], [0, 0], [3], [-1]])
def test_bad_numbers(kept: list[int]) -> None:
    with pytest.raises(UsageError, match="different numbers from 0 to 2"):
        with_blocks(CifarViT(5, 3, (2, 2), depth=3, width=8, heads=2), kept)


def test_networks_that_cannot_be_truncated() -> None:
    with pytest.raises(UsageError, match="no list of blocks"):
        with_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [0])
    transformers = pytest.importorskip("transformers")
    t5 = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(UsageError, match=r"several lists .*encoder.block, decoder.block"):
        with_blocks(transformers.T5ForConditionalGeneration(t5), [0])
    model = gpt2(3)
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UsageError, match="another function"):
        with_blocks(model, [0, 2])
