"""One network from model to file and back; a row of the table, whatever happens."""

from __future__ import annotations

import json
import re
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from chosen import CLASSES, Network, network
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.trees import named_tensors

__all__ = ["attempt", "main"]

MEMORY = 20 << 30  # bytes
BUDGET = 0.6
SAMPLES = 16
SEED = 0
WIDEST = 1024  # smaller side of a matrix; a decomposition takes its cube
POLICY = rankNAS.RankPolicy(candidates=32, operators=("svd",))
# Random weights have no curvature worth a backward pass, so truncations are those of the weights.
SETTINGS = rankNAS.Settings(
    norm="weight", sequential=False, calibration=4, validation=4, choices=16, policy=POLICY
)


def attempt(entry: str, row: dict[str, Any], compile_only: bool) -> None:
    """Compile, search, build, save and load one network; fills in a row of the table."""
    row["stage"] = "choose"
    found = network(entry)
    row |= {"network": found.name, "input": "x".join(map(str, found.shape))}
    row["stage"] = "build the model"
    model = _random(found, SEED)
    row["params"] = sum(parameter.numel() for parameter in model.parameters())
    row["stage"] = "compile"
    with _timed(row, "compile_s"):
        space = rankNAS.compile_space(model, torch.zeros(1, *found.shape), policy=POLICY)
    row |= _coverage(space)
    searched = _narrow(space)
    row["searched"] = len(searched.layers)
    if compile_only:
        return
    row["stage"] = "search"
    with _timed(row, "search_s"):
        study = rankNAS.search(
            model,
            _data(model, found),
            budget={"macs": _budget(searched)},
            strategy="solve",
            n_trials=2,
            seed=SEED,
            settings=SETTINGS,
            space=searched,
        )
        row["stage"] = "materialise"
        small = study.materialise()
    row["macs_kept"] = round(study.best.metrics["macs"] / study.dense["macs"], 4)
    row["stage"] = "save"
    with _timed(row, "save_load_s"), tempfile.TemporaryDirectory() as folder:
        file = study.save(Path(folder) / "small.safetensors", network=small)
        row["stage"] = "load"
        again = rankNAS.load(file, lambda: _random(found, SEED + 1))
    row["stage"] = "compare"
    row["difference"] = f"{_difference(small, again, found):.1e}"


def _random(found: Network, seed: int) -> nn.Module:
    """The network with random weights; vectors are noisy, so that no branch begins at zero."""
    torch.manual_seed(seed)
    model = found.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def _images(found: Network, count: int) -> Tensor:
    """Smooth random images or clips: noise of several scales."""
    rough = torch.randn(count, *found.shape)
    flat = rough.reshape(count, -1, *found.shape[-2:])
    coarse = nn.functional.avg_pool2d(flat, 8)
    smooth = nn.functional.interpolate(coarse, size=found.shape[-2:])
    return (0.5 * flat + 4 * smooth).reshape(rough.shape)


def _data(model: nn.Module, found: Network) -> TensorDataset:
    """Images with random labels, if the network returns logits of classes."""
    generator = torch.manual_seed(SEED)
    images = _images(found, SAMPLES)
    with torch.no_grad():
        output = model(images[:2])
    if isinstance(output, Tensor) and output.dim() == 2:
        labels = torch.randint(min(CLASSES, output.shape[1]), (SAMPLES,), generator=generator)
        return TensorDataset(images, labels)
    if isinstance(output, dict) and "out" in output:
        return TensorDataset(
            images, torch.randint(CLASSES, (SAMPLES, *found.shape[1:]), generator=generator)
        )
    return TensorDataset(images)


def _coverage(space: rankNAS.SearchSpace) -> dict[str, Any]:
    """The shares of the layers that are taken, and the reasons for the rest with theirs."""
    shares = space.shares
    why: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for skipped in space.skipped:
        reason = re.sub(r"'[^']*' \((\w+)\)", r"a \1", skipped.reason)  # whatever its path
        why[reason].append(shares[skipped.name])
    parts = {
        r: [sum(s[of] for s in found) for of in ("macs", "params")] for r, found in why.items()
    }
    order = sorted(why, key=lambda r: -sum(parts[r]))
    texts = [
        f"{reason} x {len(why[reason])} ({parts[reason][0]:.1%} of MACs, {parts[reason][1]:.1%} of"
        " parameters)"
        for reason in order
        if max(parts[reason]) >= 0.0005
    ]
    return {
        "layers": len(space.layers),
        "macs_covered": round(sum(shares[n]["macs"] for n in space.layers), 4),
        "params_covered": round(sum(shares[n]["params"] for n in space.layers), 4),
        "dense": "; ".join(texts),
    }


def _narrow(space: rankNAS.SearchSpace) -> rankNAS.SearchSpace:
    """The space without layers whose smaller side is beyond `WIDEST`; they stay dense."""
    layers = {
        name: layer
        for name, layer in space.layers.items()
        if min(layer.shape.width, layer.shape.outputs // layer.shape.groups) <= WIDEST
    }
    dense = [layer.costs[0] for name, layer in space.layers.items() if name not in layers]
    return replace(space, layers=layers, remainder_cost=sum(dense, space.remainder_cost))


def _budget(space: rankNAS.SearchSpace) -> float:
    """The share of all MACs that is left if the layers keep `BUDGET` of theirs."""
    whole, rest = space.dense_cost.macs, space.remainder_cost.macs
    return (rest + BUDGET * (whole - rest)) / whole


@torch.no_grad()
def _difference(small: nn.Module, again: nn.Module, found: Network) -> float:
    """The largest difference of the outputs, over the largest output."""
    torch.manual_seed(SEED + 2)
    images = _images(found, 2)
    own, loaded = (dict(named_tensors(net.eval()(images))) for net in (small, again))
    if own.keys() != loaded.keys():
        return float("nan")
    return max(
        ((own[n] - loaded[n]).abs().max() / own[n].abs().max().clamp_min(1e-30)).item()
        for n in own
    )


@contextmanager
def _timed(row: dict[str, Any], column: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    row[column] = round(time.perf_counter() - started, 2)


def main(entry: str, out: Path, seconds: float, compile_only: bool) -> None:
    """Write the row of one network as JSON, after `seconds` at the latest."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"entry": entry}
    try:
        attempt(entry, row, compile_only)
        row["outcome"] = "works" if row.pop("stage") == "compare" else "compiled"
    except rankNAS.UsageError as error:
        early = row["stage"] in ("compile", "search") and "\n" not in str(error)
        row["outcome"] = "refused" if early else "failed"
        row["message"] = f"{row.pop('stage')}: {error}"
    except _Late as error:
        row["outcome"] = "failed"
        row["message"] = f"{row.pop('stage')}: {error}"
    except BaseException as error:
        traceback.print_exc()
        row["outcome"] = "failed"
        row["message"] = f"{row.pop('stage')}: {type(error).__name__}: {str(error)[:500]}"
    out.write_text(json.dumps(row))


class _Late(BaseException):  # no error that the package may report in its own words
    pass


def _late(signum: int, frame: object) -> None:
    raise _Late("not ready in time")
