"""Export formats, each reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.exceptions import RankNASError, UnknownNameError, UsageError
from rankNAS.models.export import FORMATS, export
from rankNAS.models.inputs import InputSpec
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.trees import Inputs, tensors


@pytest.fixture
def network(small_net: nn.Module) -> nn.Module:
    space = compile_space(small_net, torch.zeros(1, 3, 8, 8))
    choices = {"conv2": Choice("group_svd", (4, 2)), "linear": Choice("svd", (3,))}
    return (
        factorise(small_net, space).materialise(Allocation.of(dict(space.dense) | choices)).eval()
    )


@pytest.mark.filterwarnings("ignore")  # torch's exporters warn about their own internals
@pytest.mark.parametrize("format", FORMATS)
def test_the_reloaded_file_gives_the_same_outputs(
    network: nn.Module, tmp_path: Path, format: str
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"network.{format}"
    assert export(network, path, format, (3, 8, 8)) < 1e-4
    assert path.stat().st_size > 0


@pytest.mark.filterwarnings("ignore")
def test_the_batch_size_stays_free(network: nn.Module, tmp_path: Path) -> None:
    export(network, tmp_path / "n.pt2", "pt2", (3, 8, 8), batch=2)
    x = torch.randn(5, 3, 8, 8)
    again = torch.export.load(tmp_path / "n.pt2").module()
    torch.testing.assert_close(again(x), network(x))


class Pair(nn.Module):
    """Two inputs, a number and an optional argument; a mapping of several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(4, 6)

    def forward(
        self, left: Tensor, right: Tensor, scale: float = 1.0, bias: Tensor | None = None
    ) -> dict[str, Any]:
        total = self.left(left) + scale * self.right(right)
        return {"total": total, "parts": (total.relu(), total.argmax(-1))}


class Tokens(nn.Module):
    """The mean embedding of the positions that are not padded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None].float()
        mean = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.head(mean)
        return logits


class Nested(nn.Module):
    """A container of inputs, and a table that all samples share."""

    def forward(self, parts: tuple[Tensor, dict[str, Tensor]], table: Tensor) -> Tensor:
        return parts[0] * parts[1]["x"] + table.sum(0)


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
CASES: dict[str, tuple[nn.Module, Any, list[str]]] = {
    "pair": (Pair(), (torch.randn(3, 8), torch.randn(3, 4)), ["left", "right"]),
    "keywords": (
        Pair(),
        Inputs((torch.randn(1, 8),), {"right": torch.randn(1, 4), "scale": 2.0, "bias": None}),
        ["left", "right"],
    ),
    "tokens": (
        Tokens(),
        {"input_ids": torch.randint(11, (2, 5)), "attention_mask": MASK},
        ["input_ids", "attention_mask"],
    ),
    "nested": (
        Nested(),
        ((torch.randn(4, 8), {"x": torch.randn(4, 8)}), torch.randn(3, 8)),
        ["parts_0", "parts_1_x", "table"],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_inputs_of_any_form(case: str, described: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    network, inputs, names = CASES[case]
    given = InputSpec.of(inputs) if described else inputs
    for format in ("safetensors", "pt2") if described else FORMATS:
        assert export(network, tmp_path / f"n.{format}", format, given) < 1e-4
    more = InputSpec.of(inputs).random(5)
    again = torch.export.load(tmp_path / "n.pt2").module()
    expected = tensors(more.run(network))
    for found, own in zip(tensors(more.run(again)), expected, strict=True):
        torch.testing.assert_close(found, own)
    if not described:
        session = runtime.InferenceSession(str(tmp_path / "n.onnx"))
        assert [node.name for node in session.get_inputs()] == names
        fed = {name: x.numpy() for name, x in zip(names, tensors(more), strict=True)}
        for array, own in zip(session.run(None, fed), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(array), own)


def test_each_tensor_of_the_outputs_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, inputs, _ = CASES["pair"]
    readers = export.__globals__["_READERS"]

    def last_is_wrong(network: nn.Module, path: Path, inputs: Inputs) -> list[Tensor]:
        *others, last = tensors(inputs.run(network))
        return [*others, last + 1]

    monkeypatch.setitem(readers, "safetensors", last_is_wrong)
    with pytest.raises(RankNASError, match="differ by up to 1"):
        export(network, tmp_path / "n", "safetensors", inputs)
    monkeypatch.setitem(readers, "safetensors", lambda n, p, x: tensors(x.run(n))[:2])
    with pytest.raises(RankNASError, match="gives other outputs"):
        export(network, tmp_path / "n", "safetensors", inputs)


def test_wrong_outputs_are_refused(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        export.__globals__["_READERS"], "safetensors", lambda n, p, x: x.run(n) + 0.1
    )
    with pytest.raises(RankNASError, match="differ by up to 0.1"):
        export(network, tmp_path / "n", "safetensors", (3, 8, 8))


def test_bad_arguments(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'onnx'"):
        export(network, tmp_path / "n", "onx", (3, 8, 8))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        export(network, tmp_path / "file" / "n", "safetensors", (3, 8, 8))
