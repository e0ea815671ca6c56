"""Zero-copy serialisation of evaluators: each machine holds one copy of the tensors.

Ray stores arrays in shared memory, where all processes of a machine read them. Tensors are pickled
as such arrays, so that the private memory of a worker holds no factors and data.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankNAS.evaluation.evaluator import Evaluator
from rankNAS.exceptions import UsageError
from rankNAS.plugins import MODULE_PREFIX

__all__ = ["sending", "shared_bytes"]


def shared_bytes(evaluator: Evaluator) -> int:
    """Bytes of an evaluator's tensors, measured on their pickled form."""
    sizes: list[int] = []
    with sending():
        _cloudpickle().dumps(
            evaluator, protocol=5, buffer_callback=lambda b: sizes.append(b.raw().nbytes)
        )
    return sum(sizes)


def _cloudpickle() -> Any:
    """Ray's own copy of cloudpickle, which has no type annotations."""
    from ray import cloudpickle

    return cloudpickle


@contextlib.contextmanager
def sending() -> Iterator[None]:
    """Context in which an evaluator is pickled for workers.

    Raises:
        UsageError: A user's object cannot be pickled.
    """
    with _shared_tensors(), _code_by_value():
        try:
            yield
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise UsageError(
                f"the model or an objective cannot be sent to workers ({error}); define it at "
                "the top level of a file, without lambdas or open files, or use one worker."
            ) from None


@contextlib.contextmanager
def _shared_tensors() -> Iterator[None]:
    """Context in which tensors are pickled as arrays, for Ray's shared memory."""
    dispatch = _cloudpickle().CloudPickler.dispatch
    before = {kind: dispatch.get(kind) for kind in (Tensor, nn.Parameter)}
    dispatch[Tensor] = _reduced
    dispatch[nn.Parameter] = _reduced
    try:
        yield
    finally:
        for kind, reducer in before.items():
            if reducer is None:
                dispatch.pop(kind, None)
            else:
                dispatch[kind] = reducer


def _reduced(tensor: Tensor) -> tuple[Any, ...]:
    """Pickled form of a tensor: its bytes as an array, with dtype and layout."""
    own = tensor.detach()
    last = own.dim() == 4 and not own.is_contiguous()
    own = (own.permute(0, 2, 3, 1) if last else own).cpu().contiguous()
    flat = own.reshape(-1)
    if flat.stride() != (1,):  # with one element, any stride counts as contiguous
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    array = flat.view(torch.uint8).numpy()
    parameter = tensor.requires_grad if isinstance(tensor, nn.Parameter) else None
    return _restored, (array, own.dtype, tuple(own.shape), last, parameter, str(tensor.device))


def _restored(
    array: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    last: bool,
    parameter: bool | None,
    device: str,
) -> Tensor:
    """Inverse of `_reduced`; on the CPU, the tensor shares the memory of the array."""
    tensor = torch.from_numpy(array).view(dtype) if array.size else torch.empty(0, dtype=dtype)
    tensor = tensor.reshape(shape)
    tensor = (tensor.permute(0, 3, 1, 2) if last else tensor).to(device)
    return tensor if parameter is None else nn.Parameter(tensor, requires_grad=parameter)


@contextlib.contextmanager
def _code_by_value() -> Iterator[None]:
    """Context that pickles the user's own modules by value; workers cannot import them."""
    cloudpickle = _cloudpickle()
    own = [m for name, m in sys.modules.items() if name.startswith(MODULE_PREFIX)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)
