"""Train a small GPT-2 on the bytes of a text, and write it as a Hugging Face folder.

    python studies/recovery/train_gpt.py --text text:FILE --minutes 30 --out FOLDER

The folder holds the weights in float16, at most 2 MB with the default size. A training that was
broken off goes on from its checkpoint in the cache folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from truncated import gpt, perplexity, trained

import rankNAS


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", default="auto", help="as the recipes' option of this name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = rankNAS.load_data(args.text, tokenizer="bytes", context=args.context)
    args.seconds = 60 * args.minutes
    network: Any = gpt(args, args.blocks, args.seed)
    report = trained(args, network, data, args.seed, 0.0, None, progress)
    epochs = report.steps * args.batch / len(data.train)
    print(f"{report.steps} steps, {epochs:.1f} epochs, {report.seconds:.0f} s, {report.mode}")
    network.half().save_pretrained(args.out)
    network.float()
    for name, samples in (("valid", data.valid), ("test", data.test)):
        if samples is not None:
            print(f"{name} perplexity per byte: {perplexity(network, samples, args.batch):.4f}")


def progress(step: int, total: int, loss: float) -> None:
    """Print every hundredth step."""
    if step % 100 == 0:
        print(f"step {step} of {total}: {loss:.3f} nats a byte", flush=True)


if __name__ == "__main__":
    main()
