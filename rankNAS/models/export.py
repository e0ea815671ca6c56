"""Export of a network to other formats; each file is reloaded and its outputs are compared."""

from __future__ import annotations

import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.exceptions import RankNASError, UnknownNameError, UsageError
from rankNAS.io.files import save_atomically
from rankNAS.io.tensors import encoded, read_tensors
from rankNAS.models.inputs import InputSpec
from rankNAS.trees import (
    Inputs,
    is_batched,
    map_children,
    named_tensors,
    sample_count,
    tensors,
    tree_map,
    with_size,
    without_cache,
)

__all__ = ["FORMATS", "compared", "export"]

TOLERANCE = 1e-3  # relative to the largest output; a larger difference refuses the export


def export(
    network: nn.Module,
    path: Path,
    format: str,
    inputs: Any,
    *,
    batch: int = 2,
) -> float:
    """The output difference of a network written to a file and reloaded.

    The number of samples stays dynamic: axis 0 of every tensor of the arguments that has one entry
    a sample. In ONNX files, a single positional argument is called ``input`` and a single output
    ``output``; other arguments have the names of the parameters of ``forward``.

    Args:
        network: The network, in evaluation mode on the CPU.
        path: The file.
        format: ``safetensors`` (the weights alone), ``onnx``, or ``pt2`` (``torch.export``).
        inputs: Example arguments: a tensor, a tuple of positional or a mapping of keyword
            arguments, `Inputs`, or an `InputSpec`. A tuple of integers is the shape of one input.
        batch: Number of samples of the comparison.

    Returns:
        The largest absolute difference between the outputs of the reloaded file and of `network`.

    Raises:
        RankNASError: The outputs of the reloaded file differ.
        UsageError: A package that the format needs is missing.
        WriteError: The file cannot be written; an earlier one is intact.
    """
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    network, given = network.eval(), _example(inputs, batch)
    with without_cache(network):
        with torch.no_grad():
            expected = tensors(given.copied().run(network))
        save_atomically(path, lambda temporary: _WRITERS[format](network, temporary, given))
        with torch.no_grad():
            found = tensors(_READERS[format](network, path, given))
    return compared(found, expected, path)


def _example(inputs: Any, batch: int) -> Inputs:
    """Arguments for a number of samples."""
    if isinstance(inputs, tuple) and inputs and all(isinstance(size, int) for size in inputs):
        inputs = InputSpec.of_shape(inputs)
    if isinstance(inputs, InputSpec):
        return inputs.random(batch)
    given = Inputs.of(inputs)
    count = sample_count(given)

    def resized(tensor: Tensor) -> Tensor:
        return with_size(tensor, batch) if is_batched(tensor, count) else tensor

    found: Inputs = tree_map(resized, given)
    return found


def compared(found: Sequence[Tensor], expected: Sequence[Tensor], path: Path) -> float:
    """The largest difference; raises a RankNASError if one of the tensors differs."""
    shapes = [[tuple(x.shape) for x in each] for each in (found, expected)]
    if not expected or shapes[0] != shapes[1]:
        raise RankNASError(
            f"the exported {str(path)!r} gives other outputs than the network: tensors of the "
            f"shapes {shapes[0]} instead of {shapes[1]}."
        )
    largest = 0.0
    for x, y in zip(found, expected, strict=True):
        if not y.numel():
            continue
        x, y = x.double(), y.double()
        difference = float((x - y).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(y.abs().max())):
            raise RankNASError(
                f"the exported {str(path)!r} gives other outputs than the network: they differ by "
                f"up to {difference:.3g}."
            )
        largest = max(largest, difference)
    return largest


def _write_safetensors(network: nn.Module, path: Path, inputs: Inputs) -> None:
    path.write_bytes(encoded({k: v.clone() for k, v in network.state_dict().items()}))


def _read_safetensors(network: nn.Module, path: Path, inputs: Inputs) -> Any:
    state, _ = read_tensors(path)
    return torch.func.functional_call(network, state, inputs.args, inputs.kwargs)


def _write_pt2(network: nn.Module, path: Path, inputs: Inputs) -> None:
    buffer = io.BytesIO()  # PyTorch's own writer hides why it failed
    shapes = _dynamic_shapes(network, inputs)
    program = torch.export.export(network, inputs.args, inputs.kwargs, dynamic_shapes=shapes)
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def _read_pt2(network: nn.Module, path: Path, inputs: Inputs) -> Any:
    with path.open("rb") as file:
        return inputs.run(torch.export.load(file).module())


def _arguments(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments by the names of the parameters of ``forward``."""
    signature = inspect.signature(network.forward)
    return dict(signature.bind(*inputs.args, **inputs.kwargs).arguments)


def _dynamic_shapes(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """By argument, the dynamic axes of its tensors."""
    count = sample_count(inputs)
    batch = torch.export.Dim("batch", min=1, max=65536)

    def axes(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if is_batched(value, count) else {}
        children = map_children(axes, value)
        return None if children is value else children

    return {name: axes(value) for name, value in _arguments(network, inputs).items()}


def _write_onnx(network: nn.Module, path: Path, inputs: Inputs) -> None:
    _need("onnxscript")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with torch.no_grad():
        output = inputs.copied().run(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch internals
        program = torch.onnx.export(
            network,
            inputs.args,
            kwargs=inputs.kwargs,
            input_names=list(_named(network, inputs)),
            output_names=_output_names(output),
            dynamic_shapes=_dynamic_shapes(network, inputs),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)


def _read_onnx(network: nn.Module, path: Path, inputs: Inputs) -> list[Tensor]:
    onnxruntime = _need("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    used = {node.name for node in session.get_inputs()}
    named = {name: x.numpy() for name, x in _named(network, inputs).items() if name in used}
    return [torch.from_numpy(array) for array in session.run(None, named)]


def _named(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of the arguments by their names in an ONNX file, in order."""
    if not inputs.kwargs and len(inputs.args) == 1 and isinstance(inputs.args[0], Tensor):
        return {"input": inputs.args[0]}
    found: dict[str, Tensor] = {}
    for name, value in _arguments(network, inputs).items():
        found |= {_identifier(place): x for place, x in named_tensors(value, name)}
    return found


def _output_names(output: Any) -> list[str]:
    if isinstance(output, Tensor):
        return ["output"]
    prefix = "" if isinstance(output, Mapping) or is_dataclass(output) else "output"
    return [_identifier(place) for place, _ in named_tensors(output, prefix)]


def _identifier(place: str) -> str:
    """``pair[0].left`` as ``pair_0_left``."""
    return re.sub(r"[^A-Za-z0-9]+", "_", place).strip("_")


def _need(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise UsageError(f"ONNX needs {package}: pip install 'ranknas[export]'") from None


_WRITERS: dict[str, Callable[[nn.Module, Path, Inputs], None]] = {
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "pt2": _write_pt2,
}
_READERS: dict[str, Callable[[nn.Module, Path, Inputs], Any]] = {
    "safetensors": _read_safetensors,
    "onnx": _read_onnx,
    "pt2": _read_pt2,
}
FORMATS = tuple(_WRITERS)
