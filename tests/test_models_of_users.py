"""Models and data as users have them: a search ends in a network that survives saving, or in one
line that says what to change."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import rankNAS
from rankNAS.exceptions import RankNASError

SETTINGS: dict[str, int] = {"calibration": 32, "validation": 32}


@dataclass
class Output:
    logits: Tensor


class Convolutions(nn.Module):
    """A network with weight norm as older PyTorch stores it."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old form
            self.first = nn.utils.weight_norm(nn.Conv1d(8, 64, 3))
        self.second, self.head = nn.Conv1d(64, 64, 3), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(self.first(x.unflatten(1, (8, 8))).relu()).mean(-1))


class Outputs(nn.Module):
    """A network whose logits are in a container."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form, self.body = form, plain()

    def forward(self, x: Tensor) -> Any:
        return self.form(self.body(x))


def plain(first: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        first or nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4)
    )


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Linear(64, 4)
    )


def large_half() -> nn.Module:
    """Activations of about 2,000, whose squares overflow float16."""
    model = plain()
    with torch.no_grad():
        model[0].weight *= 1000
        model[2].weight /= 1000
    return model.half()


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        return plain(torch.jit.script(nn.Linear(64, 64)))


def buffered() -> nn.Module:
    """A buffer of a type that few operations know, and one without values."""
    model = plain()
    model.register_buffer("scale", torch.ones(4).to(torch.float8_e4m3fn))
    model.register_buffer("nothing", None)
    return model


def data(x: Tensor | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 64, generator=generator) if x is None else x
    return TensorDataset(x, torch.arange(len(x)) % 4)


class Items(Dataset[Any]):
    """Items of which number 17 is special."""

    def __init__(self, special: Callable[[], Tensor]) -> None:
        self.special = special

    def __len__(self) -> int:
        return 80

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.special() if i == 17 else torch.full((64,), float(i)), i % 4


def unreadable() -> Tensor:
    raise OSError("a broken image")


def searched(model: nn.Module, given: Any, **settings: int) -> rankNAS.Study:
    return rankNAS.search(
        model,
        (given, given),
        budget={"macs": 0.8},
        strategy="uniform",
        n_trials=1,
        settings=rankNAS.Settings(**(SETTINGS | settings)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Convolutions, {}),
        (lambda: Outputs(lambda y: [y]), {}),
        (lambda: Outputs(lambda y: {"logits": y, "hidden": y}), {}),
        (lambda: Outputs(Output), {}),
        (large_half, {}),
        (normed, {"calibration": 1}),
        (scripted, {}),
        (buffered, {}),
    ],
    ids=[
        "weight norm",
        "list",
        "dict",
        "dataclass",
        "large float16",
        "one calibration sample",
        "a part in TorchScript",
        "float8 buffer",
    ],
)
def test_a_search_ends_in_a_network(
    tmp_path: Path, make: Callable[[], nn.Module], settings: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = make()
    given = data().tensors[0].to(next(model.parameters()).dtype)
    first = model(given)
    logits = next(x for x in (first, *_values(first)) if isinstance(x, Tensor))
    logits.float().sum().backward()  # as after a training
    study = searched(model, data(given), **settings)
    assert all(torch.tensor(v).isfinite() for v in study.best.metrics.values())
    assert study.best.metrics["macs"] < study.dense["macs"]
    network = study.materialise()
    study.save(tmp_path / "n.safetensors")
    again = rankNAS.load(tmp_path / "n.safetensors", make)
    for x, y in zip(_tensors(again(given)), _tensors(network(given)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda: Outputs(lambda y: (y, y)), data, "returns a tuple of 2 tensors"),
        (lambda: plain().to("meta"), data, "parameter '0.weight' is on the meta device"),
        (lambda: plain(nn.LazyLinear(64)), data, "layer '0' is a LazyLinear that has not run yet"),
        (lambda: plain().half(), data, "the inputs are float32 and the weights float16"),
        (plain, lambda: Items(lambda: torch.ones(65)), r"item 17 has \[0\] \(65,\)"),
        (plain, lambda: Items(unreadable), "item 17 of the train split cannot be read .*broken"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    make: Callable[[], nn.Module], given: Callable[[], Any], message: str
) -> None:
    with pytest.raises(RankNASError, match=message) as caught:
        searched(make(), given())
    assert "\n" not in str(caught.value)


def _values(output: Any) -> list[Any]:
    if isinstance(output, Output):
        return [output.logits]
    return list(output.values() if isinstance(output, dict) else output)


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else _values(output)
