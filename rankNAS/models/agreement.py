"""Whether two networks compute the same function: outputs on fixed inputs, within rounding.

Two functions that rounding cannot tell apart may still have modules of other classes or settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.copies import evaluating
from rankNAS.io.fingerprints import fingerprint
from rankNAS.trees import Inputs, device_of, floating_tensors, named_tensors, to_device

__all__ = ["Modules", "Sketches", "fixed_pass", "relative_difference", "tolerance", "watched"]

ROUNDING = 4.0  # tolerance in units of the square root of the machine epsilon
TENSOR_CORES = 2.0**-10  # epsilon of the products of a GPU, which may round float32 to TF32
VALUES = 32  # of a tensor that a sketch keeps
CHUNK = 1 << 22  # values that are widened at a time


@torch.no_grad()
def fixed_pass(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The floating-point tensors of a network's output by place.

    The network is in evaluation mode during the pass and ends as it was. Random numbers that it
    draws are the same in every pass.

    Args:
        network: The network.
        inputs: Its arguments; they are moved to its device and stay unchanged.
    """
    device = device_of(network)
    given = to_device(inputs, device).copied()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(network):
        torch.manual_seed(0)
        output = given.run(network)
    return {name: x for name, x in named_tensors(output) if x.is_floating_point()}


@contextmanager
def watched(network: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Context in which a function receives the path and the first output of each module's call.

    Calls are seen in the order in which they end, inner modules first.
    """
    handles = []
    for name, module in network.named_modules():

        def hook(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            found = floating_tensors(output)
            if found:
                see(name, found[0])

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tolerance(network: nn.Module, outputs: Mapping[str, Tensor]) -> float:
    """The largest relative difference that rounding explains, for a network's lowest precision."""
    found = [*network.parameters(), *network.buffers(), *outputs.values()]
    floats = [x for x in found if x.is_floating_point() and x.element_size() > 1]
    eps = [torch.finfo(x.dtype).eps for x in floats]  # float8 is for storage
    if any(x.device.type != "cpu" and x.dtype != torch.float64 for x in found):
        eps.append(TENSOR_CORES)
    return ROUNDING * math.sqrt(max(eps, default=torch.finfo(torch.float32).eps))


@torch.no_grad()
def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference of two tensors, relative to that of the second.

    Values that are infinite or NaN in one tensor alone count by their share.
    """
    if found.shape != expected.shape:
        return math.inf
    if not found.numel():
        return 0.0
    unlike, difference, size = 0, 0.0, 0.0
    pairs = zip(found.reshape(-1).split(CHUNK), expected.reshape(-1).split(CHUNK), strict=True)
    for a, b in ((x.double(), y.double().to(x.device)) for x, y in pairs):
        finite = a.isfinite() & b.isfinite()
        unlike += int((~(finite | (a == b) | (a.isnan() & b.isnan()))).sum())
        difference += float((a - b)[finite].square().sum())
        size += float(b[finite].square().sum())
    return max(unlike / found.numel(), _ratio(math.sqrt(difference), math.sqrt(size)))


def _ratio(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size else math.inf


@dataclass(frozen=True)
class Sketches:
    """A few values of each of several tensors, for a comparison with those of another machine.

    Args:
        entries: By name, the ``shape``, the ``norm`` and some ``values`` of a tensor.
        rounding: The relative difference up to which tensors agree.

    Example:
        >>> sketches = Sketches.of({"y": torch.tensor([1.0, 2.0])}, 1e-3)
        >>> sketches.agree(Sketches.of({"y": torch.tensor([1.0, 2.0001])}, 1e-3).to_json())
        True
        >>> sketches.agree(Sketches.of({"y": torch.tensor([1.0, 2.1])}, 1e-3).to_json())
        False
    """

    entries: Mapping[str, Mapping[str, Any]]
    rounding: float

    @classmethod
    def of(cls, given: Mapping[str, Tensor], rounding: float) -> Sketches:
        """The sketches of tensors by name."""
        return cls({name: _sketch(tensor) for name, tensor in given.items()}, rounding)

    def to_json(self) -> dict[str, Any]:
        """The sketches as JSON values."""
        return {name: dict(entry) for name, entry in self.entries.items()}

    def agree(self, stored: Any) -> bool:
        """Whether the tensors agree with those behind an earlier `to_json`.

        Raises:
            ValueError: The content is something else.
        """
        try:
            return self.entries.keys() == stored.keys() and all(
                self._alike(entry, stored[name]) for name, entry in self.entries.items()
            )
        except (AttributeError, KeyError, TypeError, IndexError, OverflowError) as error:
            raise ValueError(f"a sketch of outputs is damaged: {error!r}") from None

    def _alike(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        if list(a["shape"]) != list(b["shape"]) or len(a["values"]) != len(b["values"]):
            return False
        size, given = max(1, math.prod(a["shape"])), float(b["norm"])
        pairs = [(float(x), float(y)) for x, y in zip(a["values"], b["values"], strict=True)]
        finite = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
        if any(repr(x) != repr(y) for x, y in pairs if (x, y) not in finite):
            return False
        if not math.isfinite(given) or not math.isfinite(a["norm"]):
            return repr(float(a["norm"])) == repr(given)
        # The values may be small by chance, compared with the others.
        usual = given * math.sqrt(len(pairs) / size)
        far = math.dist([x for x, _ in finite], [y for _, y in finite])
        own = max(usual, math.hypot(*(y for _, y in finite)))
        return far <= self.rounding * own and abs(a["norm"] - given) <= self.rounding * given


@dataclass(frozen=True)
class Modules:
    """The classes and settings of a model's modules.

    Args:
        places: By class and settings in words, a key of the paths of such modules.

    Example:
        >>> modules = Modules.of(nn.Sequential(nn.GELU(), nn.ReLU()))
        >>> list(modules.places)
        ['Sequential()', "GELU(approximate='none')", 'ReLU()']
        >>> Modules.of(nn.Sequential(nn.GELU("tanh"), nn.ReLU())).difference(modules.places)
        "GELU(approximate='tanh') instead of GELU(approximate='none')"
    """

    places: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Modules:
        """Those of a model."""
        paths: dict[str, list[str]] = {}
        for path, module in model.named_modules():
            words = f"{type(module).__name__}({_settings(module)})"
            paths.setdefault(words, []).append(path)
        return cls({words: fingerprint({}, "\n".join(p))[:8] for words, p in paths.items()})

    def difference(self, stored: Mapping[str, str]) -> str:
        """What differs from an earlier `places`, in words; empty if nothing does."""
        now, before = (
            [words for words, key in a.items() if b.get(words) != key]
            for a, b in ((self.places, stored), (stored, self.places))
        )
        pair = (now or ["nothing"])[0], (before or ["nothing"])[0]
        if pair[0] == pair[1]:
            return "" if pair[0] == "nothing" else f"{pair[0]} at other places"
        return f"{pair[0]} instead of {pair[1]}"


def _settings(module: nn.Module) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(module.extra_repr().split()))


def _sketch(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.detach().flatten()
    last = max(0, len(flat) - 1)
    places = torch.linspace(0, last, min(len(flat), VALUES)).long()
    values = flat[places.clamp(max=last).to(flat.device)].double()  # float32 may round up
    return {
        "shape": list(tensor.shape),
        "norm": float(f"{_norm(flat):.9g}"),
        "values": [float(f"{value:.9g}") for value in values.tolist()],
    }


def _norm(flat: Tensor) -> float:
    """The norm of the finite values, in double precision and little memory."""
    squares = 0.0
    for part in flat.split(CHUNK):
        wide = part.double()
        squares += float(wide[wide.isfinite()].square().sum())
    return math.sqrt(squares)
