"""Train a small GPT-2 on the bytes of a text, and write it as a Hugging Face folder.

    python studies/smollm2/train_gpt.py --text DIR --out studies/smollm2/gpt

DIR holds ``train.txt`` and ``valid.txt`` (or ``test.txt``). Of a single file, the first 80 % are
for training and the next 10 % for validation, as in ``--data text:FILE``. The model has 0.85
million parameters, stored in bfloat16. A checkpoint is written every 200 steps, and a run that was
broken off goes on from it. One thread.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT, WIDTH, BLOCKS, HEADS = 256, 128, 4, 4
BATCH, STEPS, WARM_UP, RATE, DECAY, DROPOUT = 16, 4000, 100, 2e-3, 0.1, 0.1
EVERY = 200


def main(text: Path, out: Path, seed: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train, valid = texts(text)
    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=HEADS,
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=DROPOUT,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    first = restored(checkpoint, model, optimiser) if checkpoint.exists() else 0
    started = time.time()
    for step in range(first, STEPS):
        rate = RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        for group in optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(seed * STEPS + step)
        starts = torch.randint(len(train) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([train[i : i + CONTEXT] for i in starts]).long()
        model.train()
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % EVERY == 0:
            found = nats(model, valid)
            print(
                f"step {step + 1}: training {loss.item():.4f}, validation {found:.4f} nats, "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save({**state, "step": step + 1}, checkpoint)
    model.to(torch.bfloat16).save_pretrained(out)
    checkpoint.unlink(missing_ok=True)


def texts(path: Path) -> tuple[Tensor, Tensor]:
    """The bytes of the training and the validation text."""
    if path.is_dir():
        other = next(path / n for n in ("valid.txt", "test.txt") if (path / n).exists())
        parts = [(path / "train.txt").read_bytes(), other.read_bytes()]
    else:
        whole = path.read_bytes()
        tenth = len(whole) // 10
        parts = [whole[: 8 * tenth], whole[8 * tenth : 9 * tenth]]
    train, valid = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, valid


@torch.no_grad()
def nats(model: GPT2LMHeadModel, text: Tensor, windows: int = 64) -> float:
    """The mean loss on the first windows of a text, without overlap."""
    model.train(False)
    batch = text[: windows * CONTEXT].view(-1, CONTEXT).long()
    losses = [model(input_ids=part, labels=part).loss * len(part) for part in batch.split(16)]
    return float(sum(losses) / len(batch))


def restored(path: Path, model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """The number of steps done; model and optimiser are those of a checkpoint."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.text, arguments.out, arguments.seed)
