"""Compression in one call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SmallNet, small
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rankNAS
from rankNAS.compressor import Compression
from rankNAS.exceptions import BudgetError, UsageError

SMALL: dict[str, Any] = {"strategy": "solve", "calibration": 48, "validation": 40}
Pair = tuple[TensorDataset, TensorDataset]


def macs(network: nn.Module) -> int:
    from rankNAS.search_spaces.compiler import count_macs

    return count_macs(network, torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def labelled() -> Pair:
    from networks import split

    return split()


@pytest.mark.parametrize("budget", [0.5, {"macs": 0.5}])
def test_a_network_within_the_budget(labelled: Pair, budget: Any) -> None:
    dense = small()
    before = copy.deepcopy(dense.state_dict())
    network = rankNAS.compress(dense, labelled, budget=budget, **SMALL)
    assert macs(network) <= 0.5 * macs(dense)
    assert not network.training
    assert all(torch.equal(before[name], x) for name, x in dense.state_dict().items())
    found = network.ranknas
    assert isinstance(found, Compression)
    assert found.costs["macs"] == macs(network) and found.dense["macs"] == macs(dense)
    assert set(found.metrics) == {"accuracy", "loss", "kl_divergence", "reverse_kl"}
    assert found.task == "classification of 4 classes"


def test_every_form_of_the_data_gives_the_same_network(labelled: Pair) -> None:
    """Without labels, the task is another one; its norm samples from other likelihoods."""
    x, y = labelled[0].tensors
    forms = [labelled[0], DataLoader(labelled[0], 32), list(zip(x, y, strict=True))]
    networks = [rankNAS.compress(small(), form, budget=0.5, **SMALL) for form in forms]
    outputs = [network(x[:5]) for network in networks]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    unlabelled = rankNAS.compress(small(), x, budget=0.5, **SMALL)
    assert set(unlabelled.ranknas.metrics) == {"distance"}
    assert macs(unlabelled) <= 0.5 * macs(small())


def test_in_place_is_the_same_function(labelled: Pair) -> None:
    x = labelled[1].tensors[0]
    model = small()
    network = rankNAS.compress(small(), labelled, budget=0.5, **SMALL)
    kept = model.bn1
    assert rankNAS.compress_(model, labelled, budget=0.5, **SMALL) is model
    torch.testing.assert_close(model(x), network(x), rtol=0, atol=0)
    assert model.bn1 is kept  # what is not decomposed stays the same module
    assert model.ranknas.allocation == network.ranknas.allocation
    assert macs(model) == macs(network)


class Shared(nn.Module):
    """One encoder for two inputs, reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.right = self.left
        self.head = nn.Linear(64, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.left(a), self.right(b)], -1))
        return out


def test_shared_modules_stay_shared_in_place() -> None:
    torch.manual_seed(0)
    model = Shared()
    pairs = [((torch.randn(64), torch.randn(64)), i % 2) for i in range(60)]
    rankNAS.compress_(model, pairs, budget=0.6, **SMALL)
    assert model.left is model.right and isinstance(model.left[0], nn.Sequential)


def test_what_was_saved_is_loaded(labelled: Pair, tmp_path: Path) -> None:
    network = rankNAS.compress(small(), labelled, budget=0.5, **SMALL)
    path = rankNAS.save(network, tmp_path / "small.safetensors")
    again = rankNAS.load(path, SmallNet)
    x = labelled[1].tensors[0]
    assert torch.equal(again(x), network(x))


def test_what_it_cannot_do_is_said(labelled: Pair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown setting calibrate; known: batch_norm, batch"):
        rankNAS.compress(small(), labelled, budget=0.5, calibrate=3)
    with pytest.raises(BudgetError, match="the smallest possible is"):
        rankNAS.compress(small(), labelled, budget=1e-4, **SMALL)
    with pytest.raises(UsageError, match=r"a SmallNet was given that is not from"):
        rankNAS.save(small(), tmp_path / "x.safetensors")


def test_a_wrapped_model_is_compressed_in_place() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)]
    plain = torch.nn.Sequential(*layers, torch.nn.Linear(64, 4))
    model = torch.nn.DataParallel(plain)
    before = sum(p.numel() for p in plain.parameters())
    data = torch.randn(100, 64)
    assert rankNAS.compress_(model, data, budget=0.6, strategy="solve") is model
    assert set(model._modules) == {"module"} and model.module is plain
    assert sum(p.numel() for p in model.parameters()) < 0.7 * before
