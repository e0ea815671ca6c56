from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.allocation import Allocation
from rankNAS.compression.factorisation import factorise
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.attention import SeparateAttention, separate_attention
from rankNAS.search_spaces.compiler import compile_space

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 24, 4


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in module.parameters():  # biases start at zero, which would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(module: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    sizes = [(QUERIES, WIDTH), (KEYS, module.kdim), (KEYS, module.vdim)]
    if not batched:
        return [torch.randn(length, width) for length, width in sizes]
    first = module.batch_first
    return [
        torch.randn(*((BATCH, length) if first else (length, BATCH)), width)
        for length, width in sizes
    ]


def assert_equal(module: nn.MultiheadAttention, *args: Tensor, **options: Any) -> None:
    y, weights = module(*args, **options)
    y_separate, weights_separate = separate_attention(module)(*args, **options)
    torch.testing.assert_close(y_separate, y)
    assert (weights is None) == (weights_separate is None)
    if weights is not None:
        torch.testing.assert_close(weights_separate, weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 14}, {"kdim": 10}])
@pytest.mark.parametrize("batched", [True, False])
def test_equals_the_fused_module(
    batch_first: bool, bias: bool, sizes: dict[str, int], batched: bool
) -> None:
    module = attention(batch_first=batch_first, bias=bias, **sizes)
    args = inputs(module, batched)
    for options in (
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
    ):
        assert_equal(module, *args, **options)


def masks() -> dict[str, Tensor]:
    torch.manual_seed(2)
    per_query = torch.rand(QUERIES, KEYS) < 0.4
    per_query[:, 3] = False  # every query keeps a key
    per_head = torch.rand(BATCH * HEADS, QUERIES, KEYS) < 0.4
    per_head[:, :, 3] = False
    return {
        "bool": per_query,
        "float": torch.randn(QUERIES, KEYS),
        "infinite": torch.zeros(QUERIES, KEYS).masked_fill(per_query, float("-inf")),
        "bool per head": per_head,
        "float per head": torch.randn(BATCH * HEADS, QUERIES, KEYS),
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks(mask: str, padded: bool, need_weights: bool, batch_first: bool) -> None:
    module = attention(batch_first=batch_first)
    attn_mask = masks()[mask]
    options: dict[str, Any] = {"attn_mask": attn_mask, "need_weights": need_weights}
    if padded:
        padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
        padding[1, 5:] = padding[2, :2] = True
        # torch wants both masks of one kind
        options["key_padding_mask"] = (
            padding
            if attn_mask.dtype == torch.bool
            else torch.zeros(BATCH, KEYS).masked_fill(padding, float("-inf"))
        )
    assert_equal(module, *inputs(module), **options)


def test_masks_of_one_sample() -> None:
    module = attention()
    args = inputs(module, batched=False)
    padding = torch.arange(KEYS) > 4
    per_head = masks()["bool per head"][:HEADS]
    assert_equal(module, *args, key_padding_mask=padding)
    assert_equal(module, *args, key_padding_mask=padding, attn_mask=masks()["bool"])
    assert_equal(module, *args, attn_mask=per_head, need_weights=False)


def test_causal_hint() -> None:
    module = attention(batch_first=True)
    x = torch.randn(BATCH, KEYS, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(KEYS)
    for need_weights in (True, False):
        options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
        assert_equal(module, x, x, x, **options)
    with pytest.raises(UsageError, match="attn_mask"):
        separate_attention(module)(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients(need_weights: bool) -> None:
    module = attention(batch_first=True)
    separate = separate_attention(module)
    args = [x.requires_grad_() for x in inputs(module)]
    target = torch.randn(BATCH, QUERIES, WIDTH)
    fused, own = (
        torch.autograd.grad(
            (m(*args, need_weights=need_weights)[0] * target).sum(), [*args, *m.parameters()]
        )
        for m in (module, separate)
    )
    names = [name for name, _ in separate.named_parameters()]
    by_name = dict(zip(names, own[3:], strict=True))
    expected = dict(zip([n for n, _ in module.named_parameters()], fused[3:], strict=True))
    for x, y in zip(own[:3], fused[:3], strict=True):
        torch.testing.assert_close(x, y)
    for kind in ("weight", "bias"):
        stacked = torch.cat([by_name[f"{p}_proj.{kind}"] for p in "qkv"])
        torch.testing.assert_close(stacked, expected[f"in_proj_{kind}"])
        torch.testing.assert_close(by_name[f"out_proj.{kind}"], expected[f"out_proj.{kind}"])


def test_dropout_only_in_training() -> None:
    module = attention(dropout=0.5, batch_first=True)
    args = inputs(module)
    assert_equal(module.eval(), *args)
    separate = separate_attention(module.train())
    assert separate.training
    for need_weights in (True, False):
        torch.manual_seed(0)
        a, b = (separate(*args, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.allclose(a, b)


# The original module, not the separate one, takes nested tensors.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_inside_a_transformer_encoder(
    batch_first: bool, norm_first: bool, gradients: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 32, batch_first=batch_first, norm_first=norm_first
    )
    nested = batch_first and not norm_first
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    separate = separate_attention(model)
    assert sum(isinstance(m, SeparateAttention) for m in separate.modules()) == 2
    x = torch.randn(*((BATCH, KEYS) if batch_first else (KEYS, BATCH)), WIDTH)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1, 5:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(KEYS)
    with torch.set_grad_enabled(gradients):
        for options in ({}, {"src_key_padding_mask": padding}, {"mask": causal}):
            expected, found = model(x, **options), separate(x, **options)
            if "src_key_padding_mask" in options:  # what is padded may become anything
                real = ~padding if batch_first else ~padding.T
                expected, found = expected[real], found[real]
            torch.testing.assert_close(found, expected)


def test_inside_a_decoder() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True).eval()
    x, memory = torch.randn(BATCH, QUERIES, WIDTH), torch.randn(BATCH, KEYS, WIDTH)
    torch.testing.assert_close(separate_attention(model)(x, memory), model(x, memory))


def test_the_original_is_not_changed_and_a_model_without_attention_is_not_copied() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, HEADS, 32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    separate = separate_attention(model)
    with torch.no_grad():
        for parameter in separate.parameters():
            parameter.add_(1)
    assert isinstance(model[0].self_attn, nn.MultiheadAttention)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert separate_attention(separate) is separate
    plain = nn.Sequential(nn.Linear(2, 2))
    assert separate_attention(plain) is plain


def test_parameters_are_the_same_number() -> None:
    for options in ({}, {"bias": False}, {"kdim": 10, "vdim": 14}):
        module = attention(**options)
        counts = [
            sum(p.numel() for p in m.parameters()) for m in (module, SeparateAttention(module))
        ]
        assert counts[0] == counts[1]


def test_a_shared_module_stays_shared() -> None:
    module = attention()
    model = nn.ModuleDict({"a": module, "b": module, "c": nn.Sequential(module)})
    separate = separate_attention(model)
    assert isinstance(separate["a"], SeparateAttention)
    assert separate["a"] is separate["b"] is separate["c"][0]


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            y, weights = super().forward(*args, **options)
            return 2 * y, weights

    model = nn.Sequential(Doubled(WIDTH, HEADS))
    assert separate_attention(model) is model


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_added_keys_are_left_alone(option: str) -> None:
    model = nn.Sequential(attention(**{option: True}))
    assert separate_attention(model) is model
    with pytest.raises(UsageError, match=option):
        SeparateAttention(model[0])


def doubled_by_hook(module: nn.MultiheadAttention) -> None:
    module.register_forward_hook(lambda _, args, out: (2 * out[0], out[1]))


def doubled_by_pre_hook(module: nn.MultiheadAttention) -> None:
    module.register_forward_pre_hook(lambda _, args: tuple(2 * x for x in args))


def doubled_by_patch(module: nn.MultiheadAttention) -> None:
    forward = module.forward
    module.forward = lambda *a, **k: (2 * forward(*a, **k)[0], None)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [doubled_by_hook, doubled_by_pre_hook, doubled_by_patch])
def test_hooks_and_patched_forwards_are_kept(change: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(64, 64), nn.MultiheadAttention(64, HEADS)
            self.head = nn.Linear(64, 4)
            change(self.attention)

        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return self.head(self.attention(x, x, x)[0])

    model, x = Model().eval(), torch.randn(5, 2, 64)
    space = compile_space(model, x)
    reasons = {s.name: s.reason for s in space.skipped}
    assert list(space.layers) == ["first"] and "hooks" in reasons["attention"]
    assert sum(s["params"] for s in space.shares.values()) == pytest.approx(1)
    dense = factorise(model, space).materialise(space.dense)
    torch.testing.assert_close(dense(x), model(x))


class Fused(nn.Module):
    """Attention by the fused parameters, outside the call of their module."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, HEADS, bias=bias)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        given = self.attention
        projected = functional.linear(self.first(x), given.in_proj_weight, given.in_proj_bias)
        q, k, v = projected.chunk(3, -1)
        return self.head(given.out_proj(functional.scaled_dot_product_attention(q, k, v)))


@pytest.mark.parametrize("bias", [True, False])
def test_fused_parameters_are_read(bias: bool) -> None:
    module = attention(bias=bias)
    separate: Any = separate_attention(module)
    torch.testing.assert_close(separate.in_proj_weight, module.in_proj_weight)
    assert (separate.in_proj_bias is None) == (module.in_proj_bias is None)
    if bias:
        torch.testing.assert_close(separate.in_proj_bias, module.in_proj_bias)
    assert not hasattr(separate_attention(attention(bias=bias, kdim=10)), "in_proj_weight")


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_that_reads_fused_parameters_keeps_them(bias: bool) -> None:
    torch.manual_seed(0)
    model, x = Fused(bias).eval(), torch.randn(5, 2, 64)
    nn.init.normal_(model.attention.out_proj.weight)
    if bias:
        nn.init.normal_(model.attention.in_proj_bias)
    space = compile_space(model, x)
    reasons = {s.name: s.reason for s in space.skipped}
    assert list(space.layers) == ["first", "attention.out_proj"]
    assert reasons["attention.q_proj"] == "not called in the forward pass"
    dense = factorise(model, space).materialise(space.dense)
    torch.testing.assert_close(dense(x), model(x))


def test_biases_are_read_of_decomposed_projections() -> None:
    """A TransformerEncoderLayer asks for them before it skips its fused path."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(64, HEADS, 64, batch_first=True)).eval()
    nn.init.normal_(model[0].self_attn.in_proj_bias)
    x = torch.randn(2, 5, 64)
    space = compile_space(model, x)
    assert "0.self_attn.q_proj" in space.layers
    allocation = Allocation.of({name: layer.choices[1] for name, layer in space.layers.items()})
    network: Any = factorise(model, space).materialise(allocation)
    found = network[0].self_attn.in_proj_bias
    torch.testing.assert_close(found, model[0].self_attn.in_proj_bias)
    assert network(x).isfinite().all()


def test_frozen_projections_stay_frozen() -> None:
    module = attention().requires_grad_(False)
    assert not any(p.requires_grad for p in separate_attention(module).parameters())
