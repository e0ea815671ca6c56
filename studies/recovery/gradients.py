"""Compressed gradients: traffic and accuracy beside plain all-reduce and PyTorch's PowerSGD.

    python studies/recovery/gradients.py [--processes 2] [--seeds 3] [--out result.csv]

A perceptron learns scikit-learn's digits in DistributedDataParallel with gloo. Traffic is the
bytes that a process gives to `all_reduce`, counted there for all methods alike.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from rankNAS.recovery.greedylore import GreedyLore, greedylore_hook

TEST = 360  # samples
START = 10  # first steps without compression, for both methods


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64, help="samples of all processes together")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--period", type=int, default=100, help="steps between two refreshes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (args, folder), args.processes)
        table = pd.read_csv(Path(folder) / "result.csv")
    if args.out is not None:
        table.to_csv(args.out, index=False)
    print(summary(table))


def work(rank: int, args: argparse.Namespace, folder: str) -> None:
    """A process; the first one writes the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=args.processes)
    found = []
    for seed in range(args.seeds):
        for method, size in [("all-reduce", 0), *((m, r) for m in HOOKS for r in args.ranks)]:
            found.append({"method": method, "rank": size, "seed": seed})
            found[-1] |= trained(rank, method, size, seed, args)
            if not rank:
                print(found[-1], flush=True)
    if not rank:
        pd.DataFrame(found).to_csv(Path(folder) / "result.csv", index=False)
    dist.destroy_process_group()


def powersgd(ddp: DistributedDataParallel, rank: int, args: argparse.Namespace) -> None:
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=rank, start_powerSGD_iter=START
    )
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def greedylore(ddp: DistributedDataParallel, rank: int, args: argparse.Namespace) -> None:
    # PowerSGD compresses the last layer, too.
    state = GreedyLore(ddp, rank, period=args.period, start=START, skip=())
    ddp.register_comm_hook(state, greedylore_hook)


HOOKS = {"PowerSGD": powersgd, "GreedyLore": greedylore}


def trained(
    rank: int, method: str, size: int, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Traffic, accuracy and time of a training."""
    x, y, order = digits(seed)
    torch.manual_seed(seed)
    width = args.width
    network = nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    )
    ddp = DistributedDataParallel(network)
    if method in HOOKS:
        HOOKS[method](ddp, size, args)
    else:
        ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, nesterov=True)
    train = order[TEST:]
    generator = torch.Generator().manual_seed(seed)
    steps, started = 0, time.perf_counter()
    with counted() as sent:
        for _ in range(args.epochs):
            mixed = train[torch.randperm(len(train), generator=generator)]
            for batch in mixed[: len(mixed) // args.batch * args.batch].split(args.batch):
                own = batch[rank :: args.processes]
                optimizer.zero_grad()
                nn.functional.cross_entropy(ddp(x[own]), y[own]).backward()
                optimizer.step()
                steps += 1
    seconds = time.perf_counter() - started
    with torch.no_grad():
        right = network(x[order[:TEST]]).argmax(1) == y[order[:TEST]]
        loss = nn.functional.cross_entropy(network(x[train]), y[train])
    return {
        "bytes": sent[0] / steps,
        "accuracy": 100 * float(right.float().mean()),
        "loss": float(loss),
        "ms": 1000 * seconds / steps,
        "equal": equal(network),
    }


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised images, classes, and an order of the samples."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return (x - x.mean()) / x.std(), torch.tensor(data.target), order


@contextmanager
def counted() -> Iterator[list[int]]:
    """Context in which the bytes given to `all_reduce` are counted."""
    original, found = dist.all_reduce, [0]

    def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        found[0] += tensor.nbytes
        return original(tensor, *arguments, **options)

    dist.all_reduce = all_reduce
    try:
        yield found
    finally:
        dist.all_reduce = original


def equal(network: nn.Module) -> bool:
    """Whether all processes have the parameters of the first one, to the bit."""
    own = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    first = own.clone()
    dist.broadcast(first, 0)
    differs = torch.tensor([float(not torch.equal(own, first))])
    dist.all_reduce(differs)
    return not differs.any()


def summary(table: pd.DataFrame) -> str:
    """By method and rank, the means over seeds, in Markdown."""
    whole = table[table.method == "all-reduce"].bytes.mean()
    lines = [
        f"{table.seed.nunique()} seeds; parameters equal to the bit in all runs: "
        f"{bool(table.equal.all())}",
        "| method | rank | KB a step | of all-reduce | accuracy | training loss | ms a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, rank), own in table.groupby(["method", "rank"], sort=False):
        lines.append(
            f"| {method} | {rank or ''} | {own.bytes.mean() / 1000:.1f} | "
            f"{own.bytes.mean() / whole:.3f} | {own.accuracy.mean():.2f} ± "
            f"{own.accuracy.std():.2f} | {own.loss.mean():.4f} | {own.ms.mean():.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
