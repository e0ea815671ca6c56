"""Adapters: a start that changes nothing, the merged layer, and what is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from language import tiny_llama
from recipe_jobs import classification, generator, language, loss_of, same, state
from torch import Tensor, nn

from rankNAS.data.samples import Samples
from rankNAS.decompositions.shapes import GroupedLinear
from rankNAS.recovery.adapters import Adapted, adapted
from rankNAS.recovery.lora import Lora
from rankNAS.recovery.recipe import Job
from rankNAS.recovery.recover import run_recipe
from rankNAS.tasks.language import CausalLanguageModelling

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "grouped linear": (lambda: GroupedLinear(12, 6, 3), (4, 12)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 7)),
    "reflected": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        (2, 4, 7, 7),
    ),
    "sequence": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_merged_adapter_equals_the_adapted_layer(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    base = make().double()
    x = torch.randn(shape, generator=generator(1), dtype=torch.float64)
    before = base(x)
    layer = Adapted(base, 2, 0.7, generator())
    assert torch.equal(layer(x), before)  # B is 0
    with torch.no_grad():
        layer.up.weight.normal_(generator=generator(2))
    expected = layer(x)
    assert not torch.allclose(expected, before)
    layer.merge()
    torch.testing.assert_close(base(x), expected)
    torch.testing.assert_close(layer(x), expected)


def test_a_rank_is_at_most_that_of_the_layer() -> None:
    layer = Adapted(nn.Linear(6, 3), 50, 1.0, generator())
    assert layer.down.weight.shape == (3, 6) and layer.up.weight.shape == (3, 3)


@pytest.mark.parametrize("vectors", [True, False])
def test_only_adapters_and_vectors_are_trained(vectors: bool) -> None:
    job = classification()
    forms, before = [type(m) for m in job.network.modules()], state(job.network)
    frozen = job.network[1].weight
    frozen.requires_grad_(False)
    with adapted(job.network, 2, 1.0, 0, every=False, vectors=vectors) as adapters:
        trained = {n for n, p in job.network.named_parameters() if p.requires_grad}
        own = {n for n in trained if ".down." in n or ".up." in n}
        assert len(own) == 2 * len(adapters.layers) > 0
        assert all(path.partition(".")[0] in ("0", "3") for path in adapters.layers)
        assert bool(trained - own) == vectors and "1.weight" not in trained
    assert [type(m) for m in job.network.modules()] == forms and same(before, state(job.network))
    assert not frozen.requires_grad and job.network[0][0].weight.requires_grad


def test_networks_without_factors_have_adapters_on_all_layers() -> None:
    network = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Linear(9, 2))
    network[1].weight = network[0].weight  # tied
    with adapted(network, 2, 1.0, 0, every=False, vectors=True) as adapters:
        assert list(adapters.layers) == ["2"]


def test_factors_move_only_within_the_rank_of_the_adapters() -> None:
    job = language()
    before, loss = state(job.network), loss_of(job, job.network)
    recipe = Lora(epochs=20, batch_size=16, rank=1, learning_rate=0.01, speed="plain")
    run_recipe(recipe, job)
    after = state(job.network)
    assert loss_of(job, job.network) < loss and before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "embedding.weight" not in changed
    matrices = [name for name in changed if before[name].dim() > 1]
    assert matrices
    for name in matrices:
        values = torch.linalg.svdvals((after[name] - before[name]).flatten(0, -2).double())
        assert values[1] < 1e-5 * values[0]


def checkpointed(network: nn.Module) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in network.modules())


def test_gradient_checkpoints_change_nothing() -> None:
    model = tiny_llama(32)
    tokens = torch.randint(32, (8, 10), generator=generator(1))
    samples = Samples.of([{"input_ids": row} for row in tokens])
    task = CausalLanguageModelling().bound(samples.example(2), model)
    found: list[dict[str, Tensor]] = []
    used: list[bool] = []
    for checkpoints in (True, False):
        network = tiny_llama(32, seed=1)
        recipe = Lora(
            epochs=2,
            batch_size=4,
            learning_rate=0.01,
            gradient_checkpointing=checkpoints,
            speed="plain",
        )

        def on_step(step: int, total: int, loss: float, network: nn.Module = network) -> None:
            used.append(checkpointed(network))

        run_recipe(recipe, Job(network, samples, task, model), on_step=on_step)
        assert not checkpointed(network)
        found.append(state(network))
    assert used == [True] * 4 + [False] * 4
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], msg=name)
