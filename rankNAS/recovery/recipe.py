"""The contract of a recipe, and recipes by name and options.

A recipe is a frozen dataclass of its options. It says which loss is minimised and what happens
beside it; the loop (`rankNAS.recovery.loop`) does the rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import FunctionType, NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from rankNAS.data.images.augment import NO_FLIP, Augmentation
from rankNAS.data.samples import Samples
from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.lazy import Catalogue
from rankNAS.recovery.config import TrainingConfig, affordable_training
from rankNAS.recovery.loop import Loss
from rankNAS.recovery.parts import Part
from rankNAS.recovery.speed import SPEEDS, Mode
from rankNAS.tasks.base import Task
from rankNAS.tasks.language import LanguageModelling

if TYPE_CHECKING:
    from rankNAS.recovery.team import Team

__all__ = [
    "ALIASES",
    "ENTRIES",
    "RECIPES",
    "Job",
    "Recipe",
    "Setup",
    "make_recipe",
    "option_lines",
]

#: Recipes by name: their location and a line about each.
ENTRIES = {
    "plain": (
        "rankNAS.recovery.plain:Plain",
        "A short supervised training with distillation; what --finetune does.",
    ),
    "distil": (
        "rankNAS.recovery.distil:Distil",
        "Labels and the dense network's predictions; averaged weights, decay of products.",
    ),
    "lora": (
        "rankNAS.recovery.lora:Lora",
        "Small adapters on the factors, merged at the end; for large transformers.",
    ),
    "freeze": (
        "rankNAS.recovery.freeze:Freeze",
        "As distil, with one group of factors frozen in each epoch, in turns.",
    ),
    "swiftlearn": (
        "rankNAS.recovery.swiftlearn:SwiftLearn",
        "As distil, on a shrinking part of the samples, drawn by their importance.",
    ),
    "greedylore": (
        "rankNAS.recovery.greedy_distil:GreedyDistil",
        "As distil, in several local processes that exchange low-rank gradients.",
    ),
    "progressive": (
        "rankNAS.recovery.progressive:Progressive",
        "As distil, at ranks that fall to those of the network, each started from the last.",
    ),
    "msr": (
        "rankNAS.recovery.msr:Msr",
        "Dense weights trained to low spectra (BSR), then truncated, then as distil.",
    ),
    "prehab": (
        "rankNAS.recovery.msr:Prehab",
        "As msr, with the stable rank of whitened weights.",
    ),
    "fast": (
        "rankNAS.recovery.fast:Fast",
        "Labels in a time limit: smoothing, centralised gradients, SAM, a virtual step.",
    ),
}
#: Recipes by name.
RECIPES: Catalogue[type[Recipe]] = Catalogue(ENTRIES)
#: Short names of options.
ALIASES = {"lr": "learning_rate", "batch": "batch_size"}


@dataclass(frozen=True)
class Job:
    """What a recipe trains.

    Args:
        network: The compressed network; it is trained in place.
        data: The training samples.
        task: Reads batches and outputs.
        dense: The dense network; None if it is not known.
        augmentation: The augmentation that the data allow.
        device: Where to train.
        seed: The random seed.
        checkpoint: The file of the training's state; None for none.
    """

    network: nn.Module
    data: Samples
    task: Task
    dense: nn.Module | None = None
    augmentation: Augmentation = NO_FLIP
    device: torch.device = torch.device("cpu")
    seed: int = 0
    checkpoint: Path | None = None

    @property
    def language(self) -> bool:
        """Whether the network is a language model."""
        return isinstance(self.task, LanguageModelling)

    def checkpoint_of(self, number: int) -> Path | None:
        """The checkpoint of one of several trainings, numbered from 0."""
        return None if self.checkpoint is None else self.checkpoint.with_suffix(f".{number}.pt")


@dataclass(frozen=True)
class Setup:
    """A recipe made ready for a job.

    Args:
        loss: The loss.
        parts: What happens beside it.
        variants: As for `Loop`.
        team: As for `Loop`.
    """

    loss: Loss
    parts: Sequence[Part] = ()
    variants: int = 0
    team: Team | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How a compressed network is trained. The common options are those of every recipe.

    Args:
        epochs: Passes over the data.
        batch_size: Samples per step; fewer if they are long sequences of tokens.
        learning_rate: Peak learning rate, after linear warm-up and before cosine decay to 0; None
            is that of the recipe for the optimiser and the network.
        optimizer: ``sgd`` with Nesterov momentum 0.9, or ``adamw``; ``auto`` is adamw for language
            models.
        clip: Largest gradient norm of a step.
        seconds: Seconds of the training; the schedule is fitted to them. None for no limit.
        samples: Training samples, at most, drawn by the seed.
        augment: Whether to augment images, as the data allow.
        refine: Refine the network block by block before (`rankNAS.recovery.refinement`).
        speed: ``auto`` measures at the start whether channels-last, bfloat16 or compiling is
            faster; ``plain`` computes as trainings always did; or a mode such as
            ``channels_last+bf16``.

    Attributes:
        name: As given to ``--recover``.
        trains_weights: Whether the network's own weights are trained; those of 16 bits need
            float32 then.
    """

    name: ClassVar[str]
    trains_weights: ClassVar[bool] = True
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float | None = None
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    clip: float | None = 1.0
    seconds: float | None = None
    samples: int | None = None
    augment: bool = True
    refine: bool = False
    speed: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("samples", 1)):
            value = getattr(self, name)
            self._require(name, value is None or value >= least, f"at least {least}")
        for name in ("learning_rate", "clip", "seconds"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "above 0")
        self._require(
            "optimizer", self.optimizer in ("auto", "sgd", "adamw"), "auto, sgd or adamw"
        )
        if self.speed not in SPEEDS:
            Mode.parse(self.speed)

    def _require(self, name: str, valid: bool, expected: str) -> None:
        """Raise a UsageError unless an option is valid."""
        if not valid:
            raise UsageError(
                f"recipe {self.name!r}: {name} is {getattr(self, name)!r}, but it must be "
                f"{expected}."
            )

    @property
    def needs_dense(self) -> bool:
        """Whether it learns from the dense network even if there are labels."""
        return False

    def check(self, task: Task, dense: bool = True) -> None:
        """Raise a UsageError if the recipe does not fit a task; called before any work.

        Args:
            task: The task.
            dense: Whether the dense network is known.
        """
        if not dense and (self.needs_dense or not task.labelled):
            why = "learns from the dense network" if task.labelled else "has no labels to learn"
            raise UsageError(f"recipe {self.name!r} {why}; give the dense network (`dense`).")

    def config(self, job: Job) -> TrainingConfig:
        """Length, batches, optimiser and schedule of a job."""
        optimizer = self.optimizer
        if optimizer == "auto":
            optimizer = "adamw" if job.language else "sgd"
        rate = self.learning_rate or self.default_rate(optimizer, job)
        config = TrainingConfig(
            self.epochs,
            batch_size=self.batch_size,
            learning_rate=rate,
            weight_decay=self.other_decay,
            optimizer=optimizer,
            augment=self.augment,
            clip=self.clip,
            seed=job.seed,
        )
        return affordable_training(config, job.data)

    def default_rate(self, optimizer: str, job: Job) -> float:
        """The peak learning rate of a job if none is given."""
        return 3e-4 if optimizer == "adamw" else 0.03

    @property
    def trainings(self) -> int:
        """The number of `courses`, which share the epochs and the time."""
        return 1

    @property
    def other_decay(self) -> float:
        """The optimiser's weight decay."""
        return 0.0

    def courses(self, job: Job) -> Generator[Job]:
        """The trainings that are done one after the other; one by default.

        Before each, the network may be changed; if the generator is closed before its end, the
        network gets its form back. Their checkpoints differ.
        """
        yield job

    @abstractmethod
    def prepared(self, job: Job) -> AbstractContextManager[Setup]:
        """Context in which a network is ready to be trained.

        Whatever happens inside, the network is a plain one after it.
        """

    def __str__(self) -> str:
        """The recipe as given to ``--recover``, without options that have their defaults."""
        given = [
            f"{f.name}={_text(value)}"
            for f in fields(self)
            if (value := getattr(self, f.name)) != _default(f)
        ]
        return self.name + (f":{','.join(given)}" if given else "")


def make_recipe(given: str | Recipe) -> Recipe:
    """The recipe of a text ``NAME:key=value,...``; recipes are unchanged.

    Raises:
        UnknownNameError: There is no such recipe or option.
        UsageError: A value has another type, or is out of range.

    >>> str(make_recipe("distil:epochs=5,lr=0.01"))
    'distil:epochs=5,learning_rate=0.01'
    """
    if isinstance(given, Recipe):
        return given
    if not isinstance(given, str):
        raise UsageError(
            f"a recipe must be a text such as 'distil:epochs=20' or a Recipe, got {given!r}."
        )
    name, _, rest = given.partition(":")
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    kind = RECIPES[name]
    hints, options = get_type_hints(kind), {}
    known = {f.name for f in fields(kind)}
    for text in filter(None, map(str.strip, rest.split(","))):
        key, equals, value = text.partition("=")
        key = ALIASES.get(key, key)
        if key not in known:
            raise UnknownNameError(f"option of recipe {name!r}", key, known)
        if not equals:
            raise UsageError(f"recipe {name!r}: give {key}=VALUE, not {text!r} alone.")
        if key in options:
            raise UsageError(f"recipe {name!r}: {key} is given twice.")
        options[key] = _parsed(name, key, value, hints[key])
    return kind(**options)


def option_lines(kind: type[Recipe]) -> Mapping[str, str]:
    """By option, its default as text."""
    return {f.name: _text(_default(f)) for f in fields(kind)}


def _text(value: Any) -> str:
    """A value as in the text of a recipe."""
    if isinstance(value, type | FunctionType):
        return f"{value.__module__}:{value.__qualname__}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _default(known: Field[Any]) -> Any:
    return None if known.default is MISSING else known.default


def _parsed(recipe: str, key: str, text: str, kind: Any) -> Any:
    """The value of an option, of its type: an int, a float, a bool, a text, or none of them."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if NoneType in kinds and text.lower() == "none":
        return None
    if str in kinds or any(get_origin(k) is Literal for k in kinds):
        return text
    (wanted,) = (k for k in kinds if k is not NoneType)
    expected = {int: "a whole number", float: "a number", bool: "true or false"}
    try:
        if wanted is bool:
            return {"true": True, "false": False}[text.lower()]
        return wanted(text)
    except (ValueError, KeyError):
        raise UsageError(
            f"recipe {recipe!r}: {key} is {text!r}, but it must be {expected[wanted]}."
        ) from None
