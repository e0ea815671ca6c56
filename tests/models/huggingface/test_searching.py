"""Searches of models of every family, refitted; and full ranks, which change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import FAMILIES, compressed, logits, tiny, tiny_inputs

import rankNAS
from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.factorisation import skeleton
from rankNAS.copies import copied
from rankNAS.decompositions.layer_view import LayerView
from rankNAS.models.artifact import load, save
from rankNAS.models.huggingface.files import Source
from rankNAS.models.huggingface.folder import write_folder
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.settings import Settings

pytest.importorskip("transformers")


def items(model: Any, count: int = 24) -> list[dict[str, torch.Tensor]]:
    """Samples without labels."""
    generator = torch.Generator().manual_seed(2)
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": x} for x in torch.randn(count, 3, 32, 32, generator=generator)]
    rows = torch.randint(3, 100, (count, 12), generator=generator)
    if model.config.is_encoder_decoder:
        return [{"input_ids": row, "decoder_input_ids": row.flip(0)} for row in rows]
    return [{"input_ids": row} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_search_with_refit_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    settings = Settings(calibration=16, validation=8, choices=6)
    study = rankNAS.search(
        model,
        items(model),
        task="matching",
        budget={"layer_params": 0.6},
        strategy="solve",
        n_trials=1,
        settings=settings,
    )
    network: Any = study.materialise()
    again = rankNAS.load(study.save(tmp_path / "n.safetensors", network=network))
    inputs = tiny_inputs(model)
    assert torch.equal(logits(again, inputs), logits(network, inputs))
    assert study.best.metrics["layer_params"] <= 0.6 * study.dense["layer_params"]
    assert getattr(network.config, "use_cache", None) == getattr(model.config, "use_cache", None)
    write_folder(again, study.best.allocation, tmp_path / "small", Source(None), "")
    assert torch.equal(logits(rankNAS.load(tmp_path / "small"), inputs), logits(network, inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_full_ranks_change_nothing(name: str, tmp_path: Path) -> None:
    model = with_plain_layers(tiny(name))
    _, allocation = compressed(model)
    weights = {layer: LayerView(model, [layer]).weight.flatten(1) for layer in allocation}
    full = Allocation.of({n: Choice("svd", (min(w.shape),)) for n, w in weights.items()})
    network: Any = skeleton(copied(model), full)
    for layer, weight in weights.items():
        first, second = network.get_submodule(layer)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        first.weight = torch.nn.Parameter(v.reshape(first.weight.shape))
        second.weight = torch.nn.Parameter((u * s).reshape(second.weight.shape))
        bias = LayerView(model, [layer]).bias
        second.bias = None if bias is None else torch.nn.Parameter(bias.clone())
    again = load(save(network, full, tmp_path / "n.safetensors"))
    inputs = tiny_inputs(model)
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs))
