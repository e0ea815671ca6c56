"""Train a small GPT-2 on the bytes of a text, and write it as a Hugging Face folder.

    python studies/shakespeare/train_gpt.py --text text:FILE --minutes 30 --out FOLDER

The folder holds the weights in float16, at most 2 MB with the default size. A training that was
broken off goes on from its checkpoint in the cache folder.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import transformers

import rankNAS
from rankNAS.data.base import Data
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.recipe import Job
from rankNAS.recovery.recover import run_recipe
from rankNAS.tasks.language import CausalLanguageModelling


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, help="text:FILE or text:DIR")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak of the learning rate")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", default="auto", help="as the recipes' option of this name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = rankNAS.load_data(args.text, tokenizer="bytes", context=args.context)
    torch.manual_seed(args.seed)
    network: Any = transformers.GPT2LMHeadModel(configuration(args))
    train(args, network, data)
    network.half().save_pretrained(args.out)
    network.float()
    for name in ("valid", "test"):
        print(f"{name} perplexity per byte: {perplexity(network, data, name):.4f}")


def configuration(args: argparse.Namespace) -> transformers.GPT2Config:
    """The configuration of the network."""
    return transformers.GPT2Config(
        vocab_size=256,
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.blocks,
        n_head=args.heads,
        embd_pdrop=args.dropout,
        attn_pdrop=args.dropout,
        resid_pdrop=args.dropout,
        bos_token_id=None,
        eos_token_id=None,
    )


def train(args: argparse.Namespace, network: torch.nn.Module, data: Data) -> None:
    """Train a network on the labels alone, within the minutes."""
    recipe = Distil(
        epochs=1000,
        seconds=60 * args.minutes,
        batch_size=args.batch,
        learning_rate=args.rate,
        distill=0.0,
        decay=0.1,
        speed=args.speed,
    )
    task = CausalLanguageModelling().bound(data.train.example(2), network)
    report = run_recipe(recipe, Job(network, data.train, task, seed=args.seed), on_step=progress)
    epochs = report.steps * args.batch / len(data.train)
    print(f"{report.steps} steps, {epochs:.1f} epochs, {report.seconds:.0f} s, {report.mode}")


def progress(step: int, total: int, loss: float) -> None:
    """Print every hundredth step."""
    if step % 100 == 0:
        print(f"step {step} of {total}: {loss:.3f} nats a window", flush=True)


def perplexity(network: torch.nn.Module, data: Data, part: str) -> float:
    """The perplexity per byte on a part of the data."""
    samples = getattr(data, part)
    if samples is None:
        return math.nan
    task = CausalLanguageModelling().bound(samples.example(2), network)
    return network_metrics(network, samples, task)["perplexity"]


if __name__ == "__main__":
    main()
