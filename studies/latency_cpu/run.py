"""ResNet-18 at 224 x 224 on this CPU: half the latency, and half the multiply-adds.

    python studies/latency_cpu/run.py --out FOLDER [--batch 1] [--threads 2] [--fraction 0.5]

1. A ResNet-18 is trained on the embedded digits, first at 32 x 32, then for an epoch at 224 x 224,
   and kept in FOLDER/resnet18.safetensors.
2. Its layers are profiled on this machine (FOLDER/board-BATCH.json, as by `ranknas profile`).
3. `solve` finds the allocation of the least error at the given fraction of the latency, and the
   one at that fraction of the MACs.
4. Both are timed end to end, in turns with the dense network: FOLDER/result-BATCH.csv and .md.

An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankNAS
from rankNAS.hw_models import Host, compile_latency, validate
from rankNAS.io.files import save_atomically
from rankNAS.recovery import TrainingConfig, default_config, train
from rankNAS.search_spaces.zoo import build_model

SIDE = 224
SHAPE = (3, SIDE, SIDE)
SETTINGS = {"calibration": 64, "validation": 128, "batch_size": 32}


def trained(path: Path) -> nn.Module:
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10, input_shape=SHAPE)
    if not path.exists():
        small = rankNAS.load_data("digits")
        space = rankNAS.compile_space(model, torch.zeros(1, *small.input_shape))
        images = len(small.train)  # type: ignore[arg-type]
        train(model, small.train, default_config(space.dense_cost.macs, images))
        large = rankNAS.load_data("digits", image_size=SIDE)
        train(model, large.train, TrainingConfig(1, batch_size=32, learning_rate=0.005))
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_atomically(path, lambda temporary: save_file(state, temporary))
    model.load_state_dict(load_file(path))
    return model.eval()


def main(out: Path, batch: int, threads: int, fraction: float, seconds: float) -> None:
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    model = trained(out / "resnet18.safetensors")
    data = rankNAS.load_data("digits", image_size=SIDE)
    host = Host(file=out / f"board-{batch}.json")
    settings = rankNAS.Settings(**SETTINGS, latency_batch=batch)
    studies = {
        f"{cost} at {fraction:g}": rankNAS.search(
            model,
            data,
            budget={cost: fraction},
            strategy="solve",
            n_trials=1,
            hardware=host,
            settings=settings,
        )
        for cost in ("latency", "macs")
    }
    space = rankNAS.compile_space(model, torch.zeros(1, *SHAPE)).at_batch(batch)
    inputs = torch.randn(1, *SHAPE)
    tables = compile_latency(host.bind(model, space, inputs), space)
    allocations = {name: study.best.allocation for name, study in studies.items()}
    times = validate(
        tables, model, inputs, allocations, batch=batch, precision=0.01, seconds=seconds
    )
    rows = [row(name, study, times, fraction) for name, study in studies.items()]
    result = pd.DataFrame(rows)
    save_atomically(out / f"result-{batch}.csv", lambda path: result.to_csv(path, index=False))
    noise = abs(times.measured[1] / times.measured[0] - 1)
    lines = [
        "| found by | MACs kept | latency kept, predicted | measured | 95 % interval | faster by "
        "| relative error | test accuracy |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {r['name']} | {r['macs']:.3f} | {r['predicted']:.3f} | {r['measured']:.3f} "
        f"| ± {r['interval']:.3f} | {1 / r['measured']:.2f} | {r['error']:.4f} "
        f"| {r['test_accuracy']:.4f} |"
        for r in rows
    ]
    lines += [
        "",
        f"Batch size {batch}, {threads} threads; the dense network takes "
        f"{1e3 * times.measured[:2].mean():.1f} ms, two copies differ by {100 * noise:.2f} %.",
    ]
    text = "\n".join(lines) + "\n"
    save_atomically(out / f"result-{batch}.md", lambda path: path.write_text(text))
    print(text)


def row(name: str, study: rankNAS.Study, times: pd.DataFrame, fraction: float) -> dict[str, Any]:
    dense = times[times.name == "dense"].mean(numeric_only=True)
    own = times[times.name == name].iloc[0]
    problem, best = study.problem, study.best
    chosen = problem.indices(best.allocation)
    errors = [e[i] for e, i in zip(problem.errors, chosen, strict=True)]
    return {
        "name": name,
        "macs": best.metrics["macs"] / study.dense["macs"],
        "predicted": own.predicted / dense.predicted,
        "measured": own.measured / dense.measured,
        "interval": 1.96 * own.deviation / dense.measured,
        "rounds": own.rounds,
        "error": float(sum(errors)),
        "test_accuracy": study.test()["accuracy"],
        **{f"layer:{layer}": label for layer, label in best.allocation.labels().items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=300.0, help="most time for the timing")
    given = parser.parse_args()
    main(given.out, given.batch, given.threads, given.fraction, given.seconds)
