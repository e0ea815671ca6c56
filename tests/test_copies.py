from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.copies import copied, unchanged, without_graphs
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.trainer import train


class Keeping(nn.Module):
    """Keeps its attention map, a list of outputs and a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.maps: list[Tensor] = []
        self.cache: dict[str, Tensor] = {}
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        self.last = out
        self.maps.append(out)
        self.cache["y"] = out
        self.seen = self.seen + 1
        return out


def test_models_that_keep_tensors_with_a_graph_are_copied() -> None:
    model: Any = Keeping()
    model(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    found = copied(model)
    for tensor in (found.last, found.maps[0], found.cache["y"]):
        assert tensor.is_leaf and torch.equal(tensor, model.last)
    assert model.last.requires_grad
    assert found.inner.weight is not model.inner.weight


def test_old_weight_norm_is_copied() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.utils.weight_norm(nn.Conv1d(8, 64, 3))
    x = torch.randn(2, 8, 9)
    assert torch.equal(copied(layer)(x), layer(x))


def test_a_pass_leaves_nothing_behind() -> None:
    model: Any = Keeping()
    kept = torch.ones(3)
    model.maps.append(kept)
    with unchanged(model):
        model(torch.ones(2, 4))
        assert len(model.maps) == 2
    assert model.maps == [kept] and not model.cache and not hasattr(model, "last")
    assert float(model.seen) == 0
    with pytest.raises(ValueError, match="stop"), unchanged(model):
        model(torch.ones(2, 4))
        raise ValueError("stop")
    assert model.maps == [kept]


def test_layers_that_the_first_pass_builds_stay() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.LazyLinear(3)
            self.inner = None

        def forward(self, x: Tensor) -> Tensor:
            if self.inner is None:
                self.inner = nn.Linear(4, 2)
            out: Tensor = self.inner(x).sum() + self.other(x)
            return out

    model: Any = Lazy()
    with unchanged(model):
        model(torch.ones(2, 4))
    assert model.inner.in_features == model.other.in_features == 4


def test_a_training_leaves_no_graph_and_keeps_counters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the old form
                self.hooked = nn.utils.weight_norm(nn.Linear(4, 4))
            self.body = Keeping()
            self.hooked.register_forward_hook(
                lambda m, args, out: setattr(m, "views", out.chunk(2))
            )
            self.passes = 0

        def forward(self, x: Tensor) -> Any:
            self.passes += 1
            return self.hooked(self.body(x))

    model = Model()
    before = model.hooked.weight.detach()
    x, y = torch.randn(8, 4), torch.arange(8) % 4
    train(model, torch.utils.data.TensorDataset(x, y), TrainingConfig(epochs=2, batch_size=4))
    assert model.passes == 4 and model.body.seen == 4
    assert not hasattr(model.body, "last") and not model.body.maps and not model.body.cache
    assert not hasattr(model.hooked, "views")
    assert not model.hooked.weight.requires_grad
    assert not torch.equal(model.hooked.weight, before)  # that of the last step
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_graphs_in_objects_and_buffers_are_cut() -> None:
    class Cache:
        key: Any = None

    model: Any = nn.Linear(4, 4)
    model.cache, model.total = Cache(), nn.Buffer(torch.zeros(2, 4))
    with without_graphs(model):
        model.cache.key = model.total = model.total + model(torch.ones(2, 4))
    assert model.total.any() and copy.deepcopy(model).cache.key is not None
