"""Recipes: by name and options, on three kinds of tasks, interrupted, limited, and bad input."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clocks import Clock
from processes import FORKS  # noqa: F401  # those of greedylore need not import torch then
from recipe_jobs import JOBS, classification, language, loss_of, regression, same, state
from torch import Tensor, nn

import rankNAS
from rankNAS.data.images.augment import Augmentation
from rankNAS.deadline import Deadline, limited_by
from rankNAS.exceptions import UnknownNameError, UsageError, WeightsError
from rankNAS.io.files import cache_folder
from rankNAS.recovery.config import TrainingConfig
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.loop import Loop
from rankNAS.recovery.parts import Average
from rankNAS.recovery.plain import Plain
from rankNAS.recovery.products import chains
from rankNAS.recovery.recipe import RECIPES, Job, Recipe, make_recipe
from rankNAS.recovery.recover import loop_of, run_recipe
from rankNAS.recovery.speed import fastest
from rankNAS.recovery.teacher import Teacher
from rankNAS.recovery.trainer import train

SHORT = "epochs=3,batch=16,lr=0.02,speed=plain"


def recipe_of(name: str, **options: Any) -> Recipe:
    return replace(make_recipe(f"{name}:{SHORT}"), **options)


# ------------------------------------------------------------------------------------- options


def test_recipes_are_made_from_texts() -> None:
    made = make_recipe("distil:epochs=7, lr=0.01,features=1,refine=true,clip=none,optimizer=adamw")
    assert made == Distil(
        epochs=7, learning_rate=0.01, features=1.0, refine=True, clip=None, optimizer="adamw"
    )
    assert make_recipe(str(made)) == made == make_recipe(made)
    assert str(make_recipe("plain")) == "plain" and make_recipe("plain:") == Plain()
    for name in RECIPES:
        assert make_recipe(name).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distill", "Did you mean 'distil'"),
        ("distil:epoch=3", "Did you mean 'epochs'"),
        ("distil:epochs", "give epochs=VALUE"),
        ("distil:epochs=many", "epochs is 'many', but it must be a whole number"),
        ("distil:refine=1", "refine is '1', but it must be true or false"),
        ("distil:lr=0.1,learning_rate=0.1", "learning_rate is given twice"),
        ("distil:epochs=0", "epochs is 0, but it must be at least 1"),
        ("distil:lr=-1", "learning_rate is -1.0, but it must be above 0"),
        ("distil:seconds=nan", "seconds is nan"),
        ("distil:ema=1", "ema is 1.0"),
        ("distil:distill=2", "distill is 2.0"),
        ("distil:optimizer=lion", "optimizer is 'lion'"),
        ("distil:speed=warp", "speed is 'warp'"),
        ("plain:temperature=0", "temperature is 0.0"),
        ("swiftlearn:keep=0", "keep is 0.0, but it must be in .* not empty"),
        ("swiftlearn:epochs=3,warm_up=3", "warm_up is 3"),
        ("swiftlearn:score=los", "unknown score 'los'. Did you mean 'loss'"),
        ("swiftlearn:schedule=cosine", "schedule is 'cosine'"),
        (3, "must be a text"),
    ],
)
def test_bad_recipes(text: Any, message: str) -> None:
    with pytest.raises((UsageError, UnknownNameError), match=message):
        make_recipe(text)


# --------------------------------------------------------------------------------- three tasks


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_recovers_on_every_kind_of_task(name: str, kind: str) -> None:
    job = JOBS[kind]()
    before, forms = loss_of(job, job.network), [type(m) for m in job.network.modules()]
    dense = state(job.dense)
    recipe = recipe_of(name, epochs=12, optimizer="adamw", learning_rate=0.01)
    steps: list[tuple[int, int]] = []
    report = run_recipe(recipe, job, on_step=lambda step, total, loss: steps.append((step, total)))
    assert loss_of(job, job.network) < before
    assert report.steps == report.planned == len(steps) == steps[-1][0] and not report.stopped
    assert [type(m) for m in job.network.modules()] == forms and not job.network.training
    assert all(p.requires_grad for p in job.network.parameters())
    assert not any(m._forward_hooks for m in (*job.network.modules(), *job.dense.modules()))
    assert same(state(job.dense), dense)


def test_data_without_labels() -> None:
    job = classification()
    x = job.data.batch()[0]
    network, dense = job.network, job.dense
    found = rankNAS.recover(network, x, f"distil:{SHORT}", dense=dense)
    assert found is network
    with pytest.raises(UsageError, match="has no labels to learn; give the dense network"):
        rankNAS.recover(network, x, f"distil:{SHORT},distill=0")


def test_plain_is_the_training_of_finetune() -> None:
    job, other = classification(), classification()
    run_recipe(recipe_of("plain"), job)
    config = TrainingConfig(
        3, batch_size=16, learning_rate=0.02, distill=0.5, clip=1.0, optimizer="sgd"
    )
    train(other.network, other.data, config, task=other.task, teacher=other.dense)
    assert same(state(job.network), state(other.network))


def test_recover_takes_what_a_search_takes() -> None:
    job = classification()
    torch.manual_seed(5)
    kept = torch.get_rng_state()
    data = job.data.source
    pair = (data, data)
    steps: list[float] = []
    network = rankNAS.recover(
        job.network,
        pair,
        Distil(epochs=2, batch_size=32, speed="plain"),
        dense=job.dense,
        task="classification",
        on_step=lambda step, total, loss: steps.append(loss),
    )
    assert network is job.network and len(steps) == 6 and torch.equal(kept, torch.get_rng_state())


# -------------------------------------------------------------------------------------- distil


def test_an_average_is_exponential() -> None:
    """a_t = d_t a_{t-1} + (1 - d_t) w_t, with d_t = min(d, (1 + t) / (10 + t))."""
    network = nn.Linear(2, 2, bias=False)
    values = [torch.full((2, 2), float(v)) for v in (1, 5, -3, 2)]
    network.weight.data = values[0].clone()
    part = Average(network, 0.25)
    expected = values[0].clone()
    for t, value in enumerate(values[1:]):
        network.weight.data = value.clone()
        part.after_step(t)
        d = min(0.25, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * value
    with part.evaluated():
        torch.testing.assert_close(network.weight.data, expected)
    assert torch.equal(network.weight.data, values[-1])
    part.average()
    torch.testing.assert_close(network.weight.data, expected)


def test_the_teacher_runs_once_for_each_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kept outputs give the training that computing them again gives."""
    teachers: list[Teacher] = []
    original = Teacher.__init__

    def made(self: Teacher, *arguments: Any) -> None:
        original(self, *arguments)
        teachers.append(self)

    monkeypatch.setattr(Teacher, "__init__", made)
    found = {}
    for cache in (1.0, 2e-8, 1e-9):
        job = replace(classification(), augmentation=Augmentation(flip=True))
        run_recipe(recipe_of("distil", epochs=6, augmentations=2, cache=cache), job)
        found[cache] = state(job.network)
    passes = [teacher.passes for teacher in teachers]
    assert passes == [2 * 6, passes[1], 6 * 6] and 2 * 6 < passes[1] < 6 * 6 + 1
    assert same(found[1.0], found[2e-8]) and same(found[1.0], found[1e-9])


def test_without_augmentation_the_teacher_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    close = Teacher.close

    def closed(self: Teacher) -> None:
        found.append(self.passes)
        close(self)

    monkeypatch.setattr(Teacher, "close", closed)
    for kind in ("language", "regression"):
        run_recipe(recipe_of("distil", epochs=4), JOBS[kind]())
    assert found == [3, 6]


def test_of_a_vocabulary_the_top_tokens_are_kept() -> None:
    job = language()
    batch = job.data.example(8)
    teacher = Teacher(job.dense, job.task, job.device, 1.0, 10**6, 4)
    whole, first, kept = (teacher.prediction(batch, place) for place in (None, (0, 0), (0, 0)))
    assert teacher.passes == 2
    own = job.task.run(job.network, batch)
    exact, top, again = (own.distillation(p).detach() for p in (whole, first, kept))
    assert top == again and 0 < float(top) <= float(exact)
    teacher.close()
    every = Teacher(job.dense, job.task, job.device, 1.0, 10**6, 31)
    torch.testing.assert_close(own.distillation(every.prediction(batch, (0, 0))).detach(), exact)
    every.close()


def test_kept_outputs_of_real_numbers() -> None:
    job = regression()
    batch = job.data.example(8)
    teacher = Teacher(job.dense, job.task, job.device, 1.0, 10**6)
    first, second = (teacher.prediction(batch, (0, 1)) for _ in range(2))
    assert teacher.passes == 1 and torch.equal(first.mean, second.mean)
    teacher.close()


def test_feature_maps_approach_those_of_the_dense_network() -> None:
    distances = {}
    for weight in (0.0, 3.0):
        job = classification()
        paths = [chain.path for chain in chains(job.network)]
        run_recipe(recipe_of("distil", features=weight, epochs=8), job)
        x = job.data.batch()[0]
        maps: list[dict[str, torch.Tensor]] = [{}, {}]
        for network, found in zip((job.network, job.dense), maps, strict=True):
            for path in paths:
                network.get_submodule(path).register_forward_hook(
                    lambda m, i, o, p=path, f=found: f.update({p: o})
                )
            with torch.no_grad():
                network.eval()(x)
        distances[weight] = sum(float((maps[0][p] - maps[1][p]).square().mean()) for p in paths)
    assert distances[3.0] < distances[0.0]


def test_batch_norms_are_those_of_the_final_weights() -> None:
    job = classification()
    run_recipe(recipe_of("distil"), job)
    x = job.data.batch()[0]
    maps = job.network[0](x)
    torch.testing.assert_close(job.network[1].running_mean, maps.mean((0, 2, 3)))


def test_refinement_comes_before() -> None:
    job, other = classification(), classification()
    run_recipe(recipe_of("distil", refine=True, epochs=1), job)
    run_recipe(recipe_of("distil", epochs=1), other)
    assert not same(state(job.network), state(other.network))
    with pytest.raises(UsageError, match="give it as `dense`"):
        run_recipe(recipe_of("plain", refine=True, distill=0.0), replace(job, dense=None))


def test_default_rates() -> None:
    def rate(text: str, job: Job) -> float:
        return make_recipe(text).config(job).learning_rate

    assert rate("distil", classification()) == rate("freeze", classification()) == 0.1
    assert rate("distil", regression()) == 0.03  # without a batch norm
    assert rate("distil", language()) == rate("distil:optimizer=adamw", classification()) == 3e-4
    assert rate("distil:lr=0.2", classification()) == 0.2
    assert (rate("plain", classification()), rate("lora", classification())) == (0.01, 0.03)


def test_the_mode_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankNAS.recovery.speed.COMPILED", 0.0)
    job = classification()
    buffers = {n: b.clone() for n, b in job.network.named_buffers()}
    seen: list[str] = []

    def measured(loop: Loop, mode: Any, least: float = math.inf) -> float:
        seen.append(str(mode))
        return 1.0 if "bf16" in str(mode) else 2.0

    with monkeypatch.context() as patch:
        patch.setattr("rankNAS.recovery.speed._seconds", measured)
        report = run_recipe(recipe_of("distil", speed="auto"), job)
    assert "channels_last" in seen and "none" in seen and "channels_last+bf16+compile" in seen
    assert report.mode == "channels_last+bf16"
    again = classification()
    run_recipe(recipe_of("distil", speed="none", epochs=1), again)
    monkeypatch.setattr("rankNAS.recovery.speed.COMPILED", math.inf)  # without a compiler
    run_recipe(recipe_of("distil", speed="auto", epochs=1), again)
    assert set(buffers) == {n for n, _ in again.network.named_buffers()}


@pytest.mark.parametrize(("seconds", "passes"), [(1.0, 4), (9.0, 3), (25.0, 1)])
def test_slow_steps_are_timed_less_often(
    seconds: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading of the clock is so many seconds after the one before."""
    readings = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: seconds * next(readings))
    monkeypatch.setattr("rankNAS.recovery.speed.time", clock)
    job, recipe, calls = classification(), recipe_of("plain", distill=0.0), list[str]()
    with recipe.prepared(job) as setup:
        loop = loop_of(recipe, job, setup)
        plain = loop.loss_of

        def counted(network: nn.Module, batch: Any, place: Any, mode: Any) -> Tensor:
            calls.append(str(mode))
            return plain(network, batch, place, mode)

        monkeypatch.setattr(loop, "loss_of", counted)
        assert str(fastest(loop, "auto", 60.0)) == "channels_last"  # no other one is faster
    assert {mode: calls.count(mode) for mode in calls} == {
        "channels_last": passes,
        "none": passes,
        "channels_last+bf16": passes,
    }


# ------------------------------------------------------------------------- interrupted, limited


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize("name", RECIPES)
def test_resumes_within_an_epoch_to_the_same_bits(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def job() -> Job:
        made = JOBS[kind]()
        return replace(
            made, augmentation=Augmentation(flip=True), checkpoint=tmp_path / f"{name}.pt"
        )

    recipe = recipe_of(name, epochs=3)
    whole = replace(job(), checkpoint=tmp_path / "whole.pt")
    run_recipe(recipe, whole)
    monkeypatch.setattr("rankNAS.recovery.loop.SAVED", -1.0)  # after each step

    def interrupt(step: int, total: int, loss: float) -> None:
        if step == total // 2 + 1:
            raise KeyboardInterrupt

    broken = job()
    forms = [type(m) for m in broken.network.modules()]
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, broken, on_step=interrupt)
    assert [type(m) for m in broken.network.modules()] == forms
    monkeypatch.undo()
    torch.rand(5)  # the state of torch's own generator must not matter
    resumed, steps = job(), list[int]()
    run_recipe(recipe, resumed, on_step=lambda step, total, loss: steps.append(step))
    assert steps[0] > 1 and same(state(resumed.network), state(whole.network))


def test_slow_checkpoints_are_written_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], list[float]()

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def slow(path: Path, content: object) -> None:
        written.append(now[0])
        now[0] += 6.0

    def on_step(step: int, total: int, loss: float) -> None:
        now[0] += 1.0

    monkeypatch.setattr("rankNAS.recovery.loop.time", Time)
    monkeypatch.setattr("rankNAS.recovery.loop.write_checkpoint", slow)
    run_recipe(recipe_of("plain", epochs=100), regression(), on_step=on_step)
    # The first after an epoch of six steps, the last at the end, others every two minutes.
    assert written[0] == 6.0 and written[-1] == now[0] - 6.0
    gaps = [b - a for a, b in zip(written, written[1:-1], strict=False)]
    assert gaps and min(gaps) > 120.0 and max(gaps) < 140.0


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import recipe_jobs, torch
torch.set_num_threads(1)
from rankNAS.recovery import loop
from rankNAS.recovery.recipe import make_recipe
from rankNAS.recovery.recover import run_recipe
loop.SAVED = -1.0
def on_step(step, total, value):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
run_recipe(make_recipe({recipe!r}), recipe_jobs.JOBS[{kind!r}](), on_step=on_step)
"""


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("distil:", "classification"),
        ("lora:", "language"),
        ("fast:sam_every=2,", "classification"),
        ("swiftlearn:warm_up=1,keep=0.5,", "classification"),
        ("greedylore:rank=1,rate=1,period=5,", "regression"),
    ],
)
def test_a_killed_training_resumes_to_the_same_weights(given: str, kind: str) -> None:
    recipe = f"{given}{SHORT}"
    here = Path(__file__).parent
    program = KILLED.format(paths=[str(here), str(here.parent)], recipe=recipe, kind=kind)
    environment = os.environ | {"PYTHONPATH": str(Path(rankNAS.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    resumed, steps = JOBS[kind](), list[int]()
    run_recipe(make_recipe(recipe), resumed, on_step=lambda step, total, loss: steps.append(step))
    assert steps[0] == 8  # the seventh step was saved before the eighth ended
    for file in (cache_folder() / "checkpoints").glob("*"):
        file.unlink()
    whole = JOBS[kind]()
    run_recipe(make_recipe(recipe), whole)
    assert same(state(resumed.network), state(whole.network))


def test_a_limit_keeps_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the tests ends the time in the third epoch, after the weights were spoilt."""
    monkeypatch.setattr("rankNAS.recovery.loop.JUDGING", math.inf)  # judged after every epoch
    clock, job = Clock(monkeypatch), classification()
    before, good = loss_of(job, job.network), {}

    def on_epoch(epoch: int) -> None:
        if epoch == 2:
            good.update(state(job.network))
            with torch.no_grad():
                for parameter in job.network.parameters():
                    parameter.mul_(30)
        if epoch == 3:
            clock.end()

    recipe = recipe_of("plain", epochs=50, distill=0.0)
    with limited_by(Deadline(1e6)):
        report = run_recipe(recipe, job, on_epoch=on_epoch)
    assert report.stopped and report.steps == 18 and report.planned == 50 * 6
    assert same(state(job.network), good) and loss_of(job, job.network) < before


@pytest.mark.parametrize(("tokens", "seen"), [(13, 2), (1, 1), (10**6, 48)])
def test_weights_are_judged_on_a_bounded_number_of_tokens(
    tokens: int, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences have 6 tokens."""
    monkeypatch.setattr("rankNAS.recovery.loop.JUDGED_TOKENS", tokens)
    job, sizes, recipe = language(), list[int](), recipe_of("plain", distill=0.0)
    with recipe.prepared(job) as setup:
        loop = loop_of(recipe, job, setup)
        job.network.register_forward_hook(lambda network, args, y: sizes.append(len(args[0])))
        assert math.isfinite(loop.judged())
    assert sum(sizes) == seen


def test_the_schedule_is_fitted_to_the_seconds() -> None:
    job, totals = regression(), list[int]()
    report = run_recipe(
        recipe_of("plain", epochs=10**5, seconds=1.5),
        job,
        on_step=lambda step, total, loss: totals.append(total),
    )
    assert totals[0] == 6 * 10**5 and len(set(totals)) == 2 and report.planned == totals[-1]
    assert 0.1 < report.seconds < 6 and report.steps >= 0.5 * report.planned
    again = run_recipe(recipe_of("plain", epochs=10**5, seconds=1.5), regression())
    assert again.planned == report.planned and again.steps >= report.steps


@pytest.mark.parametrize(
    "recipe",
    [
        "plain",
        "distil",
        "distil:speed=auto",
        "distil:refine=true",
        "lora:speed=auto",
        "progressive",
        "fast",
    ],
)
def test_a_limit_shorter_than_a_step(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = regression()
    kept = state(job.network)
    clock = Clock(monkeypatch)
    clock.end()
    with (
        limited_by(Deadline(1.0, started=0.0)),
        pytest.raises(UsageError, match="shorter than one step"),
    ):
        run_recipe(make_recipe(recipe), job)
    assert same(state(job.network), kept)


@pytest.mark.parametrize("name", RECIPES)
def test_a_finished_training_is_not_repeated(name: str) -> None:
    first, second, steps = regression(), regression(), list[int]()
    report = run_recipe(recipe_of(name), first)
    (file,) = (cache_folder() / "checkpoints").glob("recover-*")

    def on_step(step: int, total: int, loss: float) -> None:
        steps.append(step)

    assert run_recipe(recipe_of(name), second, on_step=on_step) == report and not steps
    assert same(state(first.network), state(second.network))
    file.write_bytes(b"")
    third = regression()
    run_recipe(recipe_of(name), third, on_step=on_step)
    assert steps and same(state(first.network), state(third.network))


# ----------------------------------------------------------------------------------- bad input


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    job = replace(regression(), checkpoint=tmp_path / "run.pt")

    def spoil(epoch: int) -> None:
        if epoch == 2:
            with torch.no_grad():
                job.network[3].bias[0] = math.inf

    with pytest.raises(UsageError, match=r"at step 13 of 18 .*in epoch 3; the last good") as error:
        run_recipe(recipe_of("distil"), job, on_epoch=spoil)
    assert str(tmp_path / "run.pt") in str(error.value)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    assert content["step"] == 12 and all(x.isfinite().all() for x in content["model"].values())


def test_a_teacher_with_other_outputs() -> None:
    job = regression()
    other = replace(job, dense=nn.Sequential(job.dense, nn.Linear(3, 1)))
    with pytest.raises(UsageError, match=r"shapes \[\(2, 1\)\], those of the .* \[\(2, 3\)\]"):
        run_recipe(recipe_of("distil"), other)
    with pytest.raises(UsageError, match="learns from the dense network; give"):
        run_recipe(recipe_of("distil"), replace(job, dense=None))
    run_recipe(recipe_of("distil", distill=0.0), replace(job, dense=None))


def test_a_checkpoint_of_another_recipe(tmp_path: Path) -> None:
    job: Callable[[], Job] = lambda: replace(regression(), checkpoint=tmp_path / "run.pt")  # noqa: E731
    run_recipe(recipe_of("distil"), job())
    with pytest.raises(WeightsError, match="another configuration"):
        run_recipe(recipe_of("distil", decay=0.0), job())
