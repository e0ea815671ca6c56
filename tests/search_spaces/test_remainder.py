"""Every parameter and every operation belongs to a layer of the space or to what is skipped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space


class Many(nn.Module):
    """One module for each kind that no operator decomposes, and one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 64, 2, bidirectional=True, proj_size=16)
        self.gru = nn.GRU(32, 32)
        self.rnn = nn.RNN(32, 32)
        self.bilinear = nn.Bilinear(32, 32, 64)
        self.layer = nn.Linear(64, 64)
        self.up = nn.ConvTranspose1d(64, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.table = nn.Parameter(torch.zeros(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        x, _ = self.rnn(self.gru(x)[0])
        x = self.layer(self.bilinear(x, x))
        x = self.up(x.transpose(1, 2)).transpose(1, 2)
        return self.head((self.norm(x) @ self.table).mean(0))


def whole(space: SearchSpace) -> None:
    """The parts add up to the model, and so do their fractions."""
    parts = [layer.costs[0] for layer in space.layers.values()] + [s.cost for s in space.skipped]
    total = space.dense_cost
    for name in ("macs", "params", "weight_bytes"):
        assert sum(part[name] for part in parts) == total[name]
        assert sum(share[name] for share in space.shares.values()) == pytest.approx(1.0)
    assert len(space.shares) == len(parts)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_kind_has_a_reason_and_a_share(device: str) -> None:
    model = Many().to(device)
    space = compile_space(model, torch.zeros(5, 3, dtype=torch.long, device=device))
    assert list(space.layers) == ["layer"]
    found = {s.name: s for s in space.skipped}
    reasons = {name: s.reason.partition(":")[0] for name, s in found.items()}
    assert reasons == {
        "head": "output layer",
        "Many": "parameters of a Many, which is no layer",
        "embedding": "embedding",
        "lstm": "recurrent",
        "gru": "recurrent",
        "rnn": "recurrent",
        "bilinear": "bilinear",
        "up": "transposed convolution",
        "norm": "norm",
    }
    whole(space)
    assert space.dense_cost.params == sum(p.numel() for p in model.parameters())
    positions = 5 * 3
    # Four gates; two directions; the second layer reads both directions' projections.
    first, second = 4 * 64 * (32 + 16) + 16 * 64, 4 * 64 * (2 * 16 + 16) + 16 * 64
    assert found["lstm"].cost.macs == positions * 2 * (first + second)
    assert found["gru"].cost.macs == positions * 3 * 2 * 32 * 32
    assert found["rnn"].cost.macs == positions * 2 * 32 * 32
    assert found["bilinear"].cost.macs == positions * 32 * 32 * 64
    assert found["Many"].cost.macs == positions * 16 * 16
    assert found["norm"].cost.macs == found["embedding"].cost.macs == 0


def test_packed_sequences_count_their_own_steps() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.layer, self.head = nn.GRU(8, 64), nn.Linear(64, 64), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2]))
            return self.head(self.layer(self.gru(packed)[1][0]))

    space = compile_space(Packed(), torch.zeros(5, 2, 8))
    assert space.skipped[1].cost.macs == 7 * 3 * 64 * (8 + 64)
    whole(space)


class Experts(nn.Module):
    """A router and experts in two fused parameters, as mixture-of-experts models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 32, 64))
        self.down = nn.Parameter(torch.randn(4, 64, 32))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([4, 8, 12, 16], dtype=torch.int32)
        y = torch._grouped_mm(x.bfloat16(), self.up.bfloat16(), offs=ends)
        return torch._grouped_mm(y, self.down.bfloat16(), offs=ends).float()


def test_fused_experts_are_counted_as_computed() -> None:
    model = nn.Sequential(nn.Linear(32, 32), Experts(), nn.Linear(32, 8))
    space = compile_space(model, torch.randn(16, 32))
    experts = space.skipped[-1]
    assert experts.name == "1" and experts.reason.endswith("up 4x32x64, down 4x64x32")
    assert experts.cost.macs == 16 * 32 * 64 * 2  # each row visits one expert
    assert experts.cost.params == 2 * 4 * 32 * 64
    whole(space)


def test_a_parameter_of_two_modules_counts_once() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.middle = nn.Embedding(50, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.middle(self.embedding(tokens)))

    whole(compile_space(Language(), torch.zeros(2, 7, dtype=torch.long), keep_output_dense=False))


@pytest.mark.parametrize("reparametrise", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_reparametrised_layers_stay_dense(reparametrise: str, old: bool) -> None:
    module: Any = nn.utils if old else nn.utils.parametrizations
    first = getattr(module, reparametrise)(nn.Conv1d(8, 64, 3))
    model = nn.Sequential(first, nn.Conv1d(64, 64, 3), nn.Conv1d(64, 8, 3))
    space = compile_space(model, torch.randn(2, 8, 20))
    assert list(space.layers) == ["1"]
    assert [(s.name, s.reason) for s in space.skipped] == [
        ("0", "its weight is parametrised"),
        ("2", "output layer"),
    ]
    whole(space)


def test_hooks_and_patched_forwards_keep_a_layer_dense() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    model[1].register_forward_pre_hook(lambda module, inputs: None)
    original = model[2].forward
    model[2].forward = lambda input: original(input)  # type: ignore[method-assign]
    space = compile_space(model, torch.randn(2, 32))
    assert list(space.layers) == ["3"]
    assert [s.reason for s in space.skipped] == [
        "it has a forward hook",
        "it has a forward pre-hook",
        "its forward is replaced on the instance",
        "output layer",
    ]


class Plain(nn.Linear):
    """A subclass that changes nothing."""


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight / weight.norm(), bias)


def test_subclasses_are_their_base_unless_they_compute_something_else() -> None:
    model = nn.Sequential(Plain(32, 32), nn.Linear(32, 32))
    assert list(compile_space(model, torch.randn(2, 32)).layers) == ["0"]
    with pytest.raises(UsageError, match="0: its class overrides forward"):
        compile_space(nn.Sequential(OwnConvolution(16, 16, 3)), torch.randn(1, 16, 5, 5))


class Functional(nn.Module):
    """Multiplies by the weights of layers in functions, of one as a view, and by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.codes = nn.Embedding(10, 32)
        self.bias_table = nn.Parameter(torch.zeros(5, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = nn.functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        x = (q @ k.T).softmax(-1) @ v @ self.proj.weight.T + self.bias_table[0]
        return x @ self.codes.weight.T


def test_products_in_functions_belong_to_the_weights() -> None:
    model = nn.Sequential(nn.Linear(32, 32), Functional(), nn.Linear(10, 4))
    space = compile_space(model, torch.randn(6, 32))
    found = {s.name: s for s in space.skipped}
    costs = {name: skipped.cost.macs for name, skipped in found.items()}
    assert costs == {
        "1.qkv": 6 * 32 * 96,
        "1.proj": 6 * 32 * 32,
        "1.codes": 6 * 32 * 10,
        "1": 2 * 6 * 6 * 32,
        "2": 6 * 10 * 4,
    }
    reasons = {found[name].reason for name in ("1.qkv", "1.proj", "1.codes")}
    assert reasons == {"its weight is used by '1' (Functional), outside its own call"}
    whole(space)


class Keeps(nn.Module):
    """Keeps a tensor with a graph, appends to a list, and changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.layer(x.mul_(2))
        self.maps.append(self.seen)
        return self.head(self.seen)


def test_a_compiled_model_keeps_nothing_of_the_pass() -> None:
    model, x = Keeps(), torch.ones(2, 32)
    compile_space(model, x)
    assert torch.equal(x, torch.ones(2, 32))
    assert not model.maps and not hasattr(model, "seen")
    copy.deepcopy(model)
