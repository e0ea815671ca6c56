"""Networks of other packages and of user files, with random weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.plugins import load_callable, neighbours_of

__all__ = [
    "file_model",
    "timm_model",
    "torchvision_factory",
    "torchvision_model",
    "wants_classes",
]

# These two otherwise return tuples in training mode and warn about their initialisation.
_SINGLE_OUTPUT: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def torchvision_model(num_classes: int, input_shape: tuple[int, ...], *, name: str) -> nn.Module:
    """A torchvision classifier with random weights.

    Args:
        num_classes: The number of logits.
        input_shape: Channels, height and width; torchvision's networks take 3 channels.
        name: A name that ``torchvision.models.get_model`` knows.

    Raises:
        UnknownNameError: torchvision has no classifier of this name.
        UsageError: ``input_shape`` is not an image shape that the network accepts.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UnknownNameError("torchvision model", name, known)
    _check_rgb(name, input_shape)
    options = dict(_SINGLE_OUTPUT.get(name, {}))
    if name.startswith("vit_"):
        options["image_size"] = _vit_image_size(name, input_shape)
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def torchvision_factory(name: str) -> Callable[[int, tuple[int, ...]], nn.Module]:
    """The factory ``(num_classes, input_shape) -> network`` of one torchvision classifier."""
    return partial(torchvision_model, name=name)


def timm_model(name: str, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """A timm network with random weights, for ``input_shape[0]`` channels.

    Raises:
        UnknownNameError: timm has no network of this name.
        UsageError: timm is not installed, or the network does not accept this input shape.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"`timm:{name}` needs timm: pip install 'ranknas[hf]'") from error
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:20]
        raise UnknownNameError(
            "timm model", name, near, "Only related names are listed; see timm.list_models()."
        )
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": input_shape[0]}
    defaults = timm.get_pretrained_cfg(name)
    if defaults is not None and defaults.fixed_input_size:
        options["img_size"] = tuple(input_shape[1:])
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(
            f"timm:{name} can not be built for {num_classes} classes and inputs of shape "
            f"{input_shape} ({error}); resize the images or choose another network."
        ) from error
    return model


def file_model(
    spec: str, num_classes: int | None, input_shape: tuple[int, ...] | None
) -> nn.Module:
    """The network that the function at ``path/to/file.py:factory`` returns.

    The function receives ``num_classes`` and ``input_shape`` if it has parameters of these names
    and they are known.

    Raises:
        UsageError: The function cannot be loaded or called, or returns no ``nn.Module``.
    """
    factory = load_callable(spec, "search space")
    options = _accepted(factory, {"num_classes": num_classes, "input_shape": input_shape})
    parameters = inspect.signature(factory).parameters
    needed = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty}
    for name, value in options.items():
        if value is None and name in needed:
            raise UsageError(
                f"{spec} takes `{name}`, which the data do not have; give it a default value."
            )
    with neighbours_of(factory):
        model = factory(**{name: value for name, value in options.items() if value is not None})
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{spec} returned {type(model).__name__}, but a search space is a torch.nn.Module; "
            "return the network from the factory."
        )
    return model


def wants_classes(spec: str) -> bool:
    """Whether the function at ``path/to/file.py:factory`` has a parameter ``num_classes``."""
    return "num_classes" in inspect.signature(load_callable(spec, "search space")).parameters


def _accepted(function: Callable[..., object], options: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return options
    names = {
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    return {name: value for name, value in options.items() if name in names}


def _check_rgb(name: str, input_shape: tuple[int, ...]) -> None:
    if len(input_shape) != 3 or input_shape[0] != 3:
        raise UsageError(
            f"{name} was given inputs of shape {input_shape}, but it takes RGB images "
            "(3, height, width); repeat a grey channel three times or choose another space."
        )


def _vit_image_size(name: str, input_shape: tuple[int, ...]) -> int:
    """The side of the square images in pixels; ``vit_b_16`` uses patches of 16 pixels."""
    patch = int(name.rpartition("_")[2])
    _, height, width = input_shape
    if height != width or height % patch:
        raise UsageError(
            f"{name} was given images of {height} x {width}, but it takes square ones whose side "
            f"is a multiple of {patch}; resize the images."
        )
    return height
