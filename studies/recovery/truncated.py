"""A small GPT with half of its blocks: truncated or from random weights, distilled or not.

    python studies/recovery/truncated.py --text text:DIR --seconds 600 --out FOLDER

A GPT-2 of 12 blocks is trained on the bytes of a text. Then, in equal seconds each, 6 of its
blocks are trained on (``truncated``) or with its predictions too (``truncated-distilled``), and so
are 6 new blocks (``scratch``, ``scratch-distilled``), on the raw and on the cleaned text. Rows of
``rows.csv`` in the folder hold the perplexity per byte on both test texts; rows that exist are
kept, and a run that was broken off goes on.

The text is DIR with train.txt and test.txt, or a file, whose last tenth is for the test. How the
paper cleaned its text is not known to us; ours is `cleaned`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from csv_rows import append, rows_of
from torch import nn

import rankNAS
from rankNAS.data.base import Data
from rankNAS.data.samples import Samples
from rankNAS.evaluation.outputs import network_metrics
from rankNAS.io.tensors import read_tensors, write_tensors
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.loop import Report
from rankNAS.recovery.recipe import Job
from rankNAS.recovery.recover import run_recipe
from rankNAS.recovery.truncation import RULES, chosen_blocks, with_blocks
from rankNAS.tasks.language import CausalLanguageModelling

TEXTS = ("raw", "cleaned")
REPEATED = 40  # characters of a line from which a repetition is dropped
FIELDS = ("text", "method", "blocks", "seed", "perplexity_raw", "perplexity_cleaned", "seconds")
FIELDS += ("steps", "planned", "parameters", "limit", "width", "context", "threads", "versions")
#: By method: whether its blocks are those of the large network, and the weight of distillation.
METHODS: dict[str, tuple[bool, float]] = {
    "truncated": (True, 0.0),
    "truncated-distilled": (True, 0.5),
    "scratch": (False, 0.0),
    "scratch-distilled": (False, 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, help="text:DIR or text:FILE")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each training")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rule", choices=RULES, default="even", help="which blocks are kept")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--kept", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak of the learning rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--speed", default="auto", help="as the recipe's option of this name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("truncated"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prepare(Path(args.text.removeprefix("text:")), args.out)
    data = {
        name: rankNAS.load_data(f"text:{args.out / name}", tokenizer="bytes", context=args.context)
        for name in TEXTS
    }
    for seed in args.seeds:
        for text in args.texts:
            run(args, data, text, seed)
    print(table(rows_of(args.out / "rows.csv")))


def run(args: argparse.Namespace, data: dict[str, Data], text: str, seed: int) -> None:
    """Train the large network and the small ones on a text, and write their rows."""
    path, kept = args.out / "rows.csv", chosen_blocks(args.blocks, args.kept, args.rule)

    def measured(method: str, blocks: str, make: Callable[[], tuple[nn.Module, Report]]) -> None:
        key = {"text": text, "method": method, "blocks": blocks, "seed": seed}
        if any(all(row[n] == str(x) for n, x in key.items()) for row in rows_of(path)):
            return
        row = key | measurements(args, data, *make())
        append(path, FIELDS, row)
        print(row, flush=True)

    large = teacher(args, data[text], text, seed)
    measured("all blocks", f"{args.blocks}", lambda: large)
    named = f"{args.kept} {args.rule}"
    measured("kept, not trained", named, lambda: (with_blocks(large[0], kept), Report(0, 0, 0.0)))
    for method in args.methods:
        truncated, share = METHODS[method]

        def made(truncated: bool = truncated, share: float = share) -> tuple[nn.Module, Report]:
            network = with_blocks(large[0], kept) if truncated else gpt(args, args.kept, seed)
            dense = large[0] if share else None
            return network, trained(args, network, data[text], seed, share, dense)

        measured(method, named if truncated else f"{args.kept}", made)


def teacher(
    args: argparse.Namespace, data: Data, text: str, seed: int
) -> tuple[nn.Module, Report]:
    """The network with all blocks, trained or from its file."""
    network, path = gpt(args, args.blocks, seed), args.out / f"{text}-{seed}.safetensors"
    if path.is_file():
        state, facts = read_tensors(path)
        network.load_state_dict(state, strict=False)  # the head is the embedding
        steps, planned, seconds = facts["report"].split()
        return network.eval(), Report(int(steps), int(planned), float(seconds))
    report = trained(args, network, data, seed, 0.0, None)
    facts = {"report": f"{report.steps} {report.planned} {report.seconds}"}
    state = {n: p.detach().clone().contiguous() for n, p in network.named_parameters()}
    write_tensors(path, state, facts)
    return network, report


def gpt(args: argparse.Namespace, blocks: int, seed: int) -> nn.Module:
    """A GPT-2 for bytes with random weights."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=args.context,
        n_embd=args.width,
        n_layer=blocks,
        n_head=args.heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    network: nn.Module = transformers.GPT2LMHeadModel(config)
    return network.eval()


def trained(
    args: argparse.Namespace,
    network: nn.Module,
    data: Data,
    seed: int,
    share: float,
    dense: nn.Module | None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Report:
    """Train a network for the seconds, with a weight of the dense network's predictions."""
    recipe = Distil(
        epochs=1000,
        seconds=args.seconds,
        batch_size=args.batch,
        learning_rate=args.rate,
        distill=share,
        decay=0.1,
        augmentations=int(share > 0),
        speed=args.speed,
    )
    task = CausalLanguageModelling().bound(data.train.example(2), network)
    return run_recipe(recipe, Job(network, data.train, task, dense, seed=seed), on_step=on_step)


def measurements(
    args: argparse.Namespace, data: dict[str, Data], network: nn.Module, report: Report
) -> dict[str, Any]:
    """The entries of a row that are measured."""
    found: dict[str, Any] = {}
    for name in TEXTS:
        test = data[name].test
        assert test is not None
        found[f"perplexity_{name}"] = round(perplexity(network, test, args.batch), 4)
    return found | {
        "seconds": round(report.seconds, 1),
        "steps": report.steps,
        "planned": report.planned,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "limit": args.seconds,
        "width": args.width,
        "context": args.context,
        "threads": args.threads,
        "versions": f"torch {torch.__version__} transformers {transformers.__version__}",
    }


def perplexity(network: nn.Module, samples: Samples, batch: int) -> float:
    """The perplexity per byte."""
    task = CausalLanguageModelling().bound(samples.example(2), network)
    return network_metrics(network, samples, task, batch_size=batch)["perplexity"]


# -------------------------------------------------------------------------------------- the text


def prepare(source: Path, out: Path) -> None:
    """Write the parts of the text as they are and cleaned, unless they are there."""
    for name, text in parts(source):
        for version in TEXTS:
            path = out / version / f"{name}.txt"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(cleaned(text) if version == "cleaned" else text)


def parts(source: Path) -> Iterator[tuple[str, str]]:
    """The names and texts of the parts; the training part is the first nine tenths of a file."""
    if source.is_dir():
        for name in ("train", "test"):
            yield name, (source / f"{name}.txt").read_text()
        return
    whole = source.read_text()
    cut = whole.rindex("\n", 0, len(whole) * 9 // 10) + 1
    yield "train", whole[:cut]
    yield "test", whole[cut:]


def cleaned(text: str) -> str:
    r"""A text without marks of tokenisers, headings, repeated long lines and extra spaces.

    A heading is a line between equals signs, or the name of a speaker with a colon.

    >>> cleaned(" = Title = \n\n\n One <unk> half @-@ time , he   said . \n")
    'One half-time, he said.\n'
    """
    seen: set[str] = set()
    lines: list[str] = []
    for line in text.splitlines():
        line = re.sub(r" @(.)@ ", r"\1", line.replace("<unk>", " "))
        line = "".join(c if c.isprintable() else " " for c in line)
        line = re.sub(r" +([,.;:!?)])", r"\1", " ".join(line.split()))
        heading = re.fullmatch(r"=+ .* =+|[A-Z][\w' ]{0,30}:", line)
        if heading or (len(line) >= REPEATED and line in seen) or not (line or lines[-1:] > [""]):
            continue
        seen.add(line)
        lines.append(line)
    return "\n".join(lines).strip("\n") + "\n"


# -------------------------------------------------------------------------------------- the rows


def table(rows: list[dict[str, str]]) -> str:
    """The rows as a Markdown table."""
    names = ("text", "method", "blocks", "seed", "perplexity_raw", "perplexity_cleaned")
    names += ("steps", "seconds")
    lines = ["| " + " | ".join(names) + " |", "|" + len(names) * "---|"]
    lines += ["| " + " | ".join(row[name] for name in names) + " |" for row in rows]
    return "\n".join(lines).replace("_", " ")


if __name__ == "__main__":
    main()
