from __future__ import annotations

import logging
import pickle
import random
import urllib.error
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision import models

from rankNAS.exceptions import UsageError, WeightsError
from rankNAS.models.weights import load_state, load_weights, pretrained_weights, trained_model
from rankNAS.recovery import TrainingConfig


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(a=nn.Conv2d(1, 2, 3), b=nn.BatchNorm2d(2), c=nn.Linear(2, 2)))


def changed() -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in model().state_dict().items()}


def loaded(path: Path) -> tuple[bool, dict[str, str]]:
    target = model()
    metadata = load_weights(target, path)
    state = target.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in changed().items()), metadata


def test_safetensors_with_metadata(tmp_path: Path) -> None:
    save_file(changed(), tmp_path / "a.safetensors", metadata={"k": "v"})
    save_file(changed(), tmp_path / "b.safetensors")
    assert loaded(tmp_path / "a.safetensors") == (True, {"k": "v"})
    assert loaded(tmp_path / "b.safetensors") == (True, {})


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "parallel"])
def test_torch_files(tmp_path: Path, wrap: str) -> None:
    content: object = changed()
    if wrap in ("state_dict", "model"):
        content = {"epoch": 3, wrap: content}
    if wrap == "parallel":
        content = {"state_dict": {f"module.{name}": value for name, value in changed().items()}}
    torch.save(content, tmp_path / "a.pt")
    assert loaded(tmp_path / "a.pt") == (True, {})


def test_a_prefix_that_the_model_has_is_kept(tmp_path: Path) -> None:
    parallel = nn.Sequential(OrderedDict(module=nn.Linear(2, 2)))
    torch.save(parallel.state_dict(), tmp_path / "a.pt")
    assert load_weights(parallel, str(tmp_path / "a.pt")) == {}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_code_in_a_file_does_not_run(tmp_path: Path, writer: str) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"a.weight": Evil(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(WeightsError, match="could run code"):
        load_weights(model(), path)
    assert not trace.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"could run code: .* holds a torch\S+\.Linear; save"):
        load_weights(model(), tmp_path / "a.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 3}, torch.zeros(2), {1: torch.zeros(2)}])
def test_other_content_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="no dict of tensors"):
        load_weights(model(), tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".legacy.pt"])
@pytest.mark.parametrize("kept", [0, 5, 60, 0.5, 0.97])
def test_truncated_files(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file(changed(), path)
    else:
        torch.save(changed(), path, _use_new_zipfile_serialization=suffix == ".pt")
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(WeightsError, match="truncated"):
        load_weights(model(), path)


def test_a_changed_number_in_a_torch_file_is_found(tmp_path: Path) -> None:
    """PyTorch writes the checksum that tells, and does not look at it."""
    path = tmp_path / "a.pt"
    torch.save(changed(), path)
    content = path.read_bytes()
    at = content.index(changed()["a.weight"].numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 0x01]) + content[at + 1 :])
    with pytest.raises(
        WeightsError, match=r"a\.pt is truncated .*checksum or the mark of its part"
    ):
        load_weights(model(), path)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("start", [b"", b"\x80\x02", b"PK\x03\x04"])
def test_random_bytes(tmp_path: Path, seed: int, start: bytes) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(start + random.Random(seed).randbytes(200))
        with pytest.raises(WeightsError, match=name):
            load_weights(model(), tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_text_and_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="no weights file"):
        load_weights(model(), tmp_path / name)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="truncated or no weights file"):
        load_weights(model(), tmp_path / name)


def test_names_shapes_and_values_are_checked_before_anything_changes(tmp_path: Path) -> None:
    def refused(state: dict[str, Tensor], match: str) -> None:
        target, before = model(), model().state_dict()
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(WeightsError, match=match):
            load_weights(target, tmp_path / "a.safetensors")
        assert all(
            torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items()
        )

    renamed = {f"{name}.x": tensor for name, tensor in changed().items()}
    refused(
        renamed,
        "missing a.weight, a.bias, b.weight and 5 more; "
        r"unexpected \S+\.x, \S+\.x, \S+\.x and 6 more",
    )
    refused({**changed(), "z": torch.zeros(1)}, "missing nothing; unexpected z; take out the")
    refused({**changed(), "c.weight": torch.zeros(3, 2)}, r"c.weight has shape \(3, 2\).*\(2, 2\)")
    bad = changed()
    bad["b.running_var"][1] = float("nan")
    refused(bad, "not finite in b.running_var")
    bad["b.running_var"][1] = float("inf")
    refused(bad, "not finite in b.running_var")


def test_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, object] = {}

    def download(self: object, **given: object) -> dict[str, Tensor]:
        options.update(given)
        return {"w": torch.zeros(1)}

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", download)
    for spec in ("resnet18", "torchvision:resnet18"):
        assert list(pretrained_weights(spec, 1000)) == ["w"]
    assert options["weights_only"] and options["check_hash"]
    with pytest.raises(UsageError, match="1000 classes"):
        pretrained_weights("resnet18", 10)


@pytest.mark.parametrize("spec", ["resnet20", "timm:resnet18", "shufflenet_v2_x1_0", "mine.py:f"])
def test_no_pretrained_weights(spec: str) -> None:
    with pytest.raises(UsageError, match="no pretrained weights"):
        pretrained_weights(spec, 1000)


def test_pretrained_weights_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, **given: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", fail)
    with pytest.raises(WeightsError, match="needs network"):
        pretrained_weights("resnet18", 1000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path))
    return tmp_path / "models"


def linear(outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, outputs)


def trained(network: nn.Module, **changes: object) -> tuple[Tensor, int]:
    """The trained weight and the number of steps that this took."""
    data = TensorDataset(
        torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    )
    steps: list[int] = []
    options = {"fingerprint": "f", "seed": 0, "config": TrainingConfig(2, batch_size=4)} | changes
    made = trained_model("lin", network, data, on_step=lambda *step: steps.append(1), **options)
    assert made is network and not made.training
    return network.weight.detach().clone(), len(steps)


def test_training_is_done_once(cache: Path) -> None:
    first, steps = trained(linear())
    second, again = trained(linear())
    assert torch.equal(first, second) and (steps, again) == (4, 0)
    (path,) = cache.iterdir()
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["spec"] == "lin" and file.metadata()["data"] == "f"


def test_everything_that_matters_is_in_the_key(cache: Path) -> None:
    trained(linear())
    others = [{"fingerprint": "g"}, {"seed": 1}, {"config": TrainingConfig(3, batch_size=4)}]
    for changes in others:
        assert trained(linear(), **changes)[1] > 0
    assert trained(linear(3))[1] > 0
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "another"])
def test_a_damaged_cache_is_made_again(
    cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first, _ = trained(linear())
    (path,) = cache.iterdir()
    content = path.read_bytes()
    bad = {
        "empty": b"",
        "truncated": content[:50],
        "flipped": content[:-2] + bytes([content[-2] ^ 0x01]) + content[-1:],
    }
    if damage == "another":
        save_file({"other": torch.zeros(1)}, path)
    else:
        path.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING, "rankNAS.models.weights"):
        second, steps = trained(linear())
    assert steps == 4 and torch.equal(first, second)
    assert "because the cached result is bad" in caplog.text and str(path) in caplog.text
    assert trained(linear())[1] == 0


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "another"])
def test_a_damaged_checkpoint_is_made_again(
    cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    def interrupt(*step: object) -> None:
        if step[0] == 3:
            raise KeyboardInterrupt

    first, _ = trained(linear())
    (path,) = cache.iterdir()
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        data = TensorDataset(
            torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
        )
        config = TrainingConfig(2, batch_size=4)
        trained_model(
            "lin", linear(), data, fingerprint="f", seed=0, config=config, on_step=interrupt
        )
    (partial,) = cache.iterdir()
    content = partial.read_bytes()
    weight = torch.load(partial, weights_only=True)["model"]["weight"].numpy().tobytes()
    at = content.index(weight)
    bad = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "flipped": content[:at] + bytes([content[at] ^ 0x01]) + content[at + 1 :],
    }
    if damage == "another":
        torch.save({"identity": "another"}, partial)
    else:
        partial.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING, "rankNAS.models.weights"):
        second, steps = trained(linear())
    assert steps == 4 and torch.equal(first, second)
    assert "because of a bad checkpoint" in caplog.text and str(partial) in caplog.text
    assert list(cache.iterdir()) == [path]


def test_infinities_that_the_model_has_itself_are_loaded() -> None:
    """A mask, or a limit of activations, is a buffer with infinities."""

    def masked() -> nn.Linear:
        model = nn.Linear(3, 3)
        model.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        return model

    source, target = masked(), masked()
    load_state(target, source.state_dict(), source="s")
    assert torch.equal(target.weight, source.weight)
    changed = source.state_dict() | {"mask": -source.mask}
    with pytest.raises(WeightsError, match="not finite in mask"):
        load_state(target, changed, source="s")
