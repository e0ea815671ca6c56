"""Export of a network to other formats; each file is reloaded and its outputs are compared."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.exceptions import RankNASError, UnknownNameError, UsageError
from rankNAS.io.files import save_atomically
from rankNAS.io.tensors import encoded, read_tensors

__all__ = ["FORMATS", "export"]

TOLERANCE = 1e-3  # relative to the largest output; a larger difference refuses the export


def export(
    network: nn.Module, path: Path, format: str, input_shape: tuple[int, ...], *, batch: int = 2
) -> float:
    """The output difference of a network written to a file and reloaded.

    Args:
        network: The network, in evaluation mode on the CPU.
        path: The file.
        format: ``safetensors`` (the weights alone), ``onnx``, or ``pt2`` (``torch.export``).
        input_shape: Shape of one input. The batch size stays dynamic.
        batch: Number of inputs of the comparison.

    Returns:
        The largest absolute difference between the outputs of the reloaded file and of `network`.

    Raises:
        RankNASError: The outputs of the reloaded file differ.
        UsageError: A package that the format needs is missing.
        WriteError: The file cannot be written; an earlier one is intact.
    """
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    network = network.eval()
    x = torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(x)
    save_atomically(path, lambda temporary: _WRITERS[format](network, temporary, x))
    with torch.no_grad():
        difference = float((_READERS[format](network, path, x) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RankNASError(
            f"the exported {str(path)!r} gives other outputs than the network: they differ by up "
            f"to {difference:.3g}."
        )
    return difference


def _write_safetensors(network: nn.Module, path: Path, x: Tensor) -> None:
    path.write_bytes(encoded({k: v.clone() for k, v in network.state_dict().items()}))


def _read_safetensors(network: nn.Module, path: Path, x: Tensor) -> Tensor:
    state, _ = read_tensors(path)
    output: Tensor = torch.func.functional_call(network, state, (x,))
    return output


def _write_pt2(network: nn.Module, path: Path, x: Tensor) -> None:
    buffer = io.BytesIO()  # PyTorch's own writer hides why it failed
    torch.export.save(_exported(network, x), buffer)
    path.write_bytes(buffer.getbuffer())


def _read_pt2(network: nn.Module, path: Path, x: Tensor) -> Tensor:
    with path.open("rb") as file:
        output: Tensor = torch.export.load(file).module()(x)
    return output


def _exported(network: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=65536)
    return torch.export.export(network, (x,), dynamic_shapes=({0: batch},))


def _write_onnx(network: nn.Module, path: Path, x: Tensor) -> None:
    _need("onnxscript")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch internals
        program = torch.onnx.export(
            network,
            (x,),
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)


def _read_onnx(network: nn.Module, path: Path, x: Tensor) -> Tensor:
    onnxruntime = _need("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def _need(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise UsageError(f"ONNX needs {package}: pip install 'ranknas[export]'") from None


_WRITERS: dict[str, Callable[[nn.Module, Path, Tensor], None]] = {
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "pt2": _write_pt2,
}
_READERS: dict[str, Callable[[nn.Module, Path, Tensor], Tensor]] = {
    "safetensors": _read_safetensors,
    "onnx": _read_onnx,
    "pt2": _read_pt2,
}
FORMATS = tuple(_WRITERS)
