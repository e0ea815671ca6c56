"""Fixtures shared by all tests: no test reads or writes the user's cache."""

from __future__ import annotations

import os

# One thread a process, before torch is imported; subprocesses and Ray's workers inherit it. The
# matrices of the tests are small, and threads that wait for each other on a busy machine cost more
# than they compute.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# As Ray does for a cluster of its own; whoever joins one by its address has to say so.
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Else Ray's workers wait for all other tests: they would run at a niceness of 15.
os.environ.setdefault("RAY_worker_niceness", "0")

import gc
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401  # an import at the end of a run would fail by a warning
import pytest
import torch
from groups import group_of, rank_of
from networks import small, split, write_model
from postgres import Cluster, programs
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from rankNAS.cli import main
from rankNAS.plugins import load_callable

torch.set_num_threads(1)  # whoever imported torch before us

_CACHES = itertools.count()
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1400,2400"),
]
CLUSTER = """
import sys
import ray
store = 128 * 2**20
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=store)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


# Before pytest-xdist, which reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """Each group of tests runs in one process."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long groups begin first."""
    items.sort(key=rank_of)


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: the garbage collector need not search it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Commands that run in this process may have changed the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not made here: `mktemp` looks through all folders of all tests before.
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(_CACHES)}"
    monkeypatch.setenv("RANKNAS_CACHE", str(folder))


@pytest.fixture
def small_net() -> nn.Module:
    return small()


@pytest.fixture
def small_data() -> tuple[TensorDataset, TensorDataset]:
    """300 training and 80 test images whose class is the sign pattern of two channel means."""
    return split()


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
def cluster() -> Iterator[str]:
    """The address of a Ray cluster on this computer, which another process has started."""
    pytest.importorskip("ray")
    program = [sys.executable, "-c", CLUSTER]
    owner = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    address = owner.stdout.readline().strip()
    assert address, "Ray has not started"
    yield address
    owner.communicate("")  # the end of its input is the end of the cluster


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
