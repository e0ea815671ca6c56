from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from rankNAS.allocation import Allocation
from rankNAS.compression.factorisation import skeleton
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space, count_macs
from rankNAS.search_spaces.zoo import SPACES, build_model

ALL: dict[str, Any] = {"keep_output_dense": False, "min_weights": 1}


def counted(model: nn.Module, *inputs: Any) -> int:
    """MACs as the FLOP counter alone finds them, two FLOPs each."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def drawn(space: SearchSpace, rng: random.Random) -> Allocation:
    return Allocation.of({n: rng.choice(layer.choices) for n, layer in space.layers.items()})


def reasons(space: SearchSpace) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in space.skipped}


@pytest.mark.parametrize("name", SPACES)
def test_costs_of_the_built_in_networks_are_those_of_the_flop_counter(name: str) -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return build_model(name, num_classes=10, input_shape=(3, 32, 32))

    x = torch.empty(2, 3, 32, 32, device="meta")
    model = build()
    space = compile_space(model, x)
    assert space.dense_cost.macs == counted(model, x)
    assert space.dense_cost.params == parameters(model)
    assert space.dense_cost.weight_bytes == 4 * parameters(model)
    allocation = drawn(space, random.Random(name))
    network = skeleton(build(), allocation)
    assert space.cost(allocation).macs == counted(network, x)
    assert space.cost(allocation).params == parameters(network)


CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(24, 36), (5, 24)),
    (nn.Linear(24, 36, bias=False), (2, 7, 24)),
    (nn.Conv1d(16, 24, 5, stride=2, padding=3, dilation=2), (2, 16, 33)),
    (nn.Conv1d(16, 24, 3, padding="same", groups=2), (3, 16, 20)),
    (nn.Conv1d(12, 24, 3, padding="valid", padding_mode="circular"), (12, 20)),
    (nn.Conv2d(16, 24, 3, stride=(2, 1), padding=(1, 2)), (2, 16, 11, 9)),
    (nn.Conv2d(16, 32, (3, 5), dilation=(2, 1), padding="same", bias=False), (1, 16, 9, 12)),
    (nn.Conv2d(16, 32, 3, padding=1, groups=4, padding_mode="reflect"), (2, 16, 8, 8)),
    (nn.Conv2d(16, 32, 1, stride=2), (3, 16, 7, 7)),
    (nn.Conv2d(12, 18, (1, 3), padding=(0, 1), groups=3), (12, 7, 7)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v)[:60])
def test_every_choice_of_one_layer_costs_what_the_counter_says(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(layer)
    x = torch.randn(shape)
    space = compile_space(model, x, **ALL)
    assert (
        space.remainder_cost.macs
        == space.remainder_cost.params
        == space.remainder_cost.weight_bytes
        == 0
    )
    for choice, cost in space.layers["0"].items():
        network = skeleton(nn.Sequential(layer), {"0": choice}).to_empty(device="cpu")
        network.load_state_dict({n: torch.zeros_like(p) for n, p in network.named_parameters()})
        assert cost.macs == counted(network, x)
        assert cost.params == parameters(network)
        assert cost.weight_bytes == weight_bytes(network)
        assert network(x).shape == model(x).shape


def test_hf_conv1d_is_a_linear_layer() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(48, 32))
    x = torch.randn(2, 5, 32)
    space = compile_space(model, x, **ALL)
    assert space.dense_cost.macs == 2 * 5 * 32 * 48 == counted(model, x)
    assert space.dense_cost.params == 32 * 48 + 48
    linear = compile_space(nn.Sequential(nn.Linear(32, 48)), x, **ALL)
    assert linear.layers["0"].choices == space.layers["0"].choices
    assert linear.layers["0"].costs == space.layers["0"].costs


class Repeated(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(32, 32), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


def test_repeated_calls_multiply_the_macs_and_not_the_parameters() -> None:
    once, thrice = (
        compile_space(Repeated(n), torch.randn(3, 32), **ALL).layers["layer"] for n in (1, 3)
    )
    assert once.choices == thrice.choices
    for choice in once:
        assert thrice[choice].macs == 3 * once[choice].macs
        assert thrice[choice].params == once[choice].params


def test_the_batch_multiplies_the_macs() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(2), nn.Linear(36, 40))
    one, four = (compile_space(model, torch.randn(n, 8, 8, 8), **ALL) for n in (1, 4))
    assert four.input_shape == (4, 8, 8, 8)
    assert four.dense_cost.macs == 4 * one.dense_cost.macs
    assert four.dense_cost.params == one.dense_cost.params
    assert count_macs(model, torch.randn(4, 8, 8, 8)) == four.dense_cost.macs


def test_attention_costs_the_same_on_every_device() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    x = torch.randn(2, 6, 32)
    # four projections, the scores and their product with the values, two feed-forward layers
    expected = 2 * 6 * 4 * 32 * 32 + 2 * (2 * 6 * 6 * 32) + 2 * 6 * 2 * 32 * 64
    for device in ("cpu", "meta"):
        space = compile_space(layer.to(device), x.to(device))
        assert space.dense_cost.macs == expected
        projections = {f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")}
        assert projections <= set(space.layers)
        assert space.dense_cost.params == parameters(layer)


class TwoPaths(nn.Module):
    """Two linear layers: the same module, or two modules with one weight."""

    def __init__(self, second: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.a = nn.Linear(40, 40)
        self.b = second(self.a)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


def same(a: nn.Linear) -> nn.Module:
    return a


def sharing(a: nn.Linear) -> nn.Module:
    b = nn.Linear(40, 40)
    b.weight, b.bias = a.weight, a.bias
    return b


@pytest.mark.parametrize("second", [same, sharing])
def test_a_tied_weight_is_one_layer(second: Callable[[nn.Linear], nn.Module]) -> None:
    x = torch.randn(5, 40)
    model = TwoPaths(second)
    space = compile_space(model, x)
    assert list(space.layers) == ["a"]
    assert space.layers["a"].paths == ("a", "b")
    assert space.dense_cost.params == parameters(model) == 40 * 41 + 41 * 10
    assert space.dense_cost.macs == 5 * (2 * 40 * 40 + 40 * 10)
    for choice in space.layers["a"]:
        with torch.device("meta"):  # moving there later would untie the weights
            network = skeleton(TwoPaths(second), {"a": choice})
        assert parameters(network) == space.cost({"a": choice}).params
        assert counted(network, x.to("meta")) == space.cost({"a": choice}).macs


def other_bias(a: nn.Linear) -> nn.Module:
    b = nn.Linear(40, 40)
    b.weight = a.weight
    return b


def transposed(a: nn.Linear) -> nn.Module:
    b = pytest.importorskip("transformers.pytorch_utils").Conv1D(40, 40)
    b.weight, b.bias = a.weight, a.bias
    return b


@pytest.mark.parametrize(
    ("second", "reason"), [(other_bias, "different biases"), (transposed, "different settings")]
)
def test_a_weight_that_is_used_in_two_ways_stays_dense(
    second: Callable[[nn.Linear], nn.Module], reason: str
) -> None:
    with pytest.raises(UsageError, match=f"a: its weight is tied under {reason}"):
        compile_space(TwoPaths(second), torch.randn(5, 40))


def test_convolutions_with_one_weight_and_two_strides_stay_dense() -> None:
    first, second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, stride=2)
    second.weight, second.bias = first.weight, first.bias
    model = nn.Sequential(first, second, nn.Conv2d(16, 16, 3))
    space = compile_space(model, torch.randn(1, 16, 9, 9), **ALL)
    assert list(space.layers) == ["2"]
    assert reasons(space) == {"0": "its weight is tied under different settings"}


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.middle = nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(tokens)))


def test_a_weight_tied_with_an_embedding_stays_dense() -> None:
    model = Language()
    space = compile_space(model, torch.zeros(2, 7, dtype=torch.long), keep_output_dense=False)
    assert list(space.layers) == ["middle"]
    assert reasons(space) == {"head": "its weight is used by another kind of module"}
    assert space.dense_cost.params == parameters(model) == 50 * 32 + 33 * 32
    assert space.remainder_cost.macs == 2 * 7 * 32 * 50


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * functional.linear(x, self.weight.abs(), self.bias)


class Everything(nn.Module):
    """One layer for each reason to stay dense, and one that is decomposable."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(64, 64, 31, padding="same", groups=64)
        self.tiny = nn.Linear(64, 8)
        self.narrow = nn.Linear(8, 1024)
        self.back = nn.Linear(1024, 64)
        self.excluded = nn.Linear(64, 64)
        self.uncalled = nn.Linear(64, 64)
        self.parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.pruned = nn.Linear(64, 64)
        prune.l1_unstructured(self.pruned, "weight", 0.5)
        self.own = OwnForward(64, 64)
        self.head = nn.Linear(64, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x.T).T
        x = self.back(self.narrow(self.tiny(x)))
        return self.head(self.own(self.pruned(self.parametrised(self.excluded(x)))))


def test_reasons_to_stay_dense() -> None:
    model = Everything()
    x = torch.randn(9, 64)
    space = compile_space(model, x, exclude=["^excl"], min_weights=1024)
    assert list(space.layers) == ["narrow", "back"]
    assert reasons(space) == {
        "depthwise": "depthwise: one channel a group",
        "tiny": "tiny: fewer than 1024 weights",
        "excluded": "excluded",
        "uncalled": "not called in the forward pass",
        "parametrised": "its weight is parametrised",
        "pruned": "its weight is parametrised",
        "own": "its class overrides forward",
        "head": "output layer",
    }
    costs = {skipped.name: skipped.cost for skipped in space.skipped}
    assert costs["head"].macs == 9 * 64 * 100 and costs["uncalled"].macs == 0
    # the whole model, whatever stays dense
    assert space.dense_cost.macs == counted(model, x)
    assert space.dense_cost.params == parameters(model)
    freed = compile_space(model, x, min_weights=1)
    assert set(reasons(freed)) == set(reasons(space)) - {"excluded", "tiny"}


def test_where_no_rank_is_cheaper_the_reason_says_so() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 64), nn.Linear(64, 64))
    space = compile_space(model, torch.randn(3, 2), **ALL)
    # rank r of a 2 x 2 layer has 4 r weights, at least as many as the dense one
    assert reasons(space)["0"] == "no rank costs less than the dense layer"


def test_a_model_that_is_one_layer_has_no_path_to_replace() -> None:
    with pytest.raises(UsageError, match=r"wrap it in nn\.Sequential"):
        compile_space(nn.Linear(64, 64), torch.randn(1, 64), keep_output_dense=False)


def test_training_flags_and_hooks_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Dropout(), nn.Linear(32, 32)))
    model.train()
    model[1][0].eval()
    flags = [m.training for m in model.modules()]
    compile_space(model, torch.randn(1, 32))
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(UsageError):
        compile_space(model, torch.randn(1, 31))
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(40, 48), nn.Linear(56, 48)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(input=left) * self.right(right)


def test_tuples_dicts_and_keyword_calls() -> None:
    left, right = torch.randn(3, 40), torch.randn(3, 56)
    model = TwoInputs()
    spaces = [
        compile_space(model, inputs, **ALL)
        for inputs in ((left, right), [left, right], {"right": right, "left": left})
    ]
    for space in spaces:
        assert space.dense_cost.macs == 3 * 48 * (40 + 56)
        assert space.layers["left"].shape.calls == ((3,),)
        assert space.layers["right"].shape.calls == ((3,),)
    assert [space.input_shape for space in spaces] == [(3, 40), (3, 40), (3, 56)]


def test_layers_are_in_the_order_of_the_forward_pass() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z, self.y, self.x = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.z(self.y(self.x(inputs)))

    space = compile_space(Backwards(), torch.randn(1, 32))
    assert list(space.layers) == ["x", "y"] and reasons(space) == {"z": "output layer"}


def test_half_precision_weights_have_two_bytes() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10))
        model = model.to(torch.bfloat16)
        x = torch.empty(1, 64, dtype=torch.bfloat16)
    space = compile_space(model, x)
    for choice in (space.layers["0"].choices[0], space.layers["0"].choices[-1]):
        cost = space.cost({"0": choice})
        network = skeleton(model, {"0": choice})
        assert weight_bytes(network) == cost.weight_bytes == 2 * cost.params
        assert network(x).dtype == torch.bfloat16


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(UsageError, match=r"Sequential does not run.*\(1, 5\): RuntimeError"):
        compile_space(nn.Sequential(nn.Linear(64, 64)), torch.randn(1, 5))
    with pytest.raises(UsageError, match="missing 1 required positional argument"):
        compile_space(TwoInputs(), (torch.randn(1, 40),))


def test_nothing_to_decompose_lists_the_reasons() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(UsageError, match=r"0: tiny: fewer than 1024 weights\. 1: output layer\."):
        compile_space(model, torch.randn(1, 4))
    with pytest.raises(UsageError, match="no layer of ReLU can be decomposed"):
        compile_space(nn.ReLU(), torch.randn(1, 4))


LLAMA = """
import resource, time, torch
from torch import nn
from torch.nn import functional
from rankNAS.search_spaces.compiler import compile_space

class Block(nn.Module):
    def __init__(self, d, hidden, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for p in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB to GiB

with torch.device("meta"):
    model = nn.Sequential(nn.Embedding(32000, 4096), *(Block(4096, 11008, 32) for _ in range(32)),
                          nn.RMSNorm(4096), nn.Linear(4096, 32000, bias=False))
    tokens = torch.zeros(1, 128, dtype=torch.long)
before, started = peak(), time.process_time()  # whatever else the machine does
space = compile_space(model, tokens)
print(time.process_time() - started, peak() - before, space.dense_cost.params,
      space.dense_cost.macs, len(space.layers))
"""


@pytest.mark.slow
def test_seven_billion_parameters_compile_on_meta() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LLAMA], capture_output=True, text=True, check=True, timeout=120
    )
    seconds, gigabytes, params, macs, layers = map(float, done.stdout.split())
    per_block = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert params == 32 * (per_block + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert macs == 128 * (32 * per_block + 32000 * 4096) + 32 * 2 * 128 * 128 * 4096
    assert layers == 32 * 7
    assert seconds < 10 and gigabytes < 1


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<n>x)(?P<n>y)"])
def test_what_is_no_regular_expression(pattern: str) -> None:
    with pytest.raises(UsageError, match="is no regular expression .*give one such as"):
        compile_space(nn.Linear(64, 64), torch.zeros(1, 64), exclude=[pattern])


def test_a_model_without_layers_is_refused_with_its_largest_parts() -> None:
    volumes = nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(UsageError, match="0: 3-D convolution: no operator decomposes it. 3: outp"):
        compile_space(volumes, torch.zeros(1, 3, 5, 5, 5))
