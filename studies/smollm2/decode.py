"""Tokens a second of language models: prefill, and decoding with a cache at batch 1.

    python studies/smollm2/decode.py hf:FOLDER small.safetensors --threads 2

Each network is ``hf:FOLDER``, a model of transformers, or what `rankNAS.load` takes: a file of a
compressed network, or a folder of ``ranknas export --format hf``. Networks take turns in random
order, so that other work on the machine slows all of them down. The first one is the reference of
the ratios.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="+", help="hf:FOLDER, or a file or folder of RankNAS")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded in each repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    networks = {name: loaded(name, args.device, dtype) for name in args.networks}
    found = speeds(networks, args.prompt, args.new, args.repeats)
    for name in args.networks:
        found[name]["weight_bytes"] = weight_bytes(networks[name])
    print(json.dumps(found))
    print(f"\n{table(found)}")


def loaded(name: str, device: str, dtype: torch.dtype | None) -> nn.Module:
    """The network of an argument, in evaluation mode."""
    import rankNAS
    from rankNAS.search_spaces.zoo.huggingface import named_model

    network = named_model(name) if name.startswith("hf:") else rankNAS.load(Path(name))
    return network.to(device=device, dtype=dtype).eval()


def speeds(
    networks: Mapping[str, nn.Module], prompt: int, new: int, repeats: int, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Tokens a second of each network.

    Args:
        networks: Causal language models of transformers, by name; the first is the reference.
        prompt: The number of random tokens of the prefill, and before the decoded ones.
        new: The number of tokens that are decoded.
        repeats: Timed repeats of each network, after one that warms up.
        seed: The random seed of tokens and order.

    Returns:
        By name and kind of pass (``prefill``, ``decode``): the median of tokens a second, their
        quartiles, and the median ratio to the reference of the same repeat.
    """
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    vocabulary = min(vocabulary_of(network) for network in networks.values())
    tokens = torch.randint(vocabulary, (1, prompt), generator=generator)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for repeat in range(repeats + 1):
        for name in order.sample(list(networks), len(networks)):
            taken = timed(networks[name], tokens, new)
            if repeat:
                seconds[name].append(taken)
    first = next(iter(networks))
    found: dict[str, dict[str, Any]] = {}
    for name, rows in seconds.items():
        found[name] = {}
        for kind, count, at in (("prefill", prompt, 0), ("decode", new, 1)):
            ratios = [own[at] / row[at] for row, own in zip(rows, seconds[first], strict=True)]
            rates = spread([count / row[at] for row in rows])
            found[name][kind] = rates | {"ratio": spread(ratios)["median"]}
    return found


def vocabulary_of(network: Any) -> int:
    return int(network.config.vocab_size)


@torch.no_grad()
def timed(network: nn.Module, tokens: Tensor, new: int) -> tuple[float, float]:
    """Seconds of a prefill of tokens (1, T), and of decoding `new` more, the most likely ones."""
    device = next(network.parameters()).device
    given = dict(with_cache(network), use_cache=True, logits_to_keep=1)
    ids = tokens.to(device)
    started = now(device)
    output = network(input_ids=ids, **given)
    filled = now(device)
    for _ in range(new):
        ids = output.logits.argmax(-1)
        output = network(input_ids=ids, **given)
    return filled - started, now(device) - filled


def with_cache(network: Any) -> dict[str, Any]:
    """An empty cache under the name of the network's argument, which versions call differently."""
    name = "cache" if "cache" in inspect.signature(network.forward).parameters else ""
    return {name or "past_key_values": DynamicCache(config=network.config)}


def now(device: torch.device) -> float:
    """The time in seconds at which the work of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * [values[0]]
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def weight_bytes(network: nn.Module) -> int:
    """The bytes of all parameters; shared ones count once."""
    return sum(parameter.nbytes for parameter in network.parameters())


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Tokens a second with their quartiles, and the ratios to the first network, in Markdown."""
    lines = ["| | bytes | prefill | | decode | |", "|---|---|---|---|---|---|"]
    for name, row in found.items():
        kinds = " | ".join(cell(row[kind]) for kind in ("prefill", "decode"))
        lines.append(f"| {name} | {row.get('weight_bytes', '')} | {kinds} |")
    return "\n".join(lines)


def cell(found: Mapping[str, float]) -> str:
    rates = f"{found['median']:.1f} ({found['low']:.1f} to {found['high']:.1f})"
    return f"{rates} | {found['ratio']:.2f}"


if __name__ == "__main__":
    main()
