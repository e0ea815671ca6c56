"""Weights as users have them: checkpoints with other entries, keys, prefixes and parts."""

from __future__ import annotations

import argparse
import datetime
import json
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

import rankNAS
from rankNAS.exceptions import WeightsError
from rankNAS.models.weight_files import read_weights


class Net(nn.Module):
    """A network with a batch norm and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.embed, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.head.weight = self.embed.weight


def model() -> Net:
    torch.manual_seed(0)
    return Net()


def state() -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in model().state_dict().items()}


def check(path: Path, target: nn.Module | None = None) -> None:
    """Load the weights of a file and compare them with `state`."""
    network = model() if target is None else target
    rankNAS.load_weights(network, path)
    values = list(state().values())
    assert all(
        torch.equal(*pair) for pair in zip(network.state_dict().values(), values, strict=True)
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.backbone.", "0."])
@pytest.mark.parametrize("key", [None, "model_state_dict", "net", "params", "state_dict_ema"])
def test_any_prefix_under_any_key(tmp_path: Path, prefix: str, key: str | None) -> None:
    named: dict[str, Any] = {prefix + name: tensor for name, tensor in state().items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    checkpoint = {"epoch": 3, "optimizer": optimizer, "loss": torch.tensor(2.0)}
    torch.save(named if key is None else {**checkpoint, key: named}, tmp_path / "a.pt")
    check(tmp_path / "a.pt")


def test_an_entry_of_an_entry_and_plain_numbers_among_the_tensors(tmp_path: Path) -> None:
    torch.save({"checkpoint": {"net": {**state(), "epoch": 3}, "step": 1}}, tmp_path / "a.pt")
    check(tmp_path / "a.pt")


def test_prefixes_of_the_model_are_added(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.pt")
    check(tmp_path / "a.pt", nn.DataParallel(model()))
    check(tmp_path / "a.pt", torch.compile(model(), backend="eager"))


def test_missing_counters_are_zero_and_tied_weights_have_one_name(tmp_path: Path) -> None:
    given = {n: x for n, x in state().items() if n not in ("norm.num_batches_tracked",)}
    del given["head.weight"]
    save_file(given, tmp_path / "a.safetensors")
    network = model()
    network.norm.num_batches_tracked += 7  # type: ignore[operator]
    rankNAS.load_weights(network, tmp_path / "a.safetensors")
    assert network.norm.num_batches_tracked == 0
    assert network.head.weight is network.embed.weight
    assert torch.equal(network.head.weight, given["embed.weight"])


def test_harmless_values_beside_the_weights(tmp_path: Path) -> None:
    beside: dict[str, Any] = {
        "args": argparse.Namespace(lr=0.1, out=tmp_path, data=Path("a/b")),
        "best": np.float64(0.9),
        "history": np.arange(3),
        "when": datetime.datetime(2026, 1, 1),
        "log": OrderedDict(loss=[np.float32(1.0)]),
        "state": defaultdict(dict, {0: {}}),
        "last": deque([0.1, 0.2], maxlen=2),
        "frozen": frozenset({"head"}),
        "torch": torch.__version__,
    }
    for zipped in (True, False):
        torch.save(
            {**beside, "model": state()},
            tmp_path / "a.pt",
            _use_new_zipfile_serialization=zipped,
        )
        check(tmp_path / "a.pt")


def test_values_beside_the_weights_are_not_made(tmp_path: Path) -> None:
    """What stands for them has no content, so nothing of NumPy or argparse is called."""
    torch.save({"best": np.float64(0.9), "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    content, _ = read_weights(tmp_path / "a.pt")
    assert {type(value).__module__ for value in content.values()} == {read_weights.__module__}
    with pytest.raises(WeightsError, match="no dict of tensors"):
        rankNAS.load_weights(model(), tmp_path / "a.pt")


def test_several_entries_that_fit_are_named(tmp_path: Path) -> None:
    torch.save({"model": state(), "model_ema": state()}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"several .*\['model'\], \['model_ema'\]; take out"):
        rankNAS.load_weights(model(), tmp_path / "a.pt")
    small = {name: tensor[:1] for name, tensor in state().items() if tensor.dim()}
    torch.save({"model": state(), "teacher": small}, tmp_path / "a.pt")
    check(tmp_path / "a.pt")


def test_a_prefix_of_some_names_is_named(tmp_path: Path) -> None:
    named = {f"model.{name}": tensor for name, tensor in state().items()}
    torch.save({"net": {**named, "loss.weight": torch.zeros(2)}}, tmp_path / "a.pt")
    with pytest.raises(WeightsError) as found:
        rankNAS.load_weights(model(), tmp_path / "a.pt")
    for words in (r"(under ['net'])", "11 names that begin with 'model.'", "loss.weight"):
        assert words in str(found.value)


def test_versions_of_modules_move_with_their_names(tmp_path: Path) -> None:
    """Without its version, the state dict would count as one of an old PyTorch."""
    seen = []

    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, *given: Any) -> None:
            seen.append(given[2].get("version"))
            super()._load_from_state_dict(*given)

    network = nn.Sequential(OrderedDict(inner=nn.Sequential(Versioned(2, 2))))
    torch.save(nn.DataParallel(network).state_dict(), tmp_path / "a.pt")
    torch.save({"net": network.state_dict()}, tmp_path / "b.pt")
    save_file(network.state_dict(), tmp_path / "c.safetensors")  # has no versions
    Versioned._version = 4
    for name in ("a.pt", "b.pt", "c.safetensors"):
        rankNAS.load_weights(network, tmp_path / name)
    assert seen == [3, 3, 4]


def test_a_network_that_insists_on_its_version(tmp_path: Path) -> None:
    network = torchvision.models.mnasnet0_5()
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    torch.save(nn.DataParallel(network).state_dict(), tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        rankNAS.load_weights(network, tmp_path / name)


def write_parts(folder: Path, suffix: str) -> Path:
    names = sorted(state())
    where: dict[str, str] = {}
    for i in range(2):
        file = f"part-{i}{suffix}"
        part = {name: state()[name] for name in names[i::2]}
        if suffix == ".safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    path = folder / f"model{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_files_in_parts(tmp_path: Path, suffix: str) -> None:
    path = write_parts(tmp_path, suffix)
    check(path)
    check(tmp_path)
    (tmp_path / f"part-1{suffix}").unlink()
    with pytest.raises(WeightsError, match=r"part-1\S+, named by model\S+json, is missing"):
        rankNAS.load_weights(model(), path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index of weights"),
        ("[]", "is no index of weights"),
        ('{"weight_map": {"a": 3}}', "is no index of weights"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a file of its folder"),
        ('{"weight_map": {"zz": "part-0.safetensors"}}', "lacks 'zz'"),
    ],
)
def test_a_wrong_index(tmp_path: Path, index: str, message: str) -> None:
    write_parts(tmp_path, ".safetensors").write_text(index)
    with pytest.raises(WeightsError, match=message):
        rankNAS.load_weights(model(), tmp_path)


def test_a_folder_without_weights_and_a_model_without_memory(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a folder without exactly one"):
        rankNAS.load_weights(model(), tmp_path)
    save_file(state(), tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="on the meta device"):
        rankNAS.load_weights(model().to("meta"), tmp_path)
