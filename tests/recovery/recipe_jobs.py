"""Small jobs for recipes: a classification, a regression and a language model, decomposed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from language import Bigram
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from rankNAS.compression.factorisation import factorise
from rankNAS.data.samples import Samples
from rankNAS.recovery.recipe import Job
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.tasks.infer import infer_task
from rankNAS.tasks.language import CausalLanguageModelling


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def thin(model: nn.Module, x: Tensor, share: float = 0.4) -> nn.Module:
    """The network whose layers keep about a share of their multiply-adds."""
    space = compile_space(model, x, min_weights=1)
    allocation = {}
    for name, layer in space.layers.items():
        limit = share * layer.costs[0].macs
        fitting = [c for c in layer.choices if layer[c].macs <= limit]
        allocation[name] = fitting[0] if fitting else layer.choices[-1]
    return factorise(model, space).materialise(allocation)


def classification(count: int = 96) -> Job:
    """Two classes of images that differ in the brightness of the upper half."""
    x = torch.randn(count, 3, 8, 8, generator=generator(1))
    y = torch.randint(2, (count,), generator=generator(2))
    x[:, :, :4] += (y * 1.0 - 0.5)[:, None, None, None]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    return job_of(model, TensorDataset(x, y), x[:1])


def regression(count: int = 96) -> Job:
    """A linear function of a few inputs."""
    x = torch.randn(count, 12, generator=generator(1))
    y = x @ torch.randn(12, 3, generator=generator(2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 3))
    return job_of(model, TensorDataset(x, y), x[:1])


def language(count: int = 48) -> Job:
    """Sequences of tokens in which each is followed by the next one."""
    start = torch.randint(32, (count, 1), generator=generator(1))
    tokens = (start + torch.arange(6)) % 32
    torch.manual_seed(0)
    model = Bigram().eval()
    network = thin(copy.deepcopy(model), tokens[:1])
    network.embedding.weight.data += 0.5 * torch.randn(32, 32, generator=generator(3))
    samples = Samples.of(tokens)
    task = CausalLanguageModelling().bound(samples.example(2), model)
    return Job(network, samples, task, model)


def job_of(model: nn.Module, data: TensorDataset, x: Tensor) -> Job:
    """A job on the dense model's thin network."""
    model.eval()
    samples = Samples.of(data)
    return Job(thin(model, x), samples, infer_task(model, samples.example(8)), model)


JOBS: dict[str, Callable[[], Job]] = {
    "classification": classification,
    "regression": regression,
    "language": language,
}


def loss_of(job: Job, network: nn.Module) -> float:
    """The task's loss on all samples."""
    batch = job.data.batch()
    with torch.no_grad():
        return float(job.task.run(network.eval(), batch).loss())


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
