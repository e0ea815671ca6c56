from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import LAYERS
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.allocation import Choice
from rankNAS.compression import calibration
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise
from rankNAS.compression.patches import folded, patches
from rankNAS.decompositions.norms import Statistics
from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import RankNASError
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space

# torch's notice that an even kernel with 'same' padding costs a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")


def space_of(model: nn.Module, inputs: Any, **options: Any) -> SearchSpace:
    return compile_space(
        model, inputs, **{"keep_output_dense": False, "min_weights": 1, **options}
    )


def explicit_patches(layer: nn.Module, x: Tensor) -> Tensor:
    """(g, N, n) patches, read off the layer itself: one by one for each weight.

    A layer whose weight is a one at a single entry outputs that entry of every patch.
    """
    probe = copy.deepcopy(layer).requires_grad_(False)
    g = getattr(layer, "groups", 1)
    weight = probe.weight
    n = weight[0].numel()
    columns = []
    if probe.bias is not None:
        probe.bias.zero_()
    for i in range(n):
        weight.zero_().flatten(1)[:, i] = 1
        y = probe(x)
        y = y.movedim(1, -1) if isinstance(layer, nn.Conv1d | nn.Conv2d) else y
        # all outputs of a group see the same patch; the first of each will do
        columns.append(y.reshape(-1, g, y.shape[-1] // g)[:, :, 0].T)
    return torch.stack(columns, -1)


def moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    x = patches.double()
    return torch.einsum("gNi,gNj->gij", x, x) / x.shape[1], x.mean(1)


def assert_same(a: Statistics, b: Statistics, **tolerance: float) -> None:
    for field in ("input_second_moment", "mean", "output_gradient_second_moment"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_moments_are_those_of_the_patches(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, x = make(), torch.randn(5, *shape) + 0.5
    model = nn.Sequential(layer)
    found = calibrate(model, space_of(model, x[:1]), x, norm="input", batch_size=2)["0"]
    moment, mean = moments(explicit_patches(layer, x))
    assert (
        found.output_gradient_second_moment is None
        and found.input_second_moment.dtype == found.mean.dtype == torch.float64
    )
    torch.testing.assert_close(found.input_second_moment, moment, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=1e-5)


class Small(nn.Module):
    """Convolutions, an in-place activation straight after a layer, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 9, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv1(x), inplace=True)
        x = self.norm(self.conv2(x)).relu_().flatten(1)
        return self.head(functional.relu_(self.linear(x)))


def small() -> tuple[nn.Module, SearchSpace, Tensor]:
    torch.manual_seed(0)
    model = Small().eval()
    x = torch.randn(13, 3, 8, 8)
    return model, space_of(model, x[:1]), x


@pytest.mark.parametrize("sizes", [(1, 13), (4, 128), (5, 6)])
def test_streaming_does_not_change_the_result(sizes: tuple[int, int]) -> None:
    model, space, x = small()
    a, b = (calibrate(model, space, x, norm="input", batch_size=size) for size in sizes)
    for name in space.layers:
        assert_same(a[name], b[name], rtol=1e-5, atol=1e-6)


def sampled_labels(model: nn.Module, x: Tensor, batch_size: int, seed: int = 0) -> Tensor:
    """Labels drawn from the model's probabilities by inversion, as documented by the seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for batch in x.split(batch_size):
        probabilities = model(batch).detach().softmax(-1).flatten(0, -2)
        uniform = torch.rand(len(probabilities), 1, generator=generator)
        labels.append((probabilities.cumsum(-1) < uniform).sum(-1))
    return torch.cat(labels).clamp_max(probabilities.shape[-1] - 1)


def test_the_gradient_moment_is_that_of_autograd() -> None:
    model, space, x = small()
    found = calibrate(model, space, x, norm="fisher", batch_size=5)
    labels = sampled_labels(model, x, 5)
    outputs: dict[str, Tensor] = {}
    reference = copy.deepcopy(model)
    for name in space.layers:

        def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor:
            output.retain_grad()
            outputs[name] = output
            return output.clone()

        reference.get_submodule(name).register_forward_hook(keep)
    functional.cross_entropy(reference(x), labels, reduction="sum").backward()
    assert list(found) == list(space.layers) == ["conv1", "conv2", "linear", "head"]
    for name, layer in space.layers.items():
        D = outputs[name].grad.double()
        D = D.movedim(1, -1) if D.dim() == 4 else D
        D = D.reshape(-1, layer.shape.groups, layer.shape.outputs // layer.shape.groups)
        expected = torch.einsum("Ngi,Ngj->gij", D, D) / len(D)
        assert found[name].output_gradient_second_moment is not None and expected.abs().max() > 0
        torch.testing.assert_close(
            found[name].output_gradient_second_moment, expected, rtol=1e-4, atol=1e-8
        )


def test_the_gradient_at_the_logits_averages_to_the_fisher_in_closed_form() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(2, 6).repeat(20_000, 1)
    found = calibrate(model, space_of(model, x[:1]), x, batch_size=10_000)[
        "0"
    ].output_gradient_second_moment
    p = model(x[:2]).detach().double().softmax(-1)
    # E[(p - e_y)(p - e_y)^T] = diag(p) - p p^T for y drawn from p
    fisher = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    torch.testing.assert_close(found[0], fisher, rtol=0, atol=0.01)  # 3 sigma: 3 / sqrt(4e4) / 2


def test_the_model_is_left_as_it_was() -> None:
    model, space, x = small()
    model.conv1.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    y = model(x)
    for norm in ("fisher", "input"):
        calibrate(model, space, x, norm=norm)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(x), y)


def test_flags_are_restored_when_the_model_raises() -> None:
    model, space, _ = small()
    with pytest.raises(RuntimeError):
        calibrate(model, space, torch.randn(2, 4, 8, 8))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=torch.tanh(self.layer(x)))


def test_a_layer_that_is_called_twice_accumulates() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(11, 8)
    found = calibrate(model, space_of(model, x[:1]), x, batch_size=4)["layer"]
    hidden = torch.tanh(model.layer(x)).detach()
    moment, mean = moments(torch.cat([x, hidden]).unsqueeze(0))
    torch.testing.assert_close(found.input_second_moment, moment, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=1e-6)
    labels = sampled_labels(model, x, 4)
    first = model.layer(x)
    second = model.layer(torch.tanh(first))
    loss = functional.cross_entropy(second, labels, reduction="sum")
    D = torch.cat(torch.autograd.grad(loss, [first, second])).double()
    torch.testing.assert_close(
        found.output_gradient_second_moment[0], D.T @ D / 22, rtol=1e-4, atol=1e-7
    )


def test_tokens_and_logits_per_position() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(5, 7, 8)
    found = calibrate(model, space_of(model, x[:1]), x, batch_size=2)
    torch.testing.assert_close(found["0"].input_second_moment, moments(x.flatten(0, 1)[None])[0])
    labels = sampled_labels(model, x, 2)
    y = model(x).flatten(0, 1).detach().requires_grad_()
    (D,) = torch.autograd.grad(functional.cross_entropy(y, labels, reduction="sum"), y)
    expected = D.double().T @ D.double() / 35
    torch.testing.assert_close(
        found["2"].output_gradient_second_moment[0], expected, rtol=1e-4, atol=1e-7
    )


def test_t_c2_pooled_and_plain_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "POOLED", 2)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 11], [0, 9]])
    space = space_of(model, torch.zeros(1, 8))

    def covariance(norm: Any, x: Tensor) -> Tensor:
        found = calibrate(model, space, functional.pad(x, (0, 6)), norm=norm)["0"]
        return (found.input_second_moment[0] - torch.outer(found.mean[0], found.mean[0]))[:2, :2]

    # inside the groups each pair differs by (2, 0) or (0, 2): variances 2, of one group in two
    torch.testing.assert_close(covariance("pooled", x), torch.eye(2).double())
    plain = torch.tensor([[2 / 3, 0.0], [0.0, 34.0]]).double()
    torch.testing.assert_close(covariance("input", x) * 4 / 3, plain)
    # with equal means in all groups only the divisors differ: 1 of 2 samples against 4
    same = torch.tensor([[1.0, 5], [-1, 5], [0, 6], [0, 4]])
    torch.testing.assert_close(covariance("pooled", same), 2 * covariance("input", same))


@pytest.mark.parametrize("rank", [1, 3])
def test_the_norm_asvd_scales_columns_by_the_square_root_of_mean_absolute_inputs(
    rank: int,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8)).eval()
    x = torch.randn(40, 6) * torch.logspace(-1, 1, 6) + 1
    space = space_of(model, x[:1])
    known = calibrate(model, space, x, norm="asvd", batch_size=7)["0"]
    scale = x.double().abs().mean(0).sqrt()
    torch.testing.assert_close(known.input_second_moment[0], (scale**2).diag(), rtol=1e-5, atol=0)
    layer = factorise(model, space, {"0": known}, norm="asvd").layers["0"]
    weight = model[0].weight.detach().double()
    U, S, V = torch.linalg.svd(weight * scale)
    expected = (U[:, :rank] * S[:rank]) @ V[:rank] / scale
    found = layer.folded(Choice("svd", (rank,)))[0]
    torch.testing.assert_close(found.double().reshape(8, 6), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", [5, 33, 64, 100])
def test_pooled_statistics_are_averages_over_even_groups(samples: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, groups=1)).eval()
    x = torch.randn(samples, 3, 6, 5) + torch.arange(samples).reshape(-1, 1, 1, 1) / 10
    found = calibrate(model, space_of(model, x[:1]), x, norm="pooled", batch_size=7)["0"]
    shape, count = LayerShape.of(model[0]), max(1, samples // 32)
    groups = [patches(shape, part)[:, :, folded(shape)] for part in x.tensor_split(count)]
    mean = torch.stack([g.double().mean(1) for g in groups]).mean(0)
    covariance = torch.stack([torch.cov(g[0].double().T) for g in groups]).mean(0)
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=1e-5)
    centred = found.input_second_moment - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    torch.testing.assert_close(centred[0], covariance, rtol=1e-4, atol=1e-4)


class Unbatched(nn.Module):
    """Convolutions that see one image at a time, without a batch dimension."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.conv, self.head, self.batched = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), batched

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) if self.batched else torch.stack([self.conv(image) for image in x])
        return self.head(y.mean((2, 3)))


def test_inputs_without_a_batch_dimension() -> None:
    torch.manual_seed(0)
    one, all_ = Unbatched(False), Unbatched(True)
    all_.load_state_dict(one.state_dict())
    x = torch.randn(4, 3, 5, 6)
    a, b = (calibrate(model, space_of(model, x), x) for model in (one, all_))
    assert_same(a["conv"], b["conv"], rtol=1e-5, atol=1e-8)


class Aside(nn.Module):
    """The logits do not depend on `aside`."""

    def __init__(self) -> None:
        super().__init__()
        self.aside, self.main, self.state = nn.Linear(8, 8), nn.Linear(8, 4), None

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.aside(x)
        return self.main(x)


def test_a_layer_that_does_not_reach_the_logits_has_no_gradient() -> None:
    model, x = Aside(), torch.randn(6, 8)
    found = calibrate(model, space_of(model, x[:1]), x)
    assert torch.equal(
        found["aside"].output_gradient_second_moment, torch.zeros(1, 8, 8, dtype=torch.float64)
    )
    assert found["main"].output_gradient_second_moment.abs().max() > 0


def test_the_original_of_a_model_with_fused_attention_can_be_calibrated() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    model, x = nn.Sequential(encoder, nn.Linear(8, 3)).eval(), torch.randn(4, 5, 8)
    space = space_of(model, x[:1])
    found = calibrate(model, space, x)
    assert set(found) == set(space.layers) and "0.self_attn.q_proj" in found
    for name in "qkv":  # all three see the encoder's input
        expected = moments(x.flatten(0, 1)[None])[0]
        torch.testing.assert_close(found[f"0.self_attn.{name}_proj"].input_second_moment, expected)


def test_a_hugging_face_layer_equals_a_linear_one() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    linear, hf, x = nn.Linear(8, 6), conv1d(6, 8), torch.randn(9, 8)
    with torch.no_grad():
        hf.weight.copy_(linear.weight.T)
        hf.bias.copy_(linear.bias)
    found = []
    for layer in (linear, hf):
        model = nn.Sequential(layer)
        found.append(calibrate(model, space_of(model, x[:1]), x)["0"])
    assert_same(*found, rtol=1e-5, atol=1e-7)


def test_the_weight_metric_needs_no_pass() -> None:
    model, space, _ = small()
    assert calibrate(model, space, torch.empty(0), norm="weight") == {}


def test_deterministic_for_a_seed() -> None:
    model, space, x = small()
    a, b, other = (calibrate(model, space, x, seed=seed) for seed in (3, 3, 4))
    for name in space.layers:
        assert_same(a[name], b[name], rtol=0, atol=0)
        assert torch.equal(a[name].input_second_moment, other[name].input_second_moment)
        assert not torch.equal(
            a[name].output_gradient_second_moment, other[name].output_gradient_second_moment
        )


def test_progress() -> None:
    model, space, x = small()
    seen: list[tuple[int, int]] = []
    calibrate(model, space, x, batch_size=5, on_batch=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def counting(model: nn.Module) -> list[int]:
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    model.register_forward_pre_hook(count)
    return passes


@pytest.mark.parametrize("norm", ["input", "fisher", "pooled", "asvd"])
def test_the_cache_gives_the_same_without_a_pass(tmp_path: Path, norm: Any) -> None:
    model, space, x = small()
    passes = counting(model)
    first = calibrate(model, space, x, norm=norm, cache=tmp_path / "new")
    assert passes == [1] and len(list((tmp_path / "new").iterdir())) == 1
    second = calibrate(model, space, x, norm=norm, cache=tmp_path / "new")
    assert passes == [1]
    for name in space.layers:
        assert_same(first[name], second[name], rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["empty", "truncated", "short", "noise", "other", "flipped"])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    model, space, x = small()
    first = calibrate(model, space, x, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "other":
        head = space.restrict({n: () for n in space.layers})
        partial = SearchSpace(
            {"head": head.layers["head"]}, (), space.remainder_cost, space.input_shape
        )
        calibrate(model, partial, x, cache=tmp_path / "partial")
        (other,) = (tmp_path / "partial").iterdir()
        other.replace(file)
    else:
        last = content[:-9] + bytes([content[-9] ^ 0x10]) + content[-8:]  # in a number
        bad = {
            "empty": b"",
            "truncated": content[: len(content) // 2],
            "short": content[:-1],
            "noise": b"\xff" * 99,
            "flipped": last,
        }
        file.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING):
        again = calibrate(model, space, x, cache=tmp_path)
    assert "is made again" in caplog.text and str(file) in caplog.text
    for name in space.layers:
        assert_same(first[name], again[name], rtol=0, atol=0)
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_not_fatal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, space, x = small()
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        found = calibrate(model, space, x, norm="input", cache=tmp_path / "file")
    assert set(found) == set(space.layers) and "could not be cached" in caplog.text


def test_the_key_is_of_the_contents(tmp_path: Path) -> None:
    model, space, x = small()

    def files() -> int:
        return len(list(tmp_path.iterdir()))

    def run(model: nn.Module = model, x: Tensor = x, **options: Any) -> None:
        calibrate(model, space, x, **{"norm": "input", "cache": tmp_path, **options})

    run()
    run(copy.deepcopy(model), x.clone(), batch_size=3)
    assert files() == 1
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.head.bias[0] += 1e-6
    run(changed)
    assert files() == 2
    statistics = copy.deepcopy(model)
    statistics.norm.running_mean[0] += 1
    run(statistics)
    assert files() == 3
    other = x.clone()
    other[-1, 0, 0, 0] += 1e-6
    run(x=other)
    run(x=x[:-1])
    assert files() == 5
    run(seed=1)
    run(norm="fisher")
    run(norm="pooled")
    assert files() == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", ["input", "fisher", "pooled", "asvd"])
def test_values_that_are_not_finite(tmp_path: Path, bad: float, norm: Any) -> None:
    model, space, x = small()
    x[7, 1, 2, 3] = bad
    with pytest.raises(RankNASError, match="layer 'conv1' are not finite"):
        calibrate(model, space, x, norm=norm, cache=tmp_path)
    assert not list(tmp_path.iterdir())


class Checkpointed(nn.Module):
    """Two layers inside a checkpoint, or the same layers without one."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self._inner(x).relu())
        run: Any = torch.utils.checkpoint.checkpoint
        return self.head(run(self._inner, x, use_reentrant=self.reentrant).relu())

    def _inner(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_layers_inside_a_checkpoint_are_recorded_once(reentrant: bool) -> None:
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (None, reentrant):
        model = Checkpointed(kind)
        space = compile_space(model, x[:1])
        found.append(calibrate(model, space, x, norm="fisher"))
    for name, plain in found[0].items():
        recorded = found[1][name]
        assert torch.equal(recorded.input_second_moment, plain.input_second_moment)
        expected = plain.output_gradient_second_moment
        assert torch.equal(recorded.output_gradient_second_moment, expected)  # type: ignore[arg-type]
