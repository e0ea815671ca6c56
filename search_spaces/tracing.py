"""One forward pass of a model: the calls of its layers, and the operations of each module.

PyTorch's FLOP counter counts operations; modules whose operations it does not know (recurrent and
bilinear ones) are counted from their sizes. The pass leaves the model as it was.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from rankNAS.copies import evaluating
from rankNAS.decompositions.shapes import is_hf_conv1d
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.experts import balanced_routing
from rankNAS.trees import Inputs, is_batched, sample_count, tensors, type_difference

__all__ = ["Trace", "in_words", "is_decomposable", "shape_of", "trace"]


@dataclass(frozen=True)
class Trace:
    """What one forward pass of a model does.

    Args:
        calls: Input sizes of each call by layer name, in the order of first calls.
        macs: Multiply-accumulates by path of a module: those of its own operations, without the
            modules inside it.
        readers: By path of a module, another module, in words, that multiplies by its weight.
            These products count as those of the weight's module.
        sites: By layer name, the first of the layers in a row that receive the same tensor.
    """

    calls: dict[str, list[tuple[int, ...]]]
    macs: dict[str, int]
    readers: dict[str, str]
    sites: dict[str, str]

    @property
    def total(self) -> int:
        """Multiply-accumulates of the whole pass."""
        return sum(self.macs.values())


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """A forward pass in evaluation mode, counted.

    Raises:
        UsageError: The model does not run on the inputs.

    Every expert of a mixture counts with an equal share of the tokens.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    recorder = _Recorder(model, counter)
    try:
        # Under no_grad, some modules (and attention on CPUs) use fused kernels that the counter
        # does not support.
        with (
            evaluating(model),
            recorder.attached(),
            torch.enable_grad(),
            saved_tensors_hooks(_dropped, _dropped),  # no backward pass follows
            sdpa_kernel(SDPBackend.MATH),
            balanced_routing(),
            counter,
            recorder,
        ):
            Inputs.of(example_inputs).copied().run(model)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} does not run on the example inputs "
            f"{shape_of(example_inputs)}: {type_difference(model, Inputs.of(example_inputs))}"
            f"{type(error).__name__}: {error}"
        ) from error
    return recorder.found()


def _dropped(tensor: Any) -> Any:
    """Nothing, in place of what a backward pass would need."""
    return None


def in_words(path: str, module: nn.Module) -> str:
    """A module in a reason: its path and its class."""
    kind = type(module).__name__
    return f"{path!r} ({kind})" if path else f"the model ({kind})"


def is_decomposable(module: nn.Module) -> bool:
    """Whether a module is of a kind that operators decompose."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or is_hf_conv1d(module)


def shape_of(example_inputs: Any) -> tuple[int, ...]:
    """The shape of the first input tensor with one sample along axis 0; () without any."""
    inputs = Inputs.of(example_inputs)
    count = sample_count(inputs)
    return next((tuple(x.shape) for x in tensors(inputs) if is_batched(x, count)), ())


class _Recorder(TorchFunctionMode):
    """Attributes calls and counted operations to the innermost running module.

    A function that multiplies by the weight of another module counts for that module.
    """

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter = counter
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        }
        self._running = [""]
        self._counted = 0
        self._flops: defaultdict[str, int] = defaultdict(int)
        self._known: defaultdict[str, int] = defaultdict(int)
        self._calls: dict[str, list[tuple[int, ...]]] = {}
        self._readers: dict[str, str] = {}
        self._sites: dict[str, str] = {}
        self._last: tuple[str, Any] = ("", None)  # a layer and its input
        self._owners: defaultdict[int, list[str]] = defaultdict(list)  # of each weight
        for name, module in self._modules.items():
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dim() > 1:
                    self._owners[id(parameter)].append(name)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        weights = {id(x if x._base is None else x._base) for x in given if isinstance(x, Tensor)}
        owners = [self._owners[weight] for weight in weights if weight in self._owners]
        reader = self._running[-1]
        # Products of several weights, as in fused attention, stay those of the running module.
        if len(owners) != 1 or reader in owners[0]:
            return func(*args, **(kwargs or {}))
        self._assign()
        result, owner = func(*args, **(kwargs or {})), owners[0][0]
        if self._assign(owner):
            self._readers.setdefault(owner, in_words(reader, self._modules[reader]))
        return result

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        for name, module in self._modules.items():
            enter, leave = self._hooks(name)
            handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self) -> Trace:
        self._assign()
        macs = {name: flops // 2 for name, flops in self._flops.items()}
        macs = {name: count for name, count in (macs | self._known).items() if count}
        self._last = "", None
        return Trace(self._calls, macs, self._readers, self._sites)

    def _hooks(self, name: str) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._assign()
            self._running.append(name)
            given = (*args, *kwargs.values())
            if is_decomposable(module):
                calls = self._calls.setdefault(name, [])
                if isinstance(given[0], Tensor):  # anything else is for a forward of its own
                    calls.append(_call(module, given[0]))
                    if given[0] is not self._last[1]:
                        self._last = self._sites.get(name, name), given[0]
                    self._sites.setdefault(name, self._last[0])
            elif (macs := _macs(module, given)) is not None:
                self._known[name] += macs

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._assign()
            while self._running.pop() != name:
                pass

        return enter, leave

    def _assign(self, name: str | None = None) -> int:
        """Assign the operations since the last call; their FLOPs.

        Args:
            name: The module that they belong to; the one that was running if None.
        """
        total = self._counter.get_total_flops()
        flops, self._counted = total - self._counted, total
        self._flops[self._running[-1] if name is None else name] += flops
        return flops


def _call(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Input size of a call, in the format of `LayerShape.calls`."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return (x.numel() // x.shape[-1],)
    spatial = len(module.kernel_size)
    return (x.shape[0] if x.dim() == spatial + 2 else 1, *x.shape[-spatial:])


def _macs(module: nn.Module, given: tuple[Any, ...]) -> int | None:
    """Multiply-accumulates of a recurrent or bilinear module, whose kernels are not counted.

    Every weight matrix of a recurrent module multiplies one vector a time step and sequence.
    """
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        x: Tensor = given[0].data if isinstance(given[0], PackedSequence) else given[0]
        positions: int = x.numel() // x.shape[-1]
        return positions * sum(p.numel() for p in module.parameters() if p.dim() == 2)
    if isinstance(module, nn.Bilinear):
        return int(math.prod(given[0].shape[:-1])) * module.weight.numel()
    return None


def _formulas() -> dict[Any, Any]:
    """FLOPs of operations that the counter of PyTorch leaves out."""

    def grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
        # Rows of `a`, columns of `b`, or both are divided among the groups; neither is repeated.
        groups = a[0] if len(a) == len(b) == 3 else 1
        return 2 * int(groups) * int(a[-2]) * int(a[-1]) * int(b[-1])

    names = ("aten._grouped_mm", "aten._scaled_grouped_mm", "transformers.grouped_mm_fallback")
    found = {}
    for name in names:
        library, operation = name.split(".")
        packet = getattr(getattr(torch.ops, library), operation, None)
        if packet is not None:
            found[packet] = grouped
    return found
