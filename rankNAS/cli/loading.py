"""Loading of the data, the task, the space and the dense model named by options; checks."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankNAS.cli.options.common import SpaceOptions
from rankNAS.cli.options.model import ModelOptions
from rankNAS.cli.options.search import SearchOptions
from rankNAS.cli.output import ProgressDisplay
from rankNAS.data.base import Data
from rankNAS.data.labels import count_classes
from rankNAS.data.splits import split
from rankNAS.data.text.loading import is_text
from rankNAS.exceptions import UsageError, WeightsError
from rankNAS.execution.parallel import Workers
from rankNAS.hw_models import make_hardware
from rankNAS.model_data import context_of, load_data_of
from rankNAS.models.weights import (
    load_weights,
    pretrained_weights,
    recorded_normalization,
    trained_model,
)
from rankNAS.objectives import make_objective
from rankNAS.plugins import is_plugin
from rankNAS.recovery.config import (
    Refinement,
    TrainingConfig,
    affordable_training,
    default_config,
)
from rankNAS.recovery.plain import Plain
from rankNAS.recovery.recipe import Recipe, make_recipe
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import check_patterns, compile_space
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.search_spaces.zoo import CATALOGUE, build_model, family
from rankNAS.search_spaces.zoo.external import wants_classes
from rankNAS.search_spaces.zoo.huggingface import is_huggingface
from rankNAS.settings import Settings, check_device
from rankNAS.strategies import make_strategy
from rankNAS.strategies.base import Strategy
from rankNAS.strategies.tables import check_reachable
from rankNAS.tasks.base import Task
from rankNAS.tasks.classification import Classification
from rankNAS.tasks.infer import make_task, resolve_task

__all__ = [
    "check_options",
    "check_writable",
    "chosen_recipe",
    "image_side",
    "load_model",
    "load_named_data",
    "load_space",
    "load_task",
    "named_strategy",
    "rank_policy",
    "training_config",
    "untrained_model",
    "within_context",
    "workers_of",
]


CLIP = 1.0  # gradient norm; without clipping, factors of small networks diverged at 0.01


def check_options(options: ModelOptions) -> Settings:
    """The settings of the search; checks the options before any work is done.

    Raises:
        UsageError: An option is wrong.
    """
    _ = options.budgets
    check_device(options.device)
    if options.weights not in (None, "pretrained") and not os.path.lexists(str(options.weights)):
        raise WeightsError(f"there is no weights file {options.weights}; check the path.")
    make_hardware(options.hardware, strict=options.strict_hw)
    task = None if options.task is None else make_task(options.task)
    for objective in options.objective:
        make_objective(objective, task)
    chosen_recipe(options)
    own: dict[str, Any] = {}
    policy = replace(
        rank_policy(options),
        latency_tolerance=options.latency_tolerance,
        require_speedup=options.require_speedup,
    )
    if isinstance(options, SearchOptions):
        _check_storage(options.storage)
        workers_of(options)
        own = {
            "early_stopping": options.early_stopping,
            "recovery": training_config(options, options.trial_epochs),
            "recovery_samples": options.trial_samples,
        }
    return Settings(
        norm=options.norm,  # type: ignore[arg-type]
        calibration=options.calibration,
        validation=options.validation,
        batch_norm=options.batch_norm,
        sequential=options.sequential,
        policy=policy,
        latency_batch=options.latency_batch,
        latency_tokens=options.latency_tokens,
        strict_hardware=options.strict_hw,
        refine=_refinement(options),
        **own,
    )


def _refinement(options: ModelOptions) -> Refinement | None:
    """The refinement of chosen networks, which a number of steps asks for as well; or None."""
    if options.refine_steps is not None:
        return Refinement(steps=options.refine_steps)
    return Refinement() if options.refine else None


def workers_of(options: SearchOptions) -> Workers:
    """The configuration of the workers."""
    return Workers(
        options.workers, options.ray_address, options.gpus_per_trial, options.trial_timeout
    )


def rank_policy(options: SpaceOptions) -> RankPolicy:
    """The rank policy named by the options; checks the layers to exclude, too.

    Raises:
        UsageError: An operator is unknown, or an expression of ``--exclude`` is none.
    """
    check_patterns(options.exclude)
    policy = RankPolicy(options.candidates, options.multiple_of, split_fused=options.split_fused)
    operators = _operators(options)
    return policy if operators is None else replace(policy, operators=operators)


def _operators(options: SpaceOptions) -> tuple[str, ...] | None:
    """The operators that are given."""
    if options.operators is None:
        return None
    return tuple(filter(None, map(str.strip, options.operators.split(","))))


def named_strategy(name: str, options: SpaceOptions) -> Strategy:
    """The strategy of a name, with the operators that the options give.

    Raises:
        UnknownNameError: There is no such strategy.
    """
    strategy, operators = make_strategy(name), _operators(options)
    return strategy if operators is None else strategy.using(operators)


def image_side(space: str, image_size: int | None) -> int:
    """Image side in pixels: the given size, else that of the space."""
    small = space in CATALOGUE and family(space) == "cifar"
    return image_size or (32 if small else 224)


def check_writable(folder: Path) -> None:
    """Raise a UsageError if the folder cannot be created or written; does not create it."""
    existing = folder.absolute()
    try:
        while not _exists(existing):
            existing = existing.parent
    except (OSError, ValueError) as error:  # a name too long, or with a NUL character
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"the folder {str(folder)[:130]!r} cannot be written ({reason}); give another --out."
        ) from None
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {str(folder)!r} cannot be written; give another --out.")


def _check_storage(storage: str | None) -> None:
    """Raise a UsageError for a storage in memory, of which nothing would be left."""
    if re.fullmatch(r"sqlite(\+\w+)?://(/(:memory:)?)?(\?.*)?", storage or ""):
        raise UsageError(
            f"`--storage` {storage} keeps a study in memory, where it ends with the search; give "
            "sqlite:///FILE.db, or leave it out for study.db in the study's folder."
        )


def _exists(path: Path) -> bool:
    """Whether a path exists; unlike `Path.exists`, raises an error for an invalid name."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def load_named_data(options: ModelOptions) -> Data:
    """The data, normalised according to the options or the metadata of the weights.

    Classes are counted if the network needs their number and the data do not state it.

    Raises:
        UsageError: The data cannot be read.
    """
    normalize = options.normalize
    of_file = options.weights not in (None, "pretrained")
    if normalize is None and of_file and not (is_plugin(options.data) or is_text(options.data)):
        normalize = recorded_normalization(str(options.weights))
    data = load_data_of(
        options.space,
        options.data,
        normalize=normalize,
        image_size=options.image_size,
        context=options.context,
        stride=options.stride,
    )
    if data.num_classes is None and _needs_classes(options.space):
        return replace(data, num_classes=_counted(data))
    return data


def within_context(options: ModelOptions, data: Data, model: nn.Module) -> Data:
    """The data in windows that a model takes, where the options leave their length open."""
    most = context_of(model)
    if data.text is None or options.context is not None or most is None:
        return data
    if data.text.context <= most:
        return data
    return load_data_of(model, options.data, stride=options.stride)


def _needs_classes(space: str) -> bool:
    """Whether a network is built for a number of classes."""
    if is_plugin(space):
        return wants_classes(space)
    return not is_huggingface(space)


def _counted(data: Data) -> int | None:
    """The number of classes, from all labels; None if they are no classes."""
    found = [count_classes(part) for part in (data.train, data.test) if part is not None]
    known = [count for count in found if count is not None]
    return max(known) if len(known) == len(found) else None


def untrained_model(options: ModelOptions, data: Data, seed: int = 0) -> nn.Module:
    """The dense model, initialised from the seed.

    Raises:
        UsageError: The network does not fit the data.
    """
    torch.manual_seed(seed)
    return build_model(
        options.space, num_classes=data.num_classes, input_shape=data.input_shape
    ).eval()


def load_task(
    options: ModelOptions, data: Data, model: nn.Module, progress: ProgressDisplay
) -> Task:
    """The task given by the options, or found from the data and the untrained model.

    Raises:
        DataError: The data do not fit the model or the task.
        UsageError: There are neither weights nor labels to train with.
    """
    task = resolve_task(options.task, model, data)
    progress.say(f"task: {task.describe()}")
    if options.weights is None and not task.labelled and not is_huggingface(options.space):
        raise UsageError(
            f"the task is {task.describe()}, which has no labels to train the network with; give "
            "its trained weights with --weights."
        )
    return task


def load_space(
    options: ModelOptions, data: Data, model: nn.Module, task: Task, settings: Settings
) -> SearchSpace:
    """The space of a model; checks that all budgets except latency can be met.

    Raises:
        BudgetError: No allocation meets a budget.
    """
    example = task.inputs_of(data.train.example(1))
    space = compile_space(model, example, policy=settings.policy, exclude=options.exclude)
    check_reachable(space, options.budgets)
    return space


def load_model(
    options: ModelOptions,
    data: Data,
    task: Task,
    settings: Settings,
    space: SearchSpace,
    seed: int,
    progress: ProgressDisplay,
) -> nn.Module:
    """The dense model, with the weights named by the options, of its folder, or trained.

    The training excludes the validation data of a search with this seed.
    """
    model = untrained_model(options, data, seed)
    if options.weights == "pretrained" and is_plugin(options.space):
        return model  # with the weights that its function gives it
    if options.weights == "pretrained":
        model.load_state_dict(pretrained_weights(options.space, data.num_classes or 0))
        return model
    if options.weights is not None:
        load_weights(model, options.weights)
        return model
    if is_huggingface(options.space):
        return model
    # An inferred task follows from the data and the model, which identify a training.
    named = "" if options.task is None else f"-{task.identity}"
    sizes = settings.sizes(data)
    splits = split(data, calibration=sizes.calibration, validation=sizes.validation, seed=seed)
    config = default_config(space.dense_cost.macs, len(splits.training))
    if not isinstance(task, Classification):  # whose losses are bounded in practice
        config = replace(config, clip=CLIP)
    config = affordable_training(config, splits.training)
    return trained_model(
        options.space,
        model,
        splits.training,
        fingerprint=f"{data.fingerprint}-{seed}-{len(splits.validation)}{named}",
        seed=seed,
        config=config,
        task=task,
        augmentation=splits.augmentation,
        device=options.device,
        on_step=lambda step, total, loss: progress.stage("train", step, total, f"loss {loss:.3f}"),
    )


def chosen_recipe(options: ModelOptions) -> Recipe | None:
    """The recipe by which chosen networks are trained; None for no training.

    Raises:
        UsageError: There is no such recipe, or two are given.
    """
    if options.recover is None:
        config = training_config(options, options.finetune)
        if config is None:
            return None
        return Plain(
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            distill=config.distill,
            optimizer="sgd",
            clip=CLIP,
        )
    if options.finetune:
        raise UsageError(
            "`--finetune` is the recipe plain, so it cannot be given with `--recover`; give one "
            f"of them, for example --recover plain:epochs={options.finetune}."
        )
    return make_recipe(options.recover)


def training_config(options: ModelOptions, epochs: int) -> TrainingConfig | None:
    """The training configuration of compressed networks; None for no epochs."""
    if epochs == 0:
        return None
    return TrainingConfig(
        epochs,
        learning_rate=options.learning_rate,
        distill=options.distill,
        clip=CLIP,
    )
