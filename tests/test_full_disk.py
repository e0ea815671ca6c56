"""No room for a file: what was there stays, nothing is left over, and the message says so.

A limit on the size of files stands for a full disk, as it needs no rights; a small file system in
memory is one, where it may be mounted.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from rankNAS import cli
from rankNAS.allocation import DENSE, Allocation
from rankNAS.compression.calibration import calibrate
from rankNAS.exceptions import WriteError
from rankNAS.hw_models.host import general_shapes
from rankNAS.hw_models.profiles import Measurement, Profile, Terms
from rankNAS.io.files import save_atomically, save_bytes, write_json
from rankNAS.models import artifact
from rankNAS.models.export import export
from rankNAS.models.weights import trained_model
from rankNAS.recovery import TrainingConfig, train
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model

resource = pytest.importorskip("resource")
CONFIG = TrainingConfig(epochs=3, batch_size=8, augment=False)
DENSE_ONLY = Allocation.of({"0": DENSE})


@contextmanager
def limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """The folder of a file system of 256 KB."""
    folder = tmp_path / "full"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Until nothing more fits."""
    with pytest.raises(OSError) as caught, (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    assert caught.value.errno == errno.ENOSPC


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)).eval()


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(24, 64, generator=generator), torch.arange(24) % 4)


def equal(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def refused(path: Path, write: Callable[[], object]) -> str:
    """The message, once it is sure that nothing but that has changed."""
    before, names = path.read_bytes(), sorted(os.listdir(path.parent))
    with pytest.raises(WriteError) as caught:
        write()
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == names
    message = str(caught.value)
    assert repr(str(path)) in message and "The earlier file is intact." in message
    assert "MB free there" in message and "--out" in message
    return message


def test_an_artifact_on_a_limit(tmp_path: Path) -> None:
    path = artifact.save(network(), DENSE_ONLY, tmp_path / "best.safetensors")
    with limit(4096):
        message = refused(path, lambda: artifact.save(network(1), DENSE_ONLY, path))
    assert "File too large" in message and "ulimit" in message
    assert equal(artifact.load(path, lambda: network(2)), network())


def test_an_artifact_on_a_full_disk(full: Path) -> None:
    path = artifact.save(network(), DENSE_ONLY, full / "best.safetensors")
    fill(full)
    message = refused(path, lambda: artifact.save(network(1), DENSE_ONLY, path))
    assert "No space left on device, 0.0 MB free there" in message
    assert equal(artifact.load(path, lambda: network(2)), network())
    (full / "filler").unlink()
    artifact.save(network(1), DENSE_ONLY, path)
    assert equal(artifact.load(path, lambda: network(2)), network(1))


def interrupted(path: Path, room: Callable[[], object]) -> nn.Module:
    """A training that has no room from its second epoch on."""
    model = network()

    def on_step(step: int, total: int, loss: float) -> None:
        if step == 4:
            room()

    with pytest.raises(WriteError) as caught:
        train(model, data(), CONFIG, checkpoint=path, on_step=on_step)
    assert "The earlier file is intact." in str(caught.value)
    return model


def continued(path: Path, model: nn.Module) -> None:
    """The checkpoint is that of the first epoch, and the training goes on from it to its end."""
    assert os.listdir(path.parent) == [path.name]
    steps: list[int] = []
    resumed = train(
        model, data(), CONFIG, checkpoint=path, on_step=lambda step, *_: steps.append(step)
    )
    assert steps == list(range(4, 10)) and equal(resumed, train(network(), data(), CONFIG))


def test_a_checkpoint_on_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "run.pt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        model = interrupted(path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    continued(path, model)


def test_a_checkpoint_on_a_full_disk(full: Path) -> None:
    path = full / "run.pt"
    model = interrupted(path, lambda: fill(full))
    (full / "filler").unlink()
    continued(path, model)


def test_a_trained_model_that_cannot_be_cached_is_an_error(tmp_path: Path) -> None:
    def train_it() -> None:
        trained_model("lin", network(), data(), fingerprint="f", seed=0, config=CONFIG)

    with limit(4096), pytest.raises(WriteError, match=r"\.partial\.pt.*RANKNAS_CACHE"):
        train_it()
    train_it()


def test_a_cached_calibration_that_does_not_fit_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = network(), data().tensors[0]
    space = compile_space(model, x[:1])
    expected = calibrate(model, space, x)
    with limit(4096), caplog.at_level(logging.WARNING):
        found = calibrate(model, space, x, cache=tmp_path)
    assert "could not be cached" in caplog.text and str(tmp_path) in caplog.text
    assert not os.listdir(tmp_path)
    for name, statistics in expected.items():
        assert torch.equal(statistics.input_second_moment, found[name].input_second_moment)


@pytest.mark.filterwarnings("ignore")  # torch's exporters warn about their own internals
@pytest.mark.parametrize("format", ["safetensors", "pt2", "onnx"])
def test_an_export(tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"network.{format}"
    export(network(), path, format, (64,))
    with limit(4096):
        refused(path, lambda: export(network(1), path, format, (64,)))


def test_documents_and_profiles(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    with limit(4096):
        refused(path, lambda: write_json(path, {"a": "x" * 5000}))
    profile = Profile(Terms.here(torch.device("cpu")))
    file = tmp_path / "host.json"
    profile.write(file)
    large = profile.with_stages({s: Measurement(1e-3, 0.0, 7) for s in general_shapes(1)})
    with limit(4096):
        refused(file, lambda: large.write(file))
    assert Profile.read(file) == profile


def test_a_file_that_was_not_there_is_not_there(tmp_path: Path) -> None:
    with limit(10), pytest.raises(WriteError, match=r"No part of it is left\. Make room"):
        save_bytes(tmp_path / "new" / "a", b"x" * 100)
    assert not os.listdir(tmp_path / "new")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_when_syncing_or_replacing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Network file systems may notice that late."""
    path = tmp_path / "a"
    save_bytes(path, b"old")
    code = getattr(errno, name)

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            assert os.strerror(code) in refused(path, lambda: save_bytes(path, b"new"))


def test_other_reasons(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("file/a", "Not a directory|File exists"),
        ("folder", "Is a directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "NUL character"),
    ):
        with pytest.raises(WriteError, match=f"cannot be written: .*({reason})") as caught:
            save_bytes(tmp_path / name, b"new")
        assert caught.value.errno and caught.value.strerror in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_errors_of_the_writer_that_are_no_ones_fault_go_through(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_atomically(tmp_path / "a", fail)


def study(folder: Path, model: nn.Module | None = None) -> Path:
    """The folder of a finished study, as far as its export needs one."""
    model = model or build_model("resnet20", num_classes=10, input_shape=(3, 32, 32)).eval()
    built = {"space": "resnet20", "num_classes": 10, "input_shape": [3, 32, 32]}
    path = artifact.save(model, Allocation.of({}), folder / "best.safetensors", model=built)
    write_json(folder / "config.json", {"space": "resnet20"})
    write_json(folder / "result.json", built | {"solutions": [{"artifact": str(path)}]})
    return folder


@pytest.mark.slow
def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    folder = study(tmp_path / "mine")
    output = tmp_path / "old.safetensors"
    output.write_bytes(b"old")
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "sys.argv[0] = 'ranknas'; from rankNAS.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "export", str(folder), "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"ranknas: error: {str(output)!r} cannot be written: File too large")
    assert output.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["mine", "old.safetensors"]


def test_the_command_line_and_files_that_others_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: OSError) -> Callable[[object], Callable[[], None]]:
        def run() -> None:
            raise error

        return lambda _: run

    monkeypatch.setattr(cli, "_own_stdout", lambda: None)
    full_disk = OSError(errno.ENOSPC, "No space left on device", "trials.csv")
    monkeypatch.setattr(cli, "_parser", fail(full_disk))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(
        "ranknas: error: no room for 'trials.csv': No space left on device."
    )
    monkeypatch.setattr(cli, "_parser", fail(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        cli.main()


def test_the_limit_of_these_tests_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with limit(10), pytest.raises(OSError) as caught:
        path.write_bytes(b"x" * 11)
    assert caught.value.errno == errno.EFBIG
    path.write_bytes(b"x" * 11)
