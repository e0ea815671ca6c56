"""Export formats, each reloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.exceptions import RankNASError, UnknownNameError, UsageError
from rankNAS.models.export import FORMATS, export
from rankNAS.search_spaces.compiler import compile_space


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


def test_wrong_outputs_are_refused(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export.__globals__["_READERS"], "safetensors", lambda n, p, x: n(x) + 0.1)
    with pytest.raises(RankNASError, match="differ by up to 0.1"):
        export(network, tmp_path / "n", "safetensors", (3, 8, 8))


def test_bad_arguments(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'onnx'"):
        export(network, tmp_path / "n", "onx", (3, 8, 8))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        export(network, tmp_path / "file" / "n", "safetensors", (3, 8, 8))
