"""The study of the small ViT: its training goes on after an interruption to the same bits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.allocation import DENSE
from rankNAS.plugins import load_callable
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.zoo import build_model

FOLDER = Path(__file__).parents[2] / "studies" / "vit_cifar10"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not in a checkout")


def training(out: Path, steps: int, **options: Any) -> Any:
    torch.manual_seed(0)
    images = TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 10)
    data = rankNAS.load_data((images, images))
    given = {"minutes": 1e6, "epochs": steps / 4, "batch": 8, "device": "cpu", "seed": 0}
    given |= {"bfloat16": False, "mix": True, "auto": True, "erase": True, "every": 1e6}
    return load_callable(f"{FOLDER}/train_vit.py:Training")(
        data, argparse.Namespace(out=out, **given | options)
    )


@pytest.mark.slow
def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    whole = training(tmp_path / "whole.safetensors", 5)
    whole.run()
    assert whole.step == 5 and whole.epochs == 1.25
    part = training(tmp_path / "part.safetensors", 5)
    part.network.train()
    for _ in range(2):
        part._train_step()
        part.step += 1
    part._save()
    again = training(tmp_path / "part.safetensors", 5)
    assert again.step == 2
    again.run()
    pairs = zip(whole.network.parameters(), again.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    limited = training(tmp_path / "limited.safetensors", 5, minutes=1e-9)
    limited.run()
    assert limited.step == 1


def test_the_layers_of_a_group() -> None:
    space = compile_space(
        build_model("vit_cifar", num_classes=10, input_shape=(3, 32, 32)),
        torch.zeros(1, 3, 32, 32),
    )
    found = load_callable(f"{FOLDER}/evaluate_vit.py:factored")(space, "qv")
    third = {name for name, choice in found.items() if choice != DENSE}
    assert third == {
        f"blocks.{i}.attention.{part}" for i in range(9) for part in ("query", "value")
    }
    space.check(found)
