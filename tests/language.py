"""Small texts, tokenizers and language models for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

WORDS = "the cat sat on a mat and saw dogs run far away from home".split()


def sentence(number: int) -> str:
    """A sentence of 5 to 9 words, determined by its number."""
    order = np.random.default_rng(number)
    return " ".join(order.choice(WORDS, int(order.integers(5, 10)))) + " ."


def text(lines: int, seed: int = 0) -> str:
    """A text of so many lines, some of them blank."""
    return "".join("\n" if i % 7 == 3 else sentence(1000 * seed + i) + "\n" for i in range(lines))


def text_folder(folder: Path, lines: int = 60, parts: str = "train test valid") -> Path:
    """A folder with a text file for each part."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate(parts.split()):
        (folder / f"{part}.txt").write_text(text(lines if part == "train" else lines // 2, seed))
    return folder


def tokenizer_folder(folder: Path, *, start: bool = False) -> Path:
    """A Hugging Face folder with a tokenizer of words, one that begins texts with <s> if asked."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<unk>", "<s>", "</s>", "<pad>", ".", "\n", *WORDS]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    split = tokenizers.pre_tokenizers.Split
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [split("\n", "isolated"), split(" ", "removed")]
    )
    if start:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    fast.save_pretrained(folder)
    return folder


def tiny_llama(vocabulary: int = 256, positions: int = 64, seed: int = 0) -> Any:
    """A Llama of two small blocks with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
    )
    return transformers.LlamaForCausalLM(config).eval()


class Bigram(nn.Module):
    """Predicts that token k is followed by k + `step`, with a residual branch to compress."""

    def __init__(self, vocabulary: int = 32, step: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, vocabulary)
        self.embedding.weight.data = 9 * torch.eye(vocabulary).roll(step, 1)
        self.first = nn.Linear(vocabulary, 24)
        self.second = nn.Linear(24, vocabulary)
        self.second.weight.data *= 0.1

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embedding(input_ids)
        logits: Tensor = h + self.second(torch.relu(self.first(h)))
        return logits
