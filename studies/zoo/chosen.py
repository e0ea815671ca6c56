"""The networks of the sweep: how each is chosen and built, with random weights.

python studies/zoo/chosen.py finds the smallest network of each module of timm (smallest.csv).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Network", "names", "network"]

#: The smallest network of every family of torchvision.
TORCHVISION: dict[str, tuple[str, ...]] = {
    "classification": (
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s"),
        *("googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2"),
        *("mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
        *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t"),
        *("vgg11", "vgg11_bn", "vit_b_16", "wide_resnet50_2"),
    ),
    "segmentation": (
        *("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50"),
        "lraspp_mobilenet_v3_large",
    ),
    "video": (*("mc3_18", "r2plus1d_18", "r3d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t"),),
}
SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)
FRAMES = 16
CLASSES = 10  # of random labels
SMALLEST = Path(__file__).with_name("smallest.csv")


@dataclass(frozen=True)
class Network:
    """A network with its input.

    Args:
        name: Its name in its package.
        make: Builds it with random weights.
        shape: The shape of one input.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def names() -> list[str]:
    """All entries, as ``torchvision:NAME`` and ``timm:MODULE``."""
    found = [f"torchvision:{name}" for kind in TORCHVISION.values() for name in kind]
    return found + [f"timm:{module}" for module in smallest()]


def network(entry: str) -> Network:
    """The network of an entry; of a module of timm, the one with the fewest parameters.

    The input has the first of `SIZES` that the network accepts.
    """
    source, _, name = entry.partition(":")
    if source == "timm":
        return _timm(smallest()[name])
    from torchvision import models

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    if name in TORCHVISION["segmentation"]:
        options = {"weights_backbone": None}
    video = name in TORCHVISION["video"]

    def build(**sized: Any) -> nn.Module:
        made: nn.Module = models.get_model(name, weights=None, **options, **sized)
        return made

    def sized(side: int) -> Iterator[dict[str, Any]]:
        if name.startswith("vit"):
            yield {"image_size": side}
        else:
            yield {}

    return _fitting(name, build, sized, (3, FRAMES) if video else (3,))


def _timm(name: str) -> Network:
    import timm

    def build(**sized: Any) -> nn.Module:
        made: nn.Module = timm.create_model(name, pretrained=False, **sized)
        return made

    def sized(side: int) -> Iterator[dict[str, Any]]:
        yield {"img_size": side}
        yield {}

    config = timm.get_pretrained_cfg(name)
    return _fitting(name, build, sized, (3,) if config is None else config.input_size[:1])


def smallest() -> dict[str, str]:
    """By module of timm, its network with the fewest parameters, from `SMALLEST`."""
    with SMALLEST.open(newline="") as file:
        return {row["module"]: row["network"] for row in csv.DictReader(file)}


def find_smallest() -> None:
    """Write `SMALLEST`: build every network of timm without values and count its parameters."""
    import timm

    with SMALLEST.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("module", "network", "params"))
        for module in timm.list_modules():
            # Networks named test_ are made for timm's own tests: nothing in them is large.
            known = (n for n in timm.list_models(module=module) if not n.startswith("test_"))
            counts = {name: _parameters(lambda: timm.create_model(name)) for name in known}  # noqa: B023
            if counts:
                name = min(counts, key=lambda n: counts[n])
                table.writerow((module, name, counts[name]))
                file.flush()


def _parameters(make: Callable[[], nn.Module]) -> int:
    return sum(parameter.numel() for parameter in _empty(make).parameters())


def _empty(make: Callable[[], nn.Module]) -> nn.Module:
    """The network without values, or with values if its constructor needs some."""
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):
        return make()


def _fitting(
    name: str,
    build: Callable[..., nn.Module],
    sized: Callable[[int], Iterator[dict[str, Any]]],
    channels: tuple[int, ...],
) -> Network:
    """The network for the first size of images that it accepts."""
    reasons = []
    for side in SIZES:
        for options in sized(side):
            shape = (*channels, side, side)
            try:
                model = _empty(lambda: build(**options)).eval()  # noqa: B023
                with torch.no_grad():
                    model(_zeros(model, shape))
            except Exception as error:  # each network refuses sizes in its own way
                reasons.append(f"{side}: {type(error).__name__}: {error}")
                continue
            return Network(name, lambda: build(**options), shape)  # noqa: B023
    raise ValueError(f"{name} accepts no size of images; {reasons[-1]}")


def _zeros(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    device = next(model.parameters()).device
    return torch.zeros((1, *shape), device=device)


if __name__ == "__main__":
    find_smallest()
