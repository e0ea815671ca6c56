"""What a result depends on besides its options."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from rankNAS.reporting.environment import PACKAGES, machine, versions


def test_versions_are_those_of_the_installed_packages() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == version("torch")
    assert set(found) == {"rankNAS", "python", *PACKAGES}


def test_the_machine() -> None:
    found = machine()
    assert found["threads"] == torch.get_num_threads()
    assert int(found["processors"]) >= 1
