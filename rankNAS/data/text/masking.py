"""Windows in which some tokens are hidden, for masked language models."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankNAS.data.items import Batched
from rankNAS.data.labels import IGNORED
from rankNAS.data.text.tokenizers import Tokenizer
from rankNAS.data.text.windows import Array, Windows
from rankNAS.exceptions import UsageError

__all__ = ["SHARE", "Masked"]

SHARE = 0.15  # of the tokens, as in BERT (Devlin et al., 2019, section 3.1)


@final
class Masked(Batched, Dataset[dict[str, Tensor]]):
    """Windows in which the mask token stands for a share of the tokens, which are the labels.

    The choice depends on a token's place in the text alone, so every pass sees the same one.
    Special tokens are never chosen. All other labels are -100. Unlike in the training of BERT,
    every chosen token is replaced by the mask.

    Args:
        windows: The windows.
        share: The expected share of masked tokens, above 0 and below 1.
        tokenizer: Knows the mask and the special tokens.

    Raises:
        UsageError: The tokenizer has no mask token.
    """

    def __init__(self, windows: Windows, share: float, tokenizer: Tokenizer) -> None:
        mask = getattr(tokenizer, "mask", None)
        if mask is None:
            raise UsageError(
                f"the tokenizer {tokenizer.name!r} has no mask token, which a masked language "
                "model needs; give its own by ?tokenizer=FOLDER, or labelled data by "
                "file.py:factory."
            )
        self.length, self._windows, self._share, self._mask = windows.length, windows, share, mask
        self._special = torch.tensor(sorted(getattr(tokenizer, "special", ())), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x[0] for name, x in self.batch(torch.tensor([index])).items()}

    def batch(self, indices: Tensor, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        found = self._windows.batch(indices)
        ids = found["input_ids"]
        chosen = torch.from_numpy(_uniform(self._windows.places(indices)) < self._share)
        chosen &= ~torch.isin(ids, self._special)
        if "attention_mask" in found:
            chosen &= found["attention_mask"].bool()
        labels = found.get("labels", ids)
        found["labels"] = labels.masked_fill(~chosen, IGNORED)
        found["input_ids"] = ids.masked_fill(chosen, self._mask)
        return {name: x.to(device) for name, x in found.items()}


def _uniform(places: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers in [0, 1) that depend on whole numbers alone (the finaliser of SplitMix64)."""
    x = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
