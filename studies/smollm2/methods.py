"""Rank selection for a language model, method by method, with nothing trained on the test text.

    python studies/smollm2/methods.py --model hf:FOLDER --text text:DIR --methods solve --out FILE

Each method and budget runs in its own process (`auto` runs all budgets in one), as published: its
norm, its operators, and the refit if it has one. A row of the CSV file holds the perplexity on the
first and on the last 16 windows of the test text, CPU seconds, and the highest anonymous memory of
the process. Rows that exist are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn import functional

import rankNAS
from rankNAS.recovery.config import Refinement
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.settings import Settings
from rankNAS.strategies import make_strategy
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.bayesian.bolaco import Bolaco

CHUNK = 256  # positions whose logits exist at the same time
PART = 16  # windows


@dataclass(frozen=True)
class Method:
    """How one method is run.

    Args:
        strategy: Its name, or the strategy.
        norm: The norm; None is that of the strategy.
        refit: Whether the factors are refitted to the compressed inputs.
        refine: Whether the blocks are refined.
    """

    strategy: str | Strategy
    norm: Any = None
    refit: bool = False
    refine: bool = False


METHODS = {
    "svd": Method("uniform", "weight"),
    "asvd-uniform": Method("uniform", "asvd"),
    "asvd": Method("strs"),
    "svd-llm": Method("uniform", "input"),
    "svd-llm-update": Method("uniform", "input", refit=True),
    "drone": Method("drone"),
    "bolaco-5x1": Method(Bolaco(stages=1)),
    "bolaco-5x4": Method(Bolaco(stages=4)),
    "energy": Method("energy"),
    "solve-not-refitted": Method("solve"),
    "solve": Method("solve", refit=True),
    "solve-refined": Method("solve", refit=True, refine=True),
    "auto": Method("auto", refit=True),
    "auto-refined": Method("auto", refit=True, refine=True),
}
FIELDS = (
    "method",
    "kept",
    "seed",
    "perplexity",
    "perplexity_last",
    "validation",
    "layer_params",
    "dense_layers",
    "evaluations",
    "cpu_seconds",
    "seconds",
    "memory_gb",
    "versions",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="hf:FOLDER, perhaps with ?dtype=bfloat16")
    parser.add_argument("--text", required=True, help="text:DIR, with train, valid and test.txt")
    parser.add_argument("--methods", nargs="+", default=["solve"], choices=METHODS)
    parser.add_argument("--kept", nargs="+", type=float, default=[0.8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--calibration", type=int, help="windows")
    parser.add_argument("--validation", type=int, help="windows")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, help="of a block's refinement")
    parser.add_argument("--recover", help="a recipe, such as lora:seconds=3600, for each network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="a CSV file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        method, seed, *kept = args.child.split(",")
        args.kept = [float(x) for x in kept]
        run(args, method, int(seed))
        return
    for seed in args.seeds:
        for method in args.methods:
            together = METHODS[method].strategy == "auto"
            for group in [args.kept] if together else [[kept] for kept in args.kept]:
                if not is_known(args.out, named(method, args.recover), seed, group):
                    start(method, seed, group)


def named(method: str, recipe: str | None) -> str:
    """What a row calls a method and its recipe."""
    return method + (f" + {recipe}" if recipe else "")


def is_known(path: Path, method: str, seed: int, kept: Sequence[float]) -> bool:
    """Whether a file has the rows of a method for all budgets."""
    if not path.exists():
        return False
    rows = pd.read_csv(path)
    known = set(zip(rows.method, rows.kept, rows.seed, strict=True))
    return all((method, x, seed) in known for x in kept)


def start(method: str, seed: int, kept: Sequence[float]) -> None:
    """Run one method in a process of its own."""
    task = ",".join([method, str(seed), *map(str, kept)])
    command = [sys.executable, __file__, *sys.argv[1:], "--child", task]
    if subprocess.run(command, check=False).returncode:
        print(f"{task}: failed", flush=True)


def run(args: argparse.Namespace, name: str, seed: int) -> None:
    """Search with one method, and write a row for each budget."""
    torch.set_num_threads(args.threads)
    method = METHODS[name]
    memory = Memory()
    started, cpu = time.perf_counter(), time.process_time()
    refine = None
    if method.refine:
        refine = Refinement() if args.steps is None else Refinement(steps=args.steps)
    settings = Settings(
        norm=method.norm,
        calibration=args.calibration,
        validation=args.validation,
        sequential=method.refit,
        refine=refine,
        policy=RankPolicy(operators=("svd",)),
    )
    strategy = method.strategy
    study = rankNAS.search(
        args.model,
        args.text,
        strategy=make_strategy(strategy) if isinstance(strategy, str) else strategy,
        budget=[{"layer_params": kept} for kept in args.kept],
        n_trials=args.trials,
        settings=settings,
        seed=seed,
        on_progress=Progress(),
        on_trial=lambda trial, _: print(
            f"trial {trial.number} ({'probe' if trial.probe else 'trial'}, {trial.budget_key}): "
            f"{trial.metrics.get('perplexity', math.nan):.3f}, {trial.seconds:.0f} s",
            flush=True,
        ),
    )
    test: Any = study.data.test
    windows = [test[i]["input_ids"] for i in range(len(test))]
    if not is_known(args.out, "dense", seed, [1.0]):
        dense = perplexities(study.context.factorisation.model, windows)
        write(args.out, {"method": "dense", "kept": 1.0, "seed": seed, **dense})
    for problem, kept in zip(study.problems, args.kept, strict=True):
        best = study.solution(problem)
        network = study.materialise(best.allocation)
        if args.recover:
            rankNAS.recover(
                network,
                study.splits.training,
                args.recover,
                dense=study.context.factorisation.model,
                task=study.task,
                seed=seed,
                on_step=Progress().step,
            )
        row = {
            "method": named(name, args.recover),
            "kept": kept,
            "seed": seed,
            "validation": round(best.metrics["perplexity"], 3),
            "layer_params": round(
                problem.fractions(problem.indices(best.allocation))["layer_params"], 4
            ),
            "dense_layers": sum(str(choice) == "dense" for choice in best.allocation.values()),
            "evaluations": len(study.trials),
            "cpu_seconds": round(time.process_time() - cpu),
            "seconds": round(time.perf_counter() - started),
            "memory_gb": round(memory.most / 1e9, 2),
            **perplexities(network, windows),
        }
        write(args.out, row)


def perplexities(network: nn.Module, windows: Sequence[torch.Tensor]) -> dict[str, float]:
    """The perplexity on the first and the last windows."""
    return {
        "perplexity": round(perplexity(network, windows[:PART]), 3),
        "perplexity_last": round(perplexity(network, windows[-PART:]), 3),
    }


@torch.no_grad()
def perplexity(network: nn.Module, windows: Sequence[torch.Tensor]) -> float:
    """The exponential of the mean loss of all predicted tokens."""
    model: Any = network
    total, count = 0.0, 0
    for ids in windows:
        hidden = model.base_model(input_ids=ids[None], use_cache=False)[0][0, :-1]
        for part, targets in zip(hidden.split(CHUNK), ids[1:].split(CHUNK), strict=True):
            logits = model.lm_head(part).float()
            total += float(functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
    return math.exp(total / count)


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a row."""
    row["versions"] = f"rankNAS {rankNAS.__version__}, torch {torch.__version__}"
    print(json.dumps(row), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame([row], columns=list(FIELDS))
    frame.to_csv(path, mode="a", header=not path.exists(), index=False)


class Memory:
    """The highest anonymous memory of this process, in bytes, sampled five times a second."""

    def __init__(self) -> None:
        self.most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        path = Path(f"/proc/{os.getpid()}/status")
        while True:
            lines = path.read_text().splitlines()
            found = next(line for line in lines if line.startswith("RssAnon"))
            self.most = max(self.most, int(found.split()[1]) * 1024)
            time.sleep(0.2)


class Progress:
    """Prints each stage as it begins, and every half minute."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if stage != self._stage or now - self._last > 30:
            self._stage, self._last = stage, now
            print(f"{now - self._started:.0f} s: {stage} {done}/{total}", flush=True)

    def step(self, number: int, total: int, loss: float) -> None:
        """Report a step of a training."""
        self(f"training, loss {loss:.1f}", number, total)


if __name__ == "__main__":
    main()
