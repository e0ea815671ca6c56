"""GreedyLore as a hook of DistributedDataParallel, in 2 and 4 real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import FORKS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rankNAS.exceptions import UsageError
from rankNAS.recovery.greedylore import GreedyLore, greedylore_hook

STEPS, PERIOD, RANK = 9, 6, 2
LIMIT = 120.0  # seconds for all runs of a number of processes, on a busy machine


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(6, 3, 4, 4, generator=generator), torch.randn(6, 3, generator=generator)


def trained(rank: int, make: Callable[[nn.Module], GreedyLore] | None) -> dict[str, Any]:
    """What a worker sees in a few steps; without a state the hook is DDP's own."""
    model = network()
    ddp = DistributedDataParallel(model)
    lore = None if make is None else make(model)
    if lore is not None:
        ddp.register_comm_hook(lore, greedylore_hook)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    found: dict[str, Any] = {"weights": [], "own": [], "used": [], "sent": [], "errors": []}
    for step in range(STEPS):
        x, y = batch_of(rank, step)
        own = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x), y).backward()
        found["own"].append([g.clone() for g in own])
        found["used"].append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        found["weights"].append([p.detach().clone() for p in model.parameters()])
        if lore is not None:
            found["sent"].append(lore.sent)
            found["errors"].append([e.clone() for e in lore.state_dict()["errors"]])
            found["plain"], found["bases"] = lore.plain, lore.state_dict()["bases"]
    return found


def work(rank: int, size: int, folder: Path) -> None:
    """A worker: all runs, whose findings it writes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=size)
    common: dict[str, Any] = {"rate": 1.0, "period": PERIOD}
    found = {
        "compressed": trained(rank, lambda m: GreedyLore(m, RANK, **common)),
        "carried": trained(rank, lambda m: GreedyLore(m, RANK, carry=True, **common)),
        "late": trained(rank, lambda m: GreedyLore(m, RANK, start=3, **common)),
        "whole": trained(rank, lambda m: GreedyLore(m, 99, **common)),
        "full": trained(rank, lambda m: GreedyLore(m, 99, rate=1e-9, skip=(), period=PERIOD)),
        "plain": trained(rank, None),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By worker and name, what its runs have found."""
    folder = tmp_path_factory.mktemp("workers")
    workers = [
        FORKS.Process(target=work, args=(rank, request.param, folder), daemon=True)
        for rank in range(request.param)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LIMIT)
        assert worker.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", ["compressed", "carried", "late", "whole", "full"])
def test_all_workers_have_equal_bits_after_each_step(runs: Any, name: str) -> None:
    first, *others = runs
    for other in others:
        for step in range(STEPS):
            pairs = zip(first[name]["weights"][step], other[name]["weights"][step], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        pairs = zip(first[name]["bases"], other[name]["bases"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def means(runs: Any, name: str, part: str, step: int) -> list[Tensor]:
    """The means over all workers of a list of tensors."""
    lists = [run[name][part][step] for run in runs]
    return [torch.stack(tensors).mean(0) for tensors in zip(*lists, strict=True)]


#: The parameters that are compressed: the kernel as (8, 27), and a layer (16, 32).
PRESSED = {0: (8, 27), 2: (16, 32)}


@pytest.mark.parametrize("name", ["compressed", "carried"])
def test_gradients_and_errors_sum_to_the_true_gradients(runs: Any, name: str) -> None:
    """Between two refreshes; across them where the errors are carried over."""
    start = 0 if name == "carried" else PERIOD
    for place, (number, shape) in enumerate(PRESSED.items()):
        used = sum(runs[0][name]["used"][s][number] for s in range(start, STEPS))
        true = sum(means(runs, name, "own", s)[number] for s in range(start, STEPS))
        error = means(runs, name, "errors", STEPS - 1)[place]
        assert float(error.norm()) > 0.01
        torch.testing.assert_close(used.reshape(shape) + error, true.reshape(shape))


def test_a_refresh_and_what_is_not_compressed_are_exact(runs: Any) -> None:
    for step in range(STEPS):
        used, true = runs[0]["compressed"]["used"][step], means(runs, "compressed", "own", step)
        for number, (a, b) in enumerate(zip(used, true, strict=True)):
            exact = number not in PRESSED or step % PERIOD == 0
            assert torch.allclose(a, b, atol=1e-6) == exact


def test_the_first_steps_are_whole_if_asked_for(runs: Any) -> None:
    for step in range(STEPS):
        used, true = runs[0]["late"]["used"][step], means(runs, "late", "own", step)
        assert torch.allclose(used[2], true[2], atol=1e-6) == (step <= 3)


def test_full_rank_is_a_plain_all_reduce(runs: Any) -> None:
    """To the rounding of sums; with no layer compressed, and with all at their full rank."""
    for name in ("whole", "full"):
        for run in runs:
            for step in range(STEPS):
                pairs = zip(run[name]["weights"][step], run["plain"]["weights"][step], strict=True)
                for a, b in pairs:
                    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
    assert all(
        float(e.abs().max()) < 1e-5 for run in runs for e in run["full"]["errors"][STEPS - 1]
    )


def test_traffic_in_bytes(runs: Any) -> None:
    """A compressed step sends r max(n, m) + min(n, m) numbers of a gradient, a refresh n m."""
    total = sum(p.numel() for p in network().parameters())
    whole = sum(n * m for n, m in PRESSED.values())
    pressed = sum(RANK * max(s) + min(s) for s in PRESSED.values())
    expected = [total if s % PERIOD == 0 else total - whole + pressed for s in range(STEPS)]
    for run in runs:
        sent = run["compressed"]["sent"]
        steps = [b - a for a, b in zip([0, *sent], sent, strict=False)]
        assert steps == [4 * n for n in expected]
        assert run["compressed"]["plain"] == run["whole"]["sent"][-1] == 4 * STEPS * total


def test_which_parameters_are_compressed() -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64))
    model[1].bias.requires_grad_(False)

    def pressed(**options: Any) -> int:
        return len(GreedyLore(model, 4, **options).state_dict()["errors"])

    assert pressed() == 1  # neither the embedding nor the last layer
    assert pressed(skip=()) == 2 and pressed(skip=("1", "2")) == 0
    assert pressed(rate=9.0) == 0


@pytest.mark.parametrize("bad", [{"rank": 0}, {"period": 0}, {"start": -1}, {"rate": 0.0}])
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="GreedyLore takes a rank and a period of at least 1"):
        GreedyLore(network(), **bad)
