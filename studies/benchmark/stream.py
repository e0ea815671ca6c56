"""Memory of a search that streams: a synthetic Llama in bfloat16 shards, made on the spot.

    python studies/benchmark/stream.py --size 50M --norm input

A child process runs the whole search with ``solve``: statistics, factors, tables, allocation,
refit, evaluation and the file of the network. This process samples the child's anonymous memory
(RssAnon of /proc/PID/status).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

#: Width, inner width, blocks, heads, heads of keys, vocabulary.
SIZES = {
    "5M": (128, 352, 8, 4, 2, 4096),
    "50M": (512, 1408, 12, 8, 4, 16384),
    "150M": (768, 2048, 20, 12, 4, 32000),
    "1B": (2048, 5632, 22, 32, 4, 32000),
}
SHARD = 256 << 20  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="50M")
    parser.add_argument("--norm", choices=["input", "fisher"], default="input")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--kept", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ranknas-stream"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    model = args.folder / args.size
    if not model.exists():
        write_model(model, args.size)
    cache = args.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    environment = {**os.environ, "RANKNAS_CACHE": str(cache)}
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    most, disk = watch(process, cache)
    seconds = time.perf_counter() - started
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(
        f"{args.size} {args.norm}: exit {process.returncode}, highest RssAnon "
        f"{most / 1e9:.2f} GB, weights {weights / 1e9:.2f} GB, cache {disk / 1e9:.2f} GB, "
        f"{seconds:.0f} s"
    )


def watch(process: subprocess.Popen[bytes], folder: Path) -> tuple[int, int]:
    """The highest anonymous memory of a process and the most bytes of a folder until it ends."""
    most = disk = 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = next(line for line in text.splitlines() if line.startswith("RssAnon"))
            most = max(most, int(anonymous.split()[1]) * 1024)
        except (OSError, StopIteration):
            pass
        disk = max(disk, sum(size_of(file) for file in folder.rglob("*")))
        time.sleep(0.2)
    return most, disk


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a temporary file
        return 0


def configuration(size: str) -> Any:
    from transformers import LlamaConfig

    width, inner, blocks, heads, keys, vocabulary = SIZES[size]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_cache=False,
    )


def write_model(folder: Path, size: str) -> None:
    """Shards of random weights whose spectra decay, a tensor at a time."""
    folder.mkdir(parents=True)
    skeleton, generator = built(size), torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    number = 0
    for name, tensor in [*skeleton.named_parameters(), (None, None)]:
        full = sum(x.nbytes for x in shard.values()) >= SHARD
        if shard and (name is None or full):
            save_file(shard, folder / f"part-{number}.safetensors")
            shard, number = {}, number + 1
        if name is None or tensor is None:
            continue
        if tensor.dim() == 1:
            shard[name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
            continue
        rows, columns = tensor.shape
        weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
        weight *= torch.arange(1, columns + 1) ** -0.25  # inputs of unequal use
        shard[name] = weight.to(torch.bfloat16)


def built(size: str) -> nn.Module:
    """The model without weights."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(configuration(size))
    return model


def mapped_model(folder: Path, size: str) -> nn.Module:
    """The model with parameters in mapped files."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model: Any = built(size)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                parent, _, child = name.rpartition(".")
                parameter = nn.Parameter(file.get_tensor(name), requires_grad=False)
                setattr(model.get_submodule(parent), child, parameter)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(configuration(size))
    found: nn.Module = model.eval()
    return found


def child(args: argparse.Namespace) -> None:
    import rankNAS
    from rankNAS.models.artifact import save
    from rankNAS.search_spaces.policies import RankPolicy
    from rankNAS.settings import Settings

    torch.set_num_threads(args.threads)
    model = mapped_model(args.folder / args.size, args.size)
    generator = torch.Generator().manual_seed(1)
    vocabulary = SIZES[args.size][-1]

    def windows(count: int) -> list[dict[str, torch.Tensor]]:
        ids = (torch.rand(count, args.length, generator=generator) ** 4 * vocabulary).long()
        return [{"input_ids": x} for x in ids]

    phases: dict[str, float] = {}
    last = [("prepare", time.perf_counter())]

    def on_progress(stage: str, done: int, total: int) -> None:
        name, since = last[0]
        if stage != name:
            phases[name] = phases.get(name, 0.0) + time.perf_counter() - since
            last[0] = stage, time.perf_counter()

    started = time.perf_counter()
    study = rankNAS.search(
        model,
        (windows(10 * args.windows), windows(2)),
        task="causal_lm",
        strategy="solve",
        budget={"layer_params": args.kept},
        n_trials=3,
        settings=Settings(
            norm=args.norm,
            calibration=args.windows,
            validation=4,
            memory=1 << 20,
            policy=RankPolicy(operators=("svd",)),
        ),
        on_progress=on_progress,
    )
    searched = time.perf_counter() - started
    network = study.materialise()
    refitted = time.perf_counter() - started - searched
    path = save(network, study.best.allocation, args.folder / "cache" / "network.safetensors")
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "search": round(searched, 1),
        "refit, network and checks": round(refitted, 1),
        "wall": {name: round(value, 1) for name, value in phases.items()},
        "cpu": {name: round(value, 1) for name, value in study.cpu_seconds.items()},
        "artifact": path.stat().st_size,
        "trials": [trial.metrics.get("perplexity") for trial in study.trials],
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
