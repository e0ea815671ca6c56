"""`Layout`: where the inputs, the target and the padding mask are in a batch."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankNAS.data.labels import TARGETS
from rankNAS.exceptions import DataError
from rankNAS.trees import Inputs, tensors

__all__ = ["Layout"]

MASKS = ("attention_mask", "mask")
PADDINGS = ("padding_mask", "key_padding_mask", "src_key_padding_mask")  # true where padded


@dataclass(frozen=True)
class Layout:
    """The places of inputs and target in a batch.

    Args:
        inputs: Keys or positions of the inputs, in the order of the model's arguments; None if the
            batch itself is the only input.
        target: Key or position of the target; None without one.
        keywords: Whether inputs are passed by name.
        unpacked: Whether a single input is a tuple or a mapping of several arguments.
        mask: Key or position of a padding mask (N, T) among the inputs.
        inverted: Whether the mask is true where samples are padded.

    Example:
        >>> import torch
        >>> batch = {"x": torch.zeros(2, 3), "label": torch.zeros(2)}
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> Layout.of(batch, Net()).target
        'label'
    """

    inputs: tuple[int | str, ...] | None = None
    target: int | str | None = None
    keywords: bool = False
    unpacked: bool = False
    mask: int | str | None = None
    inverted: bool = False

    @classmethod
    def of(cls, batch: Any, model: nn.Module, *, labelled: bool | None = None) -> Layout:
        """The layout of a batch for a model.

        Args:
            batch: A batch or an item.
            model: Its forward method decides how inputs are passed.
            labelled: Whether the batch has a target; None finds out from the form of the batch
                and the number of the model's parameters.

        Raises:
            DataError: The batch has no inputs for the model.
        """
        signature = _Signature.of(model)
        if isinstance(batch, Tensor):
            return cls()
        if isinstance(batch, Mapping) or dataclasses.is_dataclass(batch):
            return _of_names(batch, signature, labelled)
        if isinstance(batch, tuple | list):
            return _of_positions(batch, signature, labelled)
        raise DataError(
            f"a batch is a {type(batch).__name__}; return a tensor, a tuple, a mapping or a "
            "dataclass."
        )

    def inputs_of(self, batch: Any) -> Inputs:
        """The model's arguments."""
        if self.inputs is None:
            return Inputs.of((batch,))
        values = [_part(batch, key) for key in self.inputs]
        if self.unpacked:
            return Inputs.of(values[0])
        if self.keywords:
            return Inputs((), dict(zip(map(str, self.inputs), values, strict=True)))
        return Inputs(tuple(values), {})

    def target_of(self, batch: Any) -> Any:
        """The target; None without one."""
        return None if self.target is None else _part(batch, self.target)

    def mask_of(self, batch: Any) -> Tensor | None:
        """The positions that are not padded, bool; None without a mask."""
        if self.mask is None or self.inputs is None:
            return None
        values = self.inputs_of(batch)
        found = (
            values.kwargs.get(str(self.mask))
            if isinstance(self.mask, str)
            else values.args[self.mask]
        )
        if not isinstance(found, Tensor):
            return None
        return ~found.bool() if self.inverted else found.bool()


@dataclass(frozen=True)
class _Signature:
    """The parameters of a forward method.

    Args:
        names: Names of the parameters that take a position.
        required: How many have no default.
        most: How many positional arguments are accepted.
        any_name: Whether any keyword is accepted.
        keywords: Names of keyword-only parameters.
    """

    names: tuple[str, ...]
    required: int
    most: float
    any_name: bool
    keywords: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> _Signature:
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):
            return cls((), 0, math.inf, True, ())
        kinds = inspect.Parameter
        places = [
            p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        most = math.inf if any(p.kind is kinds.VAR_POSITIONAL for p in parameters) else len(places)
        return cls(
            tuple(p.name for p in places),
            sum(p.default is kinds.empty for p in places),
            most,
            any(p.kind is kinds.VAR_KEYWORD for p in parameters),
            tuple(p.name for p in parameters if p.kind is kinds.KEYWORD_ONLY),
        )

    def accepts(self, name: str) -> bool:
        """Whether a keyword is accepted."""
        return self.any_name or name in self.names or name in self.keywords


def _of_names(batch: Any, signature: _Signature, labelled: bool | None) -> Layout:
    names = [
        *(batch if isinstance(batch, Mapping) else (f.name for f in dataclasses.fields(batch)))
    ]
    found = [name for name in names if tensors(_part(batch, name))]
    needed = signature.names[: signature.required]
    target = next((n for n in TARGETS if n in found and n not in needed), None)
    target = None if labelled is False else target
    others = [name for name in found if name not in TARGETS or name != target]
    if labelled is False:
        others = [n for n in others if n not in TARGETS or n in signature.names]
    accepted = [name for name in others if signature.accepts(name)]
    if signature.any_name and not signature.names:
        accepted = others
    if accepted:
        mask = next((n for n in (*MASKS, *PADDINGS) if n in accepted), None)
        return Layout(tuple(accepted), target, True, False, mask, mask in PADDINGS)
    if others and signature.required <= len(others) <= signature.most:
        return Layout(tuple(others), target)
    raise DataError(
        f"a batch has the keys {', '.join(map(str, names))}, but the model's forward takes "
        f"({', '.join(signature.names)}); name the keys as its parameters, or give the task a "
        "layout, such as Regression(layout=Layout(inputs=None, target='y')) for a model that "
        "takes the whole batch."
    )


def _of_positions(batch: Any, signature: _Signature, labelled: bool | None) -> Layout:
    count = len(batch)
    if not count:
        raise DataError("a batch is an empty tuple; return its inputs, and targets if any.")
    if labelled is None:
        # A container first is all inputs, and what follows it is the target.
        nested = not isinstance(batch[0], Tensor) and signature.required != 1
        fewer = nested or signature.required < count
        labelled = count > 1 and fewer and not _ends_in_mask(batch, signature)
    if labelled and count < 2:
        labelled = False
    target = count - 1 if labelled else None
    used = count - 1 if labelled else int(min(count, max(signature.most, 1)))
    first = batch[0]
    if used == 1 and isinstance(first, Mapping) and all(map(signature.accepts, first)):
        mask = next((n for n in (*MASKS, *PADDINGS) if n in first), None)
        return Layout((0,), target, unpacked=True, mask=mask, inverted=mask in PADDINGS)
    if used == 1 and isinstance(first, tuple | list) and _unpacks(first, signature):
        return Layout((0,), target, unpacked=True, **_mask(signature, len(first)))
    return Layout(tuple(range(used)), target, **_mask(signature, used))


def _unpacks(first: Any, signature: _Signature) -> bool:
    """Whether a sequence is several arguments, rather than one.

    A list for a model that needs one argument is that argument, such as the images of a detector.
    """
    several = signature.required > 1 or isinstance(first, tuple)
    return several and max(signature.required, 2) <= len(first) <= signature.most


def _mask(signature: _Signature, count: int) -> dict[str, Any]:
    """The place of a padding mask among positional inputs."""
    names = signature.names[:count]
    found = next((n for n in (*MASKS, *PADDINGS) if n in names), None)
    if found is None:
        return {}
    return {"mask": names.index(found), "inverted": found in PADDINGS}


def _ends_in_mask(batch: Any, signature: _Signature) -> bool:
    """Whether the last part is a mask of the first: zeros and ones of its shape."""
    names = signature.names
    first, last = batch[0], batch[-1]
    if len(batch) > len(names) or "mask" not in names[len(batch) - 1]:
        return False
    if not isinstance(first, Tensor) or not isinstance(last, Tensor) or last.is_floating_point():
        return False
    return last.shape == first.shape and bool(((last == 0) | (last == 1)).all())


def _part(batch: Any, key: int | str) -> Any:
    if isinstance(batch, Mapping) or isinstance(key, int):
        return batch[key]
    return getattr(batch, key)
