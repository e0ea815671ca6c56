"""Sentence embeddings, compressed with unlabelled sentences only.

    python studies/embeddings/sentences.py MODEL_FOLDER TEXT_FOLDER --out result.csv

The model is an encoder of transformers with its tokenizer; embeddings are the masked means of its
last states, normalised. Sentences are pieces of the lines of train.txt (for the search) and of
test.txt (for the table).
"""

from __future__ import annotations

import argparse
import platform
import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from scipy.stats import spearmanr
from torch import Tensor, nn

import rankNAS

#: By name of a row: strategy, norm, and whether the layers of the answer are refitted.
ROWS: dict[str, tuple[str, Any, bool]] = {
    "plain SVD, uniform": ("uniform", "weight", False),
    "solve": ("solve", None, True),
    "auto": ("auto", None, True),
}
BATCH = 64


class Embedder(nn.Module):
    """Normalised sentence embeddings (N, width) of an encoder: masked means of the last states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask[..., None].to(states)
        return nn.functional.normalize((states * weights).sum(1), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder of transformers")
    parser.add_argument("text", type=Path, help="a folder with train.txt and test.txt")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--sentences", type=int, default=1024, help="for the search")
    parser.add_argument("--held-out", type=int, default=1000, help="for the table")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence, at most")
    parser.add_argument("--calibration", type=int, default=256, help="of these sentences")
    parser.add_argument("--validation", type=int, default=128, help="further ones")
    parser.add_argument(
        "--memory", type=int, default=1, help="MB of statistics from which blocks are streamed"
    )
    parser.add_argument("--refine", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    model, encode = loaded(args.model, args.length)
    train = encode(sentences(args.text / "train.txt", args.sentences, args.seed))
    test = encode(sentences(args.text / "test.txt", args.held_out, args.seed))
    dense = embeddings(model, test)
    found: list[dict[str, Any]] = []
    for name in args.rows:
        for row in rows_of(name, model, train, dense, test, args):
            found.append(row)
            print(row, flush=True)
            if args.out is not None:
                pd.DataFrame(found).to_csv(args.out, index=False)
    print(f"\n{versions()}, seed {args.seed}\n\n{table(pd.DataFrame(found))}")


def loaded(folder: Path, length: int) -> tuple[nn.Module, Any]:
    """The model of a folder, and what makes items from sentences."""
    encoder = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    if hasattr(encoder, "pooler"):
        encoder.pooler = None  # its output is not used
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(texts: list[str]) -> list[dict[str, Tensor]]:
        found = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        pairs = zip(found["input_ids"], found["attention_mask"], strict=True)
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs]

    return Embedder(encoder.eval().float()), encode


def sentences(file: Path, count: int, seed: int) -> list[str]:
    """Sentences of 5 to 40 words from a text with spaces between words and full stops."""
    parts = re.split(r"(?<= [.!?]) |\n", file.read_text("utf-8"))
    known = dict.fromkeys(p.strip() for p in parts if 5 <= len(p.split()) <= 40 and "=" not in p)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = list(known)
    return [kept[i] for i in order[:count]]


def rows_of(
    name: str,
    model: nn.Module,
    train: list[dict[str, Tensor]],
    dense: Tensor,
    test: list[dict[str, Tensor]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """What a strategy finds for each budget, measured on held-out sentences."""
    from rankNAS.recovery import Refinement

    strategy, norm, refit = ROWS[name]
    refine = Refinement() if args.refine else None
    started = time.process_time()
    study = rankNAS.search(
        model,
        train,
        task="matching",
        strategy=strategy,
        budget=[{"layer_params": kept} for kept in args.kept],
        seed=args.seed,
        settings=rankNAS.Settings(
            norm=norm,
            calibration=args.calibration,
            validation=args.validation,
            screening=args.validation // 2,
            sequential=refit,
            refine=refine,
            memory=args.memory << 20,
        ),
    )
    found = []
    for problem, kept in zip(study.problems, args.kept, strict=True):
        small = study.materialise(study.solution(problem).allocation)
        seconds, started = time.process_time() - started, time.process_time()
        row = {"row": name, "kept": kept, **agreement(embeddings(small, test), dense)}
        found.append(row | {"cpu_seconds": round(seconds)})
    return found


@torch.no_grad()
def embeddings(model: nn.Module, items: list[dict[str, Tensor]]) -> Tensor:
    """The embeddings (N, width) of items."""
    found = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        found.append(model(*(torch.stack([item[name] for item in part]) for name in part[0])))
    return torch.cat(found)


def agreement(small: Tensor, dense: Tensor) -> dict[str, float]:
    """The mean cosine to the dense embeddings, and the rank correlation of all similarities."""
    pairs = torch.triu_indices(len(dense), len(dense), 1)
    similar = [(x @ x.T)[pairs[0], pairs[1]].numpy() for x in (small, dense)]
    return {
        "cosine": float((small * dense).sum(1).mean()),
        "spearman": float(spearmanr(*similar).statistic),
    }


def table(rows: pd.DataFrame) -> str:
    """Mean cosine and rank correlation by strategy and budget, in Markdown."""
    budgets = list(rows.kept.unique())
    lines = ["| | " + " | ".join(f"{kept:g}" for kept in budgets) + " |"]
    lines.append("|---|" + "---|" * len(budgets))
    for name, own in rows.groupby("row", sort=False):
        cells = [f"{row.cosine:.4f}, {row.spearman:.4f}" for row in own.itertuples()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> str:
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main()
