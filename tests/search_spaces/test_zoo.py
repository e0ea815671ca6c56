from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.search_spaces.zoo import SPACES, build_model
from rankNAS.search_spaces.zoo.cifar import PadShortcut

CIFAR = (3, 32, 32)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def cifar_resnet_parameters(blocks: int, classes: int) -> int:
    """Convolutions, batch norms and the classifier of He et al. 2016, section 4.2, option A."""
    widths = [16] + [16] * 2 * blocks + [32] * 2 * blocks + [64] * 2 * blocks
    convolutions = sum(9 * a * b for a, b in zip([3, *widths], widths, strict=False))
    return convolutions + 2 * sum(widths) + 65 * classes


@pytest.mark.parametrize(
    ("name", "blocks", "count"), [("resnet20", 3, 269_722), ("resnet56", 9, 853_018)]
)
def test_cifar_resnet_parameter_count(name: str, blocks: int, count: int) -> None:
    with torch.device("meta"):
        network = build_model(name, num_classes=10, input_shape=CIFAR)
    # 0.27 M and 0.85 M in table 6 of the paper; projections (option B) would have 2,752 more.
    assert parameters(network) == cifar_resnet_parameters(blocks, 10) == count


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.69), ("resnet34", 21.80), ("resnet50", 25.56), ("mobilenet_v2", 3.50)]
    + [("vgg16_bn", 138.37), ("vit_b_16", 86.57)],
)
def test_imagenet_networks_have_the_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = build_model(name, num_classes=1000, input_shape=(3, 224, 224))
        assert network(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", SPACES)
def test_every_space_builds_on_meta_for_small_images(name: str) -> None:
    with torch.device("meta"):
        network = build_model(name, num_classes=7, input_shape=CIFAR)
        assert network(torch.empty(2, *CIFAR)).shape == (2, 7)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert SPACES[name].name == name


def test_cifar_state_dict_names() -> None:
    names = set(build_model("resnet20", num_classes=10, input_shape=CIFAR).state_dict())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    blocks = [f"layer{stage}.{block}." for stage in (1, 2, 3) for block in range(3)]
    expected = {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn1.{end}" for end in norm}
    expected |= {f"{block}conv{i}.weight" for block in blocks for i in (1, 2)}
    expected |= {f"{block}bn{i}.{end}" for block in blocks for i in (1, 2) for end in norm}
    assert names == expected


def test_option_a_shortcut_subsamples_and_pads_equally() -> None:
    shortcut = PadShortcut(16)
    features = torch.randn(2, 16, 7, 7)
    out = shortcut(features)
    assert out.shape == (2, 32, 4, 4) and not list(shortcut.parameters())
    torch.testing.assert_close(out[:, 8:24], features[:, :, ::2, ::2], rtol=0, atol=0)
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_a_stage_halves_the_image_and_doubles_the_width() -> None:
    network = build_model("resnet20", num_classes=10, input_shape=CIFAR).eval()
    features = torch.randn(1, 16, 32, 32)
    shapes = []
    for stage in (network.layer1, network.layer2, network.layer3):
        features = stage(features)
        shapes.append(tuple(features.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_cifar_networks_take_other_channels_and_vgg_refuses_small_images() -> None:
    grey = build_model("resnet20", num_classes=4, input_shape=(1, 28, 28))
    assert grey(torch.randn(2, 1, 28, 28)).shape == (2, 4)
    with pytest.raises(UsageError, match="at least 32 x 32"):
        build_model("vgg16_cifar", num_classes=4, input_shape=(3, 28, 28))


def test_resnet_keeps_its_stem_on_small_images() -> None:
    with torch.device("meta"):
        network = build_model("resnet18", num_classes=10, input_shape=CIFAR)
    assert network.conv1.kernel_size == (7, 7) and network.conv1.stride == (2, 2)


@pytest.mark.parametrize("shape", [(3, 40, 40), (3, 32, 48)])
def test_vit_refuses_sides_that_patches_do_not_fill(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="multiple of 16"):
        build_model("vit_b_16", num_classes=10, input_shape=shape)


def test_torchvision_form() -> None:
    with torch.device("meta"):
        network = build_model("torchvision:vit_b_32", num_classes=5, input_shape=(3, 64, 64))
        assert network(torch.empty(1, 3, 64, 64)).shape == (1, 5)
        tupled = build_model("torchvision:googlenet", num_classes=5, input_shape=(3, 64, 64))
        assert isinstance(tupled(torch.empty(2, 3, 64, 64)), torch.Tensor)
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet18'"):
        build_model("torchvision:resnet1", num_classes=5, input_shape=CIFAR)
    with pytest.raises(UsageError, match="RGB"):
        build_model("torchvision:resnet18", num_classes=5, input_shape=(1, 32, 32))


def test_timm_form() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = build_model("timm:vit_tiny_patch16_224", num_classes=5, input_shape=CIFAR)
        assert network(torch.empty(1, *CIFAR)).shape == (1, 5)
        resnet = build_model("timm:resnet18", num_classes=5, input_shape=(1, 64, 64))
    assert resnet.conv1.in_channels == 1
    with pytest.raises(UnknownNameError, match="timm.list_models"):
        build_model("timm:resnet_nope", num_classes=5, input_shape=CIFAR)


def test_timm_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"`timm:a` needs timm: pip install 'ranknas\[hf\]'"):
        build_model("timm:a", num_classes=5, input_shape=CIFAR)


def test_own_factories_get_the_arguments_they_accept(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def plain(): return nn.Linear(2, 3)\n"
        "def classes(num_classes): return nn.Linear(2, num_classes)\n"
        "def both(*, input_shape, num_classes): return nn.Linear(input_shape[0], num_classes)\n"
        "def any(**options): return nn.Linear(len(options), options['num_classes'])\n"
        "def wrong(): return 3\n"
    )

    def build(name: str) -> nn.Module:
        return build_model(f"{file}:{name}", num_classes=5, input_shape=(7,))

    sizes = {name: tuple(build(name).weight.shape) for name in ("plain", "classes", "both", "any")}
    assert sizes == {"plain": (3, 2), "classes": (5, 2), "both": (5, 7), "any": (5, 2)}
    with pytest.raises(UsageError, match="returned int"):
        build("wrong")


def test_unknown_names_and_shapes() -> None:
    for spec in ("resnet21", "resnet20:x", "torch:resnet18"):
        with pytest.raises(UnknownNameError, match=r"vgg16_cifar.*timm:NAME.*file.py:factory"):
            build_model(spec, num_classes=10, input_shape=CIFAR)
    with pytest.raises(UsageError, match="channels, height, width"):
        build_model("resnet20", num_classes=10, input_shape=(16,))
