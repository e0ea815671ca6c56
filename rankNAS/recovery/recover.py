"""`recover`: the training of a compressed network by a recipe."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rankNAS.copies import copied
from rankNAS.data.images.augment import NO_FLIP
from rankNAS.data.loading import load_data
from rankNAS.data.samples import Samples
from rankNAS.deadline import Deadline, TimeLimitError, limited_by, seconds_left
from rankNAS.exceptions import UsageError, WeightsError, WriteError
from rankNAS.io.checkpoints import read_checkpoint, write_checkpoint
from rankNAS.io.files import cache_folder
from rankNAS.io.fingerprints import fingerprint
from rankNAS.recovery.config import Refinement
from rankNAS.recovery.loop import Loop, Report, TooShortError
from rankNAS.recovery.precision import in_float32
from rankNAS.recovery.products import chains
from rankNAS.recovery.recipe import Job, Recipe, Setup, make_recipe
from rankNAS.recovery.refinement import refine
from rankNAS.tasks.base import Task
from rankNAS.tasks.infer import examples, infer_task, make_task
from rankNAS.trees import device_of, named_tensors, tensors

if TYPE_CHECKING:
    from rankNAS.data.loading import DataSource

__all__ = ["VERSION", "loop_of", "recover", "run_recipe"]

logger = logging.getLogger(__name__)
KEPT = 4 << 30  # bytes of samples that are kept in memory; more are read in every epoch
VERSION = 2  # part of the key of checkpoints: raise it when the trainings change


def recover(
    network: nn.Module,
    data: DataSource | Samples,
    recipe: str | Recipe = "distil",
    *,
    dense: nn.Module | None = None,
    task: str | Task | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    time_limit: float | None = None,
    checkpoint: Path | str | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Train a compressed network in place, to regain the quality of the dense one.

    Args:
        network: The compressed network. It ends in evaluation mode, on its device. Weights of 16
            bits are trained in float32 and rounded at the end.
        data: As for `rankNAS.search`, or the training samples.
        recipe: ``NAME:key=value,...`` or a `Recipe`; see `rankNAS.recovery.recipe.RECIPES`.
        dense: The dense network, from which most recipes learn; it is not changed.
        task: A name or a `Task`; found from the data and the network if None.
        seed: The random seed.
        device: Where to train; the network's device by default.
        time_limit: Seconds, after which the best weights so far are kept. The schedule is fitted
            to them.
        checkpoint: The file of the training's state, from which an interrupted training goes on;
            one in the cache folder by default.
        on_step: Called after each step with its number from 1, the number of steps and the loss.

    Returns:
        The same ``network``.

    Raises:
        UsageError: The recipe does not fit, the loss is not finite, or the time is too short.
        WeightsError: The checkpoint is damaged or of another training.
        WriteError: The checkpoint cannot be written; the last one is intact.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(64, 8)
        >>> data = TensorDataset(x, (x[:, 0] > 0).long())
        >>> dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> thin = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))
        >>> network = nn.Sequential(thin, nn.ReLU(), nn.Linear(8, 2))
        >>> network is recover(network, data, "distil:epochs=2,speed=plain", dense=dense)
        True
    """
    chosen, home = make_recipe(recipe), device_of(network)
    place = torch.device(home if device is None else device)
    samples, augmentation = data, NO_FLIP
    if not isinstance(samples, Samples):
        loaded = load_data(data)
        samples, augmentation = loaded.train, loaded.augmentation
    if task is None:
        task = infer_task(network.to(place), examples(network, samples))
    elif isinstance(task, str):
        task = make_task(task).bound(samples.example(2, place), network.to(place))
    job = Job(
        network,
        samples,
        task,
        None if dense is None else copied(dense),
        augmentation,
        place,
        seed,
        None if checkpoint is None else Path(checkpoint),
    )
    with limited_by(Deadline.of(time_limit)):
        report = run_recipe(chosen, job, on_step=on_step)
    if report.stopped:
        logger.warning(
            "the time ended the recovery after %d of %d steps; the best weights so far are kept",
            report.steps,
            report.planned,
        )
    network.to(home)
    return network


def run_recipe(
    recipe: Recipe,
    job: Job,
    *,
    keeps_best: bool = True,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[int], object] | None = None,
    on_member: Callable[[int], object] | None = None,
) -> Report:
    """Train the network of a job by a recipe.

    Args:
        recipe: The recipe.
        job: The network and the data. Without a checkpoint, one in the cache folder is used.
        keeps_best: As for `Loop`.
        on_step: As for `Loop`.
        on_epoch: As for `Loop`.
        on_member: Called after each training of a recipe of several (`Recipe.courses`), numbered
            from 0.

    Raises:
        UsageError: As for `recover`.
        TimeLimitError: The active deadline has passed, and the best weights are not kept.
    """
    recipe.check(job.task, job.dense is not None)
    if recipe.samples is not None:
        job = replace(job, data=job.data.subsample(recipe.samples, job.seed))
    if not job.data.in_memory:
        job = replace(job, data=job.data.kept(KEPT))
    job.network.to(job.device)
    if job.dense is not None:
        _check_teacher(recipe, job, job.dense)
    final = None
    if job.checkpoint is None:
        path = _checkpoint(recipe, job)
        job, final = replace(job, checkpoint=path), path.with_suffix(".final.pt")
        if (known := _finished(final, job.network)) is not None:
            return known
    if recipe.refine:
        _refine(job, keeps_best)
    whole, used = Report(0, 0, 0.0), list[Path]()
    with closing(recipe.courses(job)) as courses:
        for number, part in enumerate(courses):
            assert part.checkpoint is not None
            used.append(part.checkpoint)
            following = recipe.trainings - number
            counted = _counting(on_step, whole.steps, following)
            try:
                with _share_of_time(following):
                    report = _trained(recipe, part, keeps_best, counted, on_epoch)
            except (TimeLimitError, TooShortError):
                if not keeps_best:
                    raise
                if not number:
                    raise TooShortError from None
                whole = replace(whole, stopped=True)  # the network has only taken its form
                continue
            whole = Report(
                whole.steps + report.steps,
                whole.planned + report.planned,
                whole.seconds + report.seconds,
                whole.stopped or report.stopped,
                report.mode,
            )
            if on_member is not None and recipe.trainings > 1:
                on_member(number)
    job.network.eval()
    if final is not None and not whole.stopped:
        _finish(job.network, final, whole, used)
    return whole


def _share_of_time(following: int) -> AbstractContextManager[None]:
    """Context with an equal share of the time that is left, for one of so many trainings."""
    left = seconds_left()
    if following == 1 or not 0 < left < math.inf:
        return nullcontext()
    return limited_by(Deadline(max(left / following, 1e-3)))


def _counting(
    on_step: Callable[[int, int, float], None] | None, done: int, following: int
) -> Callable[[int, int, float], None] | None:
    """The callback with the steps of earlier trainings counted, and those of later ones."""
    if on_step is None:
        return None

    def counted(step: int, total: int, loss: float) -> None:
        on_step(done + step, done + following * total, loss)

    return counted


def _trained(
    recipe: Recipe,
    job: Job,
    keeps_best: bool,
    on_step: Callable[[int, int, float], None] | None,
    on_epoch: Callable[[int], object] | None,
) -> Report:
    """One training of a recipe."""
    precise = in_float32(job.network) if recipe.trains_weights else nullcontext()
    with precise, recipe.prepared(job) as setup:
        loop = loop_of(recipe, job, setup)
        loop.keeps_best, loop.on_step, loop.on_epoch = keeps_best, on_step, on_epoch
        return loop.run()


def loop_of(recipe: Recipe, job: Job, setup: Setup) -> Loop:
    """The loop of a training by a recipe."""
    return Loop(
        job.network,
        job.data,
        job.task,
        recipe.config(job),
        setup.loss,
        setup.parts,
        augmentation=job.augmentation,
        device=job.device,
        variants=setup.variants,
        team=setup.team,
        speed=recipe.speed,
        seconds=None if recipe.seconds is None else recipe.seconds / recipe.trainings,
        checkpoint=job.checkpoint,
        identity={"recipe": str(recipe), "version": VERSION},
    )


def _finished(path: Path, network: nn.Module) -> Report | None:
    """Fill a network with the weights of a finished training of it; None if there is none."""
    if not path.is_file():
        return None
    try:
        content = read_checkpoint(path, VERSION)
    except WeightsError as error:
        logger.warning("a network is trained again, because of a bad file: %s", error)
        return None
    network.load_state_dict(content["model"])
    network.eval()
    return Report(**content["report"])


def _finish(network: nn.Module, path: Path, report: Report, used: Sequence[Path]) -> None:
    """Keep the trained weights in place of the states of the trainings, which are larger."""
    content = {"model": network.state_dict(), "report": asdict(report), "identity": VERSION}
    try:
        write_checkpoint(path, content)
    except WriteError as error:
        logger.warning("the trained network is not kept in the cache: %s", error)
    for file in used:
        file.unlink(missing_ok=True)


def _check_teacher(recipe: Recipe, job: Job, dense: nn.Module) -> None:
    """Raise a UsageError unless the dense network's outputs can be learnt from."""
    if not recipe.needs_dense and job.task.labelled:
        return
    batch = job.data.example(2, job.device)
    with torch.no_grad():
        own, wanted = (
            [tuple(x.shape) for x in tensors(job.task.inputs_of(batch).run(m))]
            for m in (job.network.eval(), dense.to(job.device).eval())
        )
    if own != wanted:
        raise UsageError(
            f"recipe {recipe.name!r} cannot learn from the dense network: its outputs have the "
            f"shapes {wanted}, those of the network {own}; give the network that was compressed."
        )


def _checkpoint(recipe: Recipe, job: Job) -> Path:
    """A path that is equal for equal networks, recipes and first samples."""
    tensors = dict(job.network.state_dict())
    tensors |= {f"data {name}": x for name, x in named_tensors(job.data.example(16))}
    key = fingerprint(tensors, f"{VERSION} {recipe} {job.seed} {len(job.data)} {job.task}")
    return cache_folder() / "checkpoints" / f"recover-{key}.pt"


def _refine(job: Job, keeps_best: bool) -> None:
    """Refine the decomposed layers block by block, before any training."""
    if job.dense is None:
        raise UsageError("a refinement learns from the dense network; give it as `dense`.")
    layers = {chain.path: [chain.path] for chain in chains(job.network)}
    assert job.checkpoint is not None
    try:
        refine(
            job.network,
            job.dense,
            layers,
            job.data,
            job.task,
            Refinement(),
            seed=job.seed,
            device=job.device,
            checkpoint=job.checkpoint.with_suffix(".refine.pt"),
        )
    except TimeLimitError:
        if not keeps_best:
            raise
        raise TooShortError from None
