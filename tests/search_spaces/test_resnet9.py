"""ResNet-9 of the zoo: its whitened patches, ghost batch norm, and a search on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.compression.batch_norm import reestimate_batch_norm
from rankNAS.data.samples import Samples
from rankNAS.exceptions import UsageError
from rankNAS.io.tensors import read_tensors
from rankNAS.models.weights import trained_model
from rankNAS.recovery.config import TrainingConfig
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model
from rankNAS.search_spaces.zoo.resnet9 import (
    GhostBatchNorm2d,
    ResNet9,
    Whitening,
    whiten,
    whitening_filters,
)

SHAPE = (3, 32, 32)


def images(count: int = 40, side: int = 16) -> Tensor:
    """Smooth images, whose neighbouring pixels and channels are correlated."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    smooth = functional.avg_pool2d(noise, 3, stride=1, padding=1)
    return smooth + smooth.mean(1, keepdim=True) + 0.1 * noise + 0.3


def second_moments(x: Tensor) -> Tensor:
    """The uncentred covariance (9 C, 9 C) of the patches inside images."""
    patches = functional.unfold(x, 3).transpose(1, 2).flatten(0, 1).double()
    return patches.T @ patches / len(patches)


# ---------------------------------------------------------------------------------- the network


def test_the_number_of_parameters() -> None:
    with torch.device("meta"):
        network = build_model("resnet9", num_classes=10, input_shape=SHAPE)
    convolutions = 27 * 64 + 9 * (64 * 128 + 128 * 256 + 256 * 512 + 2 * (128**2 + 512**2))
    norms = 2 * (64 + 128 * 3 + 256 + 512 * 3)
    found = sum(parameter.numel() for parameter in network.parameters())
    assert found == 27 * 27 + convolutions + norms + 5120
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trained == convolutions + norms // 2 + 5120  # neither whitening nor scales


def test_the_pooling_is_that_of_four_pixels() -> None:
    network = build_model("resnet9", num_classes=10, input_shape=SHAPE).eval()
    x = torch.randn(2, *SHAPE)
    features = network.stage3(network.stage2(network.stage1(network.mixed(network.patches(x)))))
    assert features.shape == (2, 512, 4, 4)
    pooled = functional.max_pool2d(features, 4).flatten(1)
    torch.testing.assert_close(network(x), network.linear(pooled) / 16)


def test_its_options() -> None:
    plain = ResNet9(5, 1, 4, whitening=False, ghosts=1, alpha=None)
    assert isinstance(plain.mixed.active, nn.ReLU) and plain.patches.weight.requires_grad
    assert type(plain.patches) is nn.Conv2d and plain(torch.randn(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(UsageError, match="at least 8 x 8"):
        build_model("resnet9", num_classes=5, input_shape=(1, 7, 9))


# ------------------------------------------------------------------------------------ whitening


def test_whitened_patches_have_the_identity_as_second_moments() -> None:
    """T: the second moments are diag(l / (l + epsilon)), the identity as epsilon goes to 0."""
    x = images()
    moments = second_moments(x)
    values = torch.linalg.eigvalsh(moments).flip(0)
    for epsilon in (0.01, 0.0):
        flat = whitening_filters([x[:25], x[25:]], epsilon).flatten(1)
        whitened = flat @ moments @ flat.T
        torch.testing.assert_close(whitened, torch.diag(values / (values + epsilon)))
    torch.testing.assert_close(whitened, torch.eye(27, dtype=torch.float64))


def test_the_layer_gives_whitened_patches() -> None:
    x, layer = images(), Whitening(3)
    patches = functional.unfold(x, 3, padding=1).view(len(x), 27, 16, 16)
    torch.testing.assert_close(layer(x), patches)  # before it is fitted
    whiten(layer, Samples.of(TensorDataset(x, torch.zeros(len(x), dtype=torch.long))))
    inner = layer(x)[:, :, 1:-1, 1:-1].permute(0, 2, 3, 1).flatten(0, 2).double()
    values = torch.linalg.eigvalsh(second_moments(x)).flip(0)
    expected = torch.diag(values / (values + 0.01))
    torch.testing.assert_close(inner.T @ inner / len(inner), expected, atol=1e-5, rtol=1e-5)
    assert not layer.weight.requires_grad


def test_a_training_from_random_weights_whitens_before() -> None:
    network, data = ResNet9(2, 3, 2), Samples.of(TensorDataset(images(8), torch.arange(8) % 2))
    config = TrainingConfig(1, batch_size=4)
    made = trained_model("resnet9", network, data, fingerprint="f", seed=0, config=config)
    torch.testing.assert_close(made.patches.weight, whitening_filters([images(8)]).float())


# -------------------------------------------------------------------------------- ghost batch norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_ghost_is_batch_norm(layout: torch.memory_format) -> None:
    x = images(12).contiguous(memory_format=layout).requires_grad_()
    ghost, norm = GhostBatchNorm2d(3, 1), nn.BatchNorm2d(3)
    for layer in (ghost, norm):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
            layer.bias.copy_(torch.tensor([0.5, 0.0, 3.0]))
    gradients = [torch.autograd.grad(layer(x).pow(3).sum(), x)[0] for layer in (ghost, norm)]
    assert torch.equal(*gradients)
    for own, wanted in zip(ghost.buffers(), norm.buffers(), strict=True):
        assert torch.equal(own, wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_ghost_is_normalised_apart(layout: torch.memory_format) -> None:
    x = images(12).contiguous(memory_format=layout)
    ghost = GhostBatchNorm2d(3, 4)
    with torch.no_grad():
        ghost.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        ghost.bias.copy_(torch.tensor([0.5, 0.0, 3.0]))
    norms = [nn.BatchNorm2d(3) for _ in range(4)]
    found = ghost(x)
    for i, norm in enumerate(norms):
        norm.load_state_dict(ghost.state_dict())
        norm.reset_running_stats()
        part = slice(3 * i, 3 * i + 3)
        torch.testing.assert_close(found[part], norm(x[part]))
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in norms]).mean(0)
        torch.testing.assert_close(getattr(ghost, name), mean)
    assert int(ghost.num_batches_tracked) == 1


def test_in_evaluation_it_is_batch_norm_of_any_batch() -> None:
    x, ghost, norm = images(12), GhostBatchNorm2d(3, 4), nn.BatchNorm2d(3)
    ghost(x)
    norm.load_state_dict(ghost.state_dict())
    assert torch.equal(ghost.eval()(x[:1]), norm.eval()(x[:1]))
    assert [ghost._parts(n) for n in (1, 2, 6, 7, 8, 12)] == [1, 1, 3, 1, 4, 4]


def test_statistics_are_estimated_on_whole_batches() -> None:
    x = images(12)
    layers = [reestimate_batch_norm(kind, x) for kind in (GhostBatchNorm2d(3), nn.BatchNorm2d(3))]
    for own, wanted in zip(*(layer.buffers() for layer in layers), strict=True):
        assert torch.equal(own, wanted)


# --------------------------------------------------------------------------------------- a search


def test_it_is_searched_saved_and_loaded(tmp_path: Path) -> None:
    space = compile_space(
        build_model("resnet9", num_classes=10, input_shape=SHAPE), torch.zeros(1, *SHAPE)
    )
    kept = {"stage1.0.conv", "stage1.1.first.conv", "stage2.conv", "stage3.1.second.conv"}
    assert kept < set(space.layers)
    x, y = images(96, 8), torch.arange(96) % 2
    torch.manual_seed(0)
    network = ResNet9(2, 3, 8)
    data = (TensorDataset(x, y), TensorDataset(x[:32], y[:32]))
    whiten(network, Samples.of(data[0]))
    network.train()(x)
    study = rankNAS.search(
        network.eval(),
        data,
        budget={"macs": 0.6},
        strategy="solve",
        settings=rankNAS.Settings(calibration=32, validation=32),
    )
    found = study.materialise()
    norms = [m for m in found.modules() if isinstance(m, GhostBatchNorm2d)]
    assert len(norms) == 8 and not any(norm.weight.requires_grad for norm in norms)
    file = study.save(tmp_path / "best.safetensors")
    again = rankNAS.load(file, lambda: ResNet9(2, 3, 8))
    assert (
        torch.equal(again(x), found(x))
        and read_tensors(file)[0].keys() == dict(found.state_dict()).keys()
    )
