"""The memory of an evaluation does not depend on the number of samples."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from rankNAS.data.samples import Samples
from rankNAS.evaluation.outputs import Reference, total_sums
from rankNAS.tasks.base import Task
from rankNAS.tasks.language import CausalLanguageModelling
from rankNAS.tasks.matching import Matching

VOCABULARY, LENGTH = 3000, 16


class Bytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return found


class Windows(Dataset[Any]):
    """Windows of tokens, made when they are read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Tensor:
        return (torch.arange(LENGTH) * (row + 3)) % VOCABULARY


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.embed(x))
        return found


def most_bytes(count: int, task: Task, kept: int) -> int:
    torch.manual_seed(0)
    model = Language()
    with Bytes() as found:
        batches = Samples.of(Windows(count)).batched(4)
        task = task.bound(batches[0], model)
        reference = Reference(task, model, batches, most_bytes=kept)
        metrics = task.finish(total_sums(model, batches, task, reference))
    assert metrics[task.divergence_name] == pytest.approx(0, abs=1e-4)
    return found.most


@pytest.mark.parametrize("kept", [0, 400_000])
@pytest.mark.parametrize(
    "task", [CausalLanguageModelling(), Matching(), Matching(by="kl")], ids=lambda t: t.name
)
def test_memory_is_independent_of_the_number_of_samples(task: Task, kept: int) -> None:
    few, many = most_bytes(48, task, kept), most_bytes(96, task, kept)
    output = 4 * LENGTH * VOCABULARY * 4
    assert few > output
    # Tokens and what is kept of the reference; 48 outputs more would be 9 MB.
    assert many - few <= kept + 96 * LENGTH * 8 + 20_000


@pytest.mark.parametrize("most", [0, 50_000, 200_000, 10**8])
def test_a_reference_keeps_its_bytes(most: int) -> None:
    model = Language()
    batches = Samples.of(Windows(24)).batched(4)
    task = CausalLanguageModelling().bound(batches[0], model)
    reference = Reference(task, model, batches, most_bytes=most)
    kept = [x for x in reference._kept if x is not None]
    assert sum(x.nbytes for x in kept) <= most
    assert (len(kept) > 0) == (most > 0)
    for number, batch in enumerate(batches):
        sums = task.run(model, batch).sums(reference.prediction(number, batch))
        assert float(sums["kl"]) == pytest.approx(0, abs=1e-4)
