"""Compressed networks as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.factorisation import factorise
from rankNAS.exceptions import UsageError, WeightsError
from rankNAS.io.tensors import CHECKSUM
from rankNAS.models.artifact import load, read_inputs, read_metadata, save
from rankNAS.models.inputs import InputSpec
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model


class Tied(nn.Module):
    """An embedding tied to the output layer, and two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 48)
        self.first = nn.Linear(48, 48, bias=False)
        self.second = nn.Linear(48, 48, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(48, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(torch.relu(self.first(self.embed(x)))))
        return out


def compressed(model: nn.Module, x: Tensor, allocation: dict[str, Choice]) -> nn.Module:
    space = compile_space(model, x)
    full = Allocation.of(dict(space.dense) | allocation)
    return factorise(model, space).materialise(full).eval()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (nn.Sequential(nn.Linear(64, 4)), "`model_factory` is a Sequential; give a function"),
        ("net.py:build", "`model_factory` is a str; give a function"),
        (lambda: None, "`model_factory` returned a NoneType; give a function"),
    ],
)
def test_what_is_no_factory_is_refused(tmp_path: Path, factory: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    allocation = Allocation.from_json('{"0": "svd:8"}')
    network = compressed(model, torch.zeros(1, 64), dict(allocation))
    save(network, allocation, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "a.safetensors", factory)


def test_built_in_spaces_need_no_factory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    operators = {
        "layer1.0.conv1": "svd",
        "layer2.0.conv1": "spatial_svd",
        "layer3.0.conv2": "tucker2",
        "layer3.1.conv1": "group_svd",
    }
    layers = compile_space(model, x[:1]).layers
    choices = {
        name: next(choice for choice in layers[name] if choice.operator == operator)
        for name, operator in operators.items()
    }
    network = compressed(model, x[:1], choices)
    built = {"space": "resnet20", "num_classes": 10, "input_shape": [3, 32, 32]}
    path = save(network, Allocation.of(choices), tmp_path / "n.safetensors", model=built)
    again = load(path)
    assert torch.equal(again(x), network(x))
    assert not again.training
    assert json.loads(read_metadata(path)["allocation"])["layer3.1.conv1"] == str(
        choices["layer3.1.conv1"]
    )


def test_modules_that_need_the_version_of_their_state_are_loaded(tmp_path: Path) -> None:
    recipe = {"space": "torchvision:mnasnet0_5", "num_classes": 4, "input_shape": [3, 32, 32]}
    torch.manual_seed(0)
    model = build_model("torchvision:mnasnet0_5", num_classes=4, input_shape=(3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    layers = compile_space(model, x[:1]).layers
    choices = {name: layer.choices[len(layer) // 2] for name, layer in list(layers.items())[:3]}
    network = compressed(model, x[:1], choices)
    path = save(network, Allocation.of(choices), tmp_path / "n.safetensors", model=recipe)
    assert torch.equal(load(path)(x), network(x))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 50, (2, 7))
    choices = {"first": Choice("svd", (6,))}
    network = compressed(Tied().eval(), x, choices)
    path = save(network, Allocation.of(choices), tmp_path / "n.safetensors")
    again: nn.Module = load(path, Tied)
    assert torch.equal(again(x), network(x))
    assert again.get_submodule("first") is again.get_submodule("second")
    assert again.head.weight is again.embed.weight  # type: ignore[union-attr]
    count = sum(p.numel() for p in again.parameters())
    assert count == sum(p.numel() for p in network.parameters())


def test_a_model_of_ones_own_needs_its_factory(tmp_path: Path) -> None:
    allocation = Allocation.of({"0": DENSE})
    network = nn.Sequential(nn.Linear(4, 4))
    path = save(network, allocation, tmp_path / "n.safetensors")
    with pytest.raises(UsageError, match="give the function that builds it"):
        load(path)
    from_file = {"space": "evil.py:factory", "num_classes": 1, "input_shape": [4]}
    save(network, allocation, path, model=from_file)
    with pytest.raises(UsageError, match="give the function that builds it"):
        load(path)


def test_the_form_of_the_inputs_is_kept(tmp_path: Path) -> None:
    allocation, network = Allocation.of({"0": DENSE}), nn.Sequential(nn.Linear(4, 4))
    spec = InputSpec.of({"ids": torch.tensor([[2, 9]] * 3), "mask": torch.ones(3, 2).bool()})
    model = {"space": "mine.py:factory", "num_classes": None, "input_shape": None}
    path = save(
        network, allocation, tmp_path / "n.safetensors", model=model | {"inputs": spec.to_json()}
    )
    assert read_inputs(path) == spec
    assert load(path, lambda: nn.Sequential(nn.Linear(4, 4))) is not None
    save(network, allocation, path, model={"inputs": spec.to_json()})
    assert read_inputs(path) == spec
    with pytest.raises(UsageError, match="give the function that builds it"):
        load(path)
    built_in = {"space": "resnet20", "num_classes": 10, "input_shape": [3, 32, 32]}
    save(network, allocation, path, model=built_in)  # as version 0.2 did
    found = read_inputs(path)
    assert found is not None and found.random(2).args[0].shape == (2, 3, 32, 32)
    save(network, allocation, path, model={})
    assert read_inputs(path) is None
    for wrong in ({"args": 3}, {"args": [], "kwargs": {"x": {"tensor": {"shape": [1]}}}}, [1]):
        save(network, allocation, path, model={"inputs": wrong})
        with pytest.raises(WeightsError, match="is damaged"):
            read_inputs(path)
    save(network, allocation, path, model=built_in | {"num_classes": None})
    with pytest.raises(WeightsError, match="does not say how its model is built"):
        load(path)


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no file"):
        load(tmp_path / "none")
    damaged = tmp_path / "damaged.safetensors"
    path = save(nn.Sequential(nn.Linear(4, 4)), Allocation.of({"0": DENSE}), damaged)
    damaged.write_bytes(path.read_bytes()[:40])
    with pytest.raises(WeightsError, match="damaged"):
        load(damaged)
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    with pytest.raises(WeightsError, match="no allocation"):
        load(plain)
    newer = tmp_path / "newer.safetensors"
    save_file({"a": torch.zeros(1)}, newer, {"allocation": "{}", "format": "99"})
    with pytest.raises(WeightsError, match="newer version of RankNAS: it has format 99"):
        load(newer)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    path = save(network, Allocation.of({"0": DENSE}), tmp_path / "n.safetensors")
    content = path.read_bytes()
    for at in range(len(content) - 80, len(content)):  # 20 numbers: nothing else would notice
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x01]) + content[at + 1 :])
        with pytest.raises(WeightsError, match=r"n\.safetensors does not match its checksum"):
            load(path, lambda: network)


def test_files_of_earlier_versions_have_no_checksum(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    path = save(network, Allocation.of({"0": DENSE}), tmp_path / "n.safetensors")
    metadata = read_metadata(path)
    del metadata[CHECKSUM]
    save_file(network.state_dict(), path, metadata)
    again = load(path, lambda: nn.Sequential(nn.Linear(4, 4)))
    assert torch.equal(again.get_parameter("0.weight"), network.get_parameter("0.weight"))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("allocation", "{"),
        ("allocation", '{"0": "svd:x"}'),
        ("allocation", "[" * 100_000),
        ("model", "{"),
        ("model", "[1]"),
        ("shared", "3"),
        ("shared", '{"0.bias": "none"}'),
        ("shared", '{"0.bias": ["0.weight"]}'),
    ],
)
def test_metadata_that_is_nonsense(tmp_path: Path, key: str, text: str) -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    path = save(network, Allocation.of({"0": DENSE}), tmp_path / "n.safetensors")
    metadata = read_metadata(path)
    del metadata[CHECKSUM]
    save_file(network.state_dict(), path, metadata | {key: text})
    with pytest.raises(WeightsError, match=r"metadata of .*n\.safetensors"):
        load(path, lambda: network)


def test_the_wrong_model_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)).eval()
    choices = {"0": Choice("svd", (4,))}
    network = compressed(model, torch.zeros(1, 64), choices)
    path = save(network, Allocation.of(choices), tmp_path / "n.safetensors")
    with pytest.raises(UsageError, match="no layer '0'"):
        load(path, lambda: nn.Linear(64, 64))
    with pytest.raises(WeightsError):
        load(path, lambda: nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 4)))
