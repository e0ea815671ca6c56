"""A search with ``auto`` and the speed of its answer on a GPU: a synthetic Llama, generated data.

    python studies/benchmark/gpu.py                         # 1 billion parameters, bfloat16
    python studies/benchmark/gpu.py --device cpu --size 5M  # the same code without a GPU

It prints one line of JSON: seconds and the highest GPU memory of each stage of the search, tokens
a second of prefill and decoding, dense against compressed. `strategy` is what follows the factors:
losses, screening, allocations, refitting. The search has a time limit, after which it answers with
what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from stream import SIZES, configuration
from torch import nn

DECODE = Path(__file__).parents[1] / "smollm2" / "decode.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--size", choices=SIZES, default="1B" if cuda else "5M")
    parser.add_argument("--kept", type=float, default=0.8, help="of the layers' parameters")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--norm", choices=["input", "fisher"], default="input")
    parser.add_argument("--windows", type=int, default=32, help="of calibration")
    parser.add_argument("--length", type=int, default=512, help="of a window, and of a prefill")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded in each repeat")
    parser.add_argument("--seconds", type=float, default=300.0, help="limit of the search")
    parser.add_argument("--threads", type=int, help="of the CPU")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["RANKNAS_CACHE"] = cache
        found = measured(args)
    print(json.dumps(found | {"total_seconds": round(time.perf_counter() - started, 1)}))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """What the command prints."""
    from rankNAS.plugins import load_callable

    device = torch.device(args.device)
    model = synthetic(args.size, device)
    stages = Stages(device)
    study = searched(model, stages, args)
    network = study.materialise().to(device)
    stages.begin("speed")
    networks = {"dense": model, "compressed": network}
    speeds = load_callable(f"{DECODE}:speeds")(networks, args.length, args.new, 5)
    stages.begin("")
    space = study.evaluator.factorisation.space
    kept, whole = (space.costs(a)["layer_params"] for a in (study.best.allocation, space.dense))
    return {
        "device": torch.cuda.get_device_name(device) if stages.cuda else platform.machine(),
        "torch": torch.__version__,
        "size": args.size,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "strategy": args.strategy,
        "norm": args.norm,
        "tokens": args.windows * args.length,
        "kept": round(kept / whole, 4),
        "notes": [*filter(None, [study.limit_note])],
        "seconds": stages.seconds,
        "cpu_seconds": {name: round(seconds, 2) for name, seconds in study.cpu_seconds.items()},
        "gpu_gb": stages.memory,
        "weight_bytes": {n: sum(p.nbytes for p in x.parameters()) for n, x in networks.items()},
        "tokens_a_second": speeds,
    }


class Stages:
    """Seconds and the highest GPU memory in GB by stage, in the order of their first steps.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}
        self._name, self._since = "prepare", time.perf_counter()

    def report(self, stage: str, done: int, total: int) -> None:
        """Take the progress of a search; what follows the last factor is the strategy's work."""
        self.begin("strategy" if stage == "factorise" and done == total else stage)

    def begin(self, name: str) -> None:
        """End the stage that is on, and begin another one; nothing if it is the same."""
        if name == self._name:
            return
        if self.cuda:
            torch.cuda.synchronize(self.device)
            most = torch.cuda.max_memory_allocated(self.device) / 1e9
            self.memory[self._name] = round(max(most, self.memory.get(self._name, 0.0)), 2)
            torch.cuda.reset_peak_memory_stats(self.device)
        now = time.perf_counter()
        spent = self.seconds.get(self._name, 0.0) + now - self._since
        self.seconds[self._name] = round(spent, 2)
        self._name, self._since = name, now


@torch.no_grad()
def synthetic(size: str, device: torch.device) -> nn.Module:
    """A Llama of random weights whose inputs are of unequal use; bfloat16 on a GPU."""
    from transformers import LlamaForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(configuration(size)).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            columns = parameter.shape[1]
            parameter.normal_(0, columns**-0.5)
            parameter.mul_(torch.arange(1, columns + 1, device=device) ** -0.25)
    found: nn.Module = model.eval()
    return found


def searched(model: nn.Module, stages: Stages, args: argparse.Namespace) -> Any:
    """The study of a search on random tokens."""
    import rankNAS
    from rankNAS.search_spaces.policies import RankPolicy

    generator = torch.Generator().manual_seed(1)
    vocabulary = SIZES[args.size][-1]

    def windows(count: int) -> list[dict[str, torch.Tensor]]:
        ids = (torch.rand(count, args.length, generator=generator) ** 4 * vocabulary).long()
        return [{"input_ids": x} for x in ids]

    return rankNAS.search(
        model,
        (windows(args.windows + 16), windows(2)),
        task="causal_lm",
        strategy=args.strategy,
        budget={"layer_params": args.kept},
        settings=rankNAS.Settings(
            norm=args.norm,
            calibration=args.windows,
            validation=16,
            screening=8,
            policy=RankPolicy(operators=("svd",)),
        ),
        device=args.device,
        time_limit=args.seconds,
        on_progress=stages.report,
    )


if __name__ == "__main__":
    main()
