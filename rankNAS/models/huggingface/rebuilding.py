"""A compressed model of ``transformers``, built from its description and its tensors.

It is built twice. The first model is on the meta device: nothing is allocated for it, and its
shapes are held against the tensors of the file. The second has real buffers, because some of them
(the frequencies of rotary positions) are computed when a model is built and are in no file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from rankNAS.allocation import Allocation
from rankNAS.compression.factorisation import skeleton
from rankNAS.exceptions import UsageError, WeightsError, shortened
from rankNAS.models.bounds import check_choices
from rankNAS.models.huggingface.description import configured
from rankNAS.models.weights import check_shapes, check_values
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.search_spaces.zoo.huggingface import empty_model, quiet

__all__ = ["assign", "rebuilt"]

FEWEST_MODULES = 10_000  # that a model of any file may have
MODULES = 20  # the largest number of modules for a tensor of the file
FEWEST_BYTES = 1 << 28  # of buffers that any file may need


def rebuilt(
    description: Any, allocation: Allocation, state: Mapping[str, Tensor], source: str
) -> nn.Module:
    """The network of a description, in evaluation mode; it shares the tensors that are given.

    Args:
        description: From `described`.
        allocation: The allocation that it was made from.
        state: Its tensors by name. A tied weight may be there under one of its names.
        source: The name of their file in messages.

    Raises:
        UsageError: ``transformers`` is not installed, or the allocation is of another model.
        WeightsError: The description is damaged, or does not belong to the tensors.
    """
    config, kind = configured(description, source)
    names = {*allocation, *state}
    most = max(FEWEST_MODULES, MODULES * len(state))

    def built(build: Callable[[], nn.Module]) -> nn.Module:
        with _bounded(most):
            model = build()
        return with_plain_layers(model, names)

    try:
        empty = built(lambda: empty_model(config, kind))
        check_choices(empty, allocation, source)
        found = check_shapes(skeleton(empty, allocation), state, source=source)
        _check_buffers(empty, found, source)
        network = skeleton(built(lambda: _hollow_model(config, kind)), allocation)
    except UsageError:
        raise
    except Exception as error:  # a forged value can raise any error while a model is built
        raise WeightsError(
            f"the model described in {source!r} cannot be built: {type(error).__name__}: "
            f"{shortened(str(error), 300)}"
        ) from error
    check_values(network, found, source=source)
    assign(network, found)
    _set_generation(network, description.get("generation"), source)
    _set_buffer_types(network, description.get("buffers"))
    return network.eval()


def assign(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make tensors the parameters and buffers of a network, without copies.

    Names that have one tensor become one parameter.

    Args:
        network: The network; its parameters may be on the meta device.
        state: A tensor for each name of its state dict.
    """
    made: dict[int, nn.Parameter] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tensor = state[prefix + name]
                trained = parameter.requires_grad and tensor.is_floating_point()
                found = made.setdefault(id(tensor), nn.Parameter(tensor, trained))
                module._parameters[name] = found
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = state[prefix + name].clone()


def _hollow_model(config: Any, kind: Any) -> nn.Module:
    """A model whose parameters are on the meta device and whose buffers have their values."""
    owner = threading.get_ident()

    def emptied(module: nn.Module, name: str, parameter: Any) -> Any:
        if threading.get_ident() != owner or parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = hooks.register_module_parameter_registration_hook(emptied)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model: nn.Module = kind._from_config(config)
    finally:
        handle.remove()
    return model.eval()


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Context in which at most so many modules can be made inside others by this thread."""
    owner, count = threading.get_ident(), 0

    def counted(module: nn.Module, name: str, inner: Any) -> None:
        nonlocal count
        count += threading.get_ident() == owner
        if count > most:
            raise ValueError(f"it has more than {most} modules")

    handle = hooks.register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _check_buffers(empty: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise a WeightsError if the buffers of a model would need far more memory than its file."""
    most = FEWEST_BYTES + sum(tensor.nbytes for tensor in state.values())
    needed = sum(buffer.nbytes for buffer in empty.buffers())
    if needed > most:
        raise WeightsError(
            f"the model described in {source!r} needs {needed} bytes of buffers beside its "
            "weights, more than its file can explain; fetch the file again."
        )


def _set_generation(network: Any, content: Any, source: str) -> None:
    """Give a model its generation configuration."""
    if content is None or not network.can_generate():
        return
    from transformers import GenerationConfig

    try:
        network.generation_config = GenerationConfig.from_dict(dict(content))
    except Exception as error:  # a forged value can raise any error
        raise WeightsError(
            f"the generation configuration in {source!r} is damaged: {shortened(str(error), 300)}"
        ) from None


def _set_buffer_types(network: nn.Module, types: Any) -> None:
    """Round computed buffers to the data types that those of the saved network had."""
    for path, name in dict(types or {}).items() if isinstance(types, dict) else ():
        parent, _, child = str(path).rpartition(".")
        dtype = getattr(torch, str(name), None)
        try:
            module = network.get_submodule(parent)
        except AttributeError:
            continue
        buffer = module._buffers.get(child)
        if buffer is not None and isinstance(dtype, torch.dtype):
            module._buffers[child] = buffer.to(dtype)
