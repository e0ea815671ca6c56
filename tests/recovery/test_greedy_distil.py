"""The recipe in several processes: equal to one, resumed, with a process that dies, bad input."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import FORKS  # noqa: F401  # processes that have imported torch already
from recipe_jobs import JOBS, classification, regression, same, state
from torch import nn

from rankNAS.data.samples import Samples
from rankNAS.exceptions import UsageError
from rankNAS.plugins import load_callable
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.greedy_distil import GreedyDistil
from rankNAS.recovery.recipe import Job, make_recipe
from rankNAS.recovery.recover import loop_of, run_recipe
from rankNAS.recovery.team import DismissedError
from rankNAS.tasks.infer import infer_task

COMMON: dict[str, Any] = {"batch_size": 20, "learning_rate": 0.02, "speed": "plain"}
PRESSED: dict[str, Any] = {"rank": 1, "rate": 1.0, "period": 4}  # of the small layers


def kept(made: Callable[[], Job], path: Path) -> Job:
    return replace(made(), checkpoint=path)


@pytest.mark.parametrize("processes", [1, 3])
def test_at_full_rank_it_is_distil(processes: int, tmp_path: Path) -> None:
    """Batches of 20 and a last one of 16 samples are not divisible by 3."""
    job, alone = kept(regression, tmp_path / "team.pt"), kept(regression, tmp_path / "alone.pt")
    report = run_recipe(GreedyDistil(processes=processes, rank=99, epochs=2, **COMMON), job)
    assert report == replace(run_recipe(Distil(epochs=2, **COMMON), alone), seconds=report.seconds)
    for name, value in state(alone.network).items():
        torch.testing.assert_close(job.network.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    assert not dist.is_initialized()


def watched(payload: tuple[GreedyDistil, Job]) -> None:
    """As `follow`, with the weights after each step written to a file."""
    recipe, job = payload
    found = []
    with recipe.prepared_beside(job) as setup:
        loop = loop_of(recipe, job, setup)
        loop.on_step = lambda step, total, loss: found.append(state(job.network))
        try:
            loop.follow()
        except DismissedError:
            torch.save(found, os.environ["WATCHED"])


@pytest.mark.parametrize("kind", ["classification", "language"])
def test_the_processes_have_equal_parameters_after_each_step(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WATCHED", str(tmp_path / "watched.pt"))
    monkeypatch.setattr("rankNAS.recovery.greedy_distil.follow", watched)
    job, own = kept(JOBS[kind], tmp_path / "run.pt"), []
    names = {name for name, _ in job.network.named_parameters()}
    run_recipe(
        GreedyDistil(epochs=2, **COMMON, **PRESSED),
        job,
        on_step=lambda step, total, loss: own.append(state(job.network)),
    )
    others = torch.load(tmp_path / "watched.pt")
    assert len(own) == len(others) >= 4
    for first, second in zip(own, others, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_resumes_with_the_errors_of_all_processes(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = GreedyDistil(epochs=2, **COMMON, **PRESSED)
    whole = kept(JOBS[kind], tmp_path / "whole.pt")
    run_recipe(recipe, whole)
    monkeypatch.setattr("rankNAS.recovery.loop.SAVED", -1.0)  # after each step

    def interrupt(step: int, total: int, loss: float) -> None:
        if step == 7:  # between two refreshes
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, kept(JOBS[kind], tmp_path / "run.pt"), on_step=interrupt)
    content = torch.load(tmp_path / "run.pt")
    errors = content["parts"][-1]["errors"]
    assert content["step"] == 6 and len(errors) == 2 and errors.any()
    monkeypatch.undo()
    resumed, steps = kept(JOBS[kind], tmp_path / "run.pt"), list[int]()
    run_recipe(recipe, resumed, on_step=lambda step, total, loss: steps.append(step))
    assert steps[0] == 7 and same(state(resumed.network), state(whole.network))


def dying(payload: tuple[GreedyDistil, Job]) -> None:
    """As `follow`, but process 2 is killed after some steps."""
    recipe, job = payload
    with recipe.prepared_beside(job) as setup:
        loop = loop_of(recipe, job, setup)

        def on_step(step: int, total: int, loss: float) -> None:
            if step == 7 and dist.get_rank() == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.on_step = on_step
        loop.follow()


def test_a_process_that_dies_ends_all_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = GreedyDistil(processes=3, epochs=2, **COMMON, **PRESSED)
    monkeypatch.setattr("rankNAS.recovery.greedy_distil.follow", dying)
    with pytest.raises(UsageError) as error:
        run_recipe(recipe, kept(regression, tmp_path / "run.pt"))
    text = str(error.value)
    assert (
        "process 2 of the 3 has ended (exit code " in text
        and "stops; the same command goes on from" in text
    )
    assert str(tmp_path / "run.pt") in text and "\n" not in text and not dist.is_initialized()
    assert torch.load(tmp_path / "run.pt")["step"] == 5  # of the first epoch
    monkeypatch.undo()
    resumed, steps = kept(regression, tmp_path / "run.pt"), list[int]()
    run_recipe(recipe, resumed, on_step=lambda step, total, loss: steps.append(step))
    whole = kept(regression, tmp_path / "whole.pt")
    run_recipe(recipe, whole)
    assert steps[0] == 6 and same(state(resumed.network), state(whole.network))


def failing(payload: object) -> None:
    raise ValueError("no memory\nof any kind")


def test_the_cause_of_an_error_elsewhere_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rankNAS.recovery.greedy_distil.follow", failing)
    with pytest.raises(
        UsageError, match=r"process 1 of the 2 has ended \(ValueError: no memory\), .* stops\.$"
    ):
        run_recipe(GreedyDistil(epochs=2, **COMMON), kept(regression, tmp_path / "run.pt"))


def test_networks_of_files_are_sent_to_other_processes(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(
        "from torch import nn\nclass Twice(nn.Linear):\n"
        "    def forward(self, x):\n        return 2 * super().forward(x)\n"
    )
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom parts import Twice\nclass Net(nn.Sequential):\n    pass\n"
        "def make():\n    return Net(Twice(12, 8), Twice(8, 3))\n"
    )
    torch.manual_seed(0)
    network = load_callable(f"{tmp_path}/net.py:make")()
    job = replace(regression(), network=network, checkpoint=tmp_path / "run.pt")
    report = run_recipe(GreedyDistil(epochs=1, distill=0.0, **COMMON), job)
    assert report.steps == 5


# ----------------------------------------------------------------------------------- bad input


def test_more_processes_than_samples_in_a_batch() -> None:
    job = regression()
    with pytest.raises(UsageError, match="5 processes are more than the 4 samples of a batch; g"):
        run_recipe(GreedyDistil(processes=5, batch_size=4), job)
    few = replace(job, data=job.data.take(torch.arange(3)))
    with pytest.raises(UsageError, match="4 processes are more than the 3 samples of a batch; g"):
        run_recipe(GreedyDistil(processes=4), few)


def test_what_cannot_be_sent() -> None:
    network = nn.Linear(2, 2)
    network.function = lambda x: x
    data = Samples.of((torch.zeros(8, 2), torch.zeros(8, 2)))
    job = Job(network, data, infer_task(network, data.example(4)))
    with pytest.raises(UsageError, match="cannot be sent to another process .*top level of a fil"):
        run_recipe(GreedyDistil(distill=0.0), job)


def test_a_process_group_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        with pytest.raises(UsageError, match="a process group of torch.distributed already; regi"):
            run_recipe(GreedyDistil(), regression())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("processes=0", "processes is 0"),
        ("rank=0", "rank is 0"),
        ("rate=0", "rate is 0.0"),
        ("start=-1", "start is -1"),
        ("speed=auto", "speed is 'auto', but it must be plain or a mode"),
    ],
)
def test_bad_options(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_recipe(f"greedylore:{options}")


def test_a_loss_that_is_not_finite_is_named_by_the_leader(tmp_path: Path) -> None:
    job = kept(classification, tmp_path / "run.pt")

    def spoil(epoch: int) -> None:
        with torch.no_grad():
            next(job.network.parameters()).fill_(torch.nan)

    with pytest.raises(UsageError, match=r"the loss is nan at step 6 of 10 .*the last good check"):
        run_recipe(GreedyDistil(epochs=2, **COMMON), job, on_epoch=spoil)
