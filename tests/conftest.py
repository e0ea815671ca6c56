"""Fixtures shared by all tests: no test reads or writes the user's cache."""

from __future__ import annotations

import os

# One thread a process, before torch is imported; subprocesses and Ray's workers inherit it. The
# matrices of the tests are small, and threads that wait for each other on a busy machine cost more
# than they compute.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from postgres import Cluster, programs
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from rankNAS.cli import main
from rankNAS.plugins import load_callable

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1400,2400"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKNAS_CACHE", str(tmp_path_factory.mktemp("cache")))


class SmallNet(nn.Module):
    """Two convolutions, a batch norm and two linear layers, on 3 x 8 x 8 images."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.linear = nn.Linear(16, 64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x)).mean((2, 3))
        out: Tensor = self.head(torch.relu(self.linear(x)))
        return out


@pytest.fixture
def small_net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet().eval()


@pytest.fixture
def small_data() -> tuple[TensorDataset, TensorDataset]:
    """300 training and 80 test images whose class is the sign pattern of two channel means."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 4, (380,), generator=generator)
    x = torch.randn(380, 3, 8, 8, generator=generator)
    x[:, 0] += (y % 2 * 2 - 1).reshape(-1, 1, 1)
    x[:, 1] += (y // 2 * 2 - 1).reshape(-1, 1, 1)
    return TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:])


def write_model(folder: Path) -> str:
    """``file.py:factory`` of a small network for 32 x 32 images, as a user would write it."""
    path = folder / "my_model.py"
    path.write_text(
        "from torch import nn\n"
        "def factory(num_classes):\n"
        "    return nn.Sequential(\n"
        "        nn.Conv2d(3, 16, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(16),\n"
        "        nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),\n"
        "        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),\n"
        "        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))\n"
    )
    return f"{path}:factory"


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    """A model of the user's own: ``file.py:factory``."""
    return write_model(tmp_path)


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a search for accuracy and MACs under two budgets. Read it only, or copy it."""
    folder = tmp_path_factory.mktemp("finished")
    model_file = write_model(folder)
    torch.manual_seed(0)
    state = load_callable(model_file)(num_classes=10).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RANKNAS_CACHE", str(folder / "cache"))
        arguments = ["search", "--space", model_file, "--weights", "weights.safetensors"]
        arguments += ["--strategy", "random", "--trials", "4", "--budget", "0.6,0.4", "--quiet"]
        arguments += ["--objective", "accuracy", "--objective", "macs", "--finetune", "1"]
        arguments += ["--calibration", "64", "--validation", "64", "--study", "small"]
        patch.setattr(sys, "argv", ["ranknas", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    return folder / "ranknas-studies" / "small"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL server of our own, which may be stopped and started."""
    folder = programs()
    if folder is None:
        pytest.skip("needs PostgreSQL's initdb and pg_ctl (Debian's package postgresql)")
    pytest.importorskip("psycopg", reason="needs psycopg (the extra `postgresql`)")
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new storage that processes can share, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    if request.param == "journal":
        return f"journal:{tmp_path / 'study.log'}"
    url: str = request.getfixturevalue("postgres").new_database()
    return url


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A headless Chromium that asks nobody else for anything."""
    if not CHROMIUM.exists() or not DRIVER.exists():
        pytest.skip("needs Debian's chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    from selenium.webdriver.chrome.service import Service

    monkeypatch.setenv("SE_OFFLINE", "true")
    monkeypatch.setenv("SE_AVOID_STATS", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()
