"""`Settings`: how candidates are made and measured; and the identity of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import nn

from rankNAS.data.base import Data
from rankNAS.data.sizes import PASS, affordable_samples, tokens_of
from rankNAS.decompositions.norms import NORMS, NormName
from rankNAS.exceptions import UsageError
from rankNAS.io.fingerprints import fingerprint
from rankNAS.models.agreement import Modules, Sketches, fixed_pass, tolerance
from rankNAS.objectives.base import ObjectiveBase
from rankNAS.recovery.config import Refinement, TrainingConfig
from rankNAS.renamed import renamed
from rankNAS.search_spaces.policies import RankPolicy
from rankNAS.strategies.base import Strategy
from rankNAS.tasks.base import Task

__all__ = ["Settings", "Sizes", "check_device", "check_seed", "study_identity"]

LARGEST_SEED = 2**32 - 1  # that all libraries take

NORM: NormName = "fisher"  # of strategies without one of their own
EXAMPLES = 4  # samples on which a study's model is recognised
EXAMPLE_TOKENS = 1024  # of them, if they are texts


class Sizes(NamedTuple):
    """Numbers of samples; see `Settings`."""

    calibration: int
    validation: int
    screening: int
    batch_size: int


#: The largest numbers of samples, and of tokens for language data, if nobody states any.
SAMPLES = Sizes(1024, 1024, 512, 256)
TOKENS = Sizes(32 * 1024, 16 * 1024, 8 * 1024, PASS)


@renamed(metric="norm")
@dataclass(frozen=True)
class Settings:
    """How candidates are made and measured. A study keeps its settings.

    Args:
        norm: The norm of the decompositions: ``fisher``, ``input``, ``pooled``, ``asvd`` or
            ``weight``. None is that of the strategy's paper, if it has one (`Strategy.norm`), else
            ``fisher``.
        calibration: Training samples for statistics and batch norms, at most. None, here and
            below, is a number by the size of a sample; see `sizes`.
        validation: Further training samples that metrics are measured on, at most; those of the
            validation set if the data have one.
        screening: Samples of either kind on which strategies that screen candidates measure them
            before the best few are refitted, at most.
        batch_norm: Correct batch-norm statistics after truncation.
        sequential: Refit the layers of returned networks sequentially to the inputs that the
            compressed layers before them produce. Trials are measured without refitting, unless
            the strategy refits.
        policy: The ranks that are offered.
        choices: The largest number of choices a layer keeps once their errors are known.
        batch_size: Samples per forward pass of an evaluation.
        latency_batch: Samples of the forward pass whose latency counts.
        latency_tokens: Tokens of each of them; 1 for a step of decoding, None for all.
        strict_hardware: Whether latency tables raise an error for layers that they do not have.
        early_stopping: Prune trials early (asynchronous successive halving), after a part of their
            epochs or on a part of the validation samples; see `SuccessiveHalving`.
        recovery: Train the network of every trial, and every returned network, before it is
            measured. The search replaces its seed.
        recovery_samples: The largest number of training samples per epoch.
        refine: Refine every returned network block by block, before any training; trials are
            measured without it.
        memory: Bytes of statistics and factors, as estimated, from which a model of linear layers
            is calibrated and factorised block by block, with factors in files of the cache folder.

    Raises:
        UsageError: An unknown norm, or a number below one.

    Example:
        >>> Settings(norm="input", policy=RankPolicy(multiple_of=8), validation=256).validation
        256
    """

    norm: NormName | None = None
    calibration: int | None = None
    validation: int | None = None
    screening: int | None = None
    batch_norm: bool = True
    sequential: bool = True
    policy: RankPolicy = RankPolicy()
    choices: int = 64
    batch_size: int | None = None
    latency_batch: int = 1
    latency_tokens: int | None = None
    strict_hardware: bool = False
    early_stopping: bool = False
    recovery: TrainingConfig | None = None
    recovery_samples: int = 2048
    refine: Refinement | None = None
    # Not printed: answers do not depend on it, so a study may be resumed with another one.
    memory: int = field(default=2 << 30, repr=False)

    def __post_init__(self) -> None:
        if self.norm is not None and self.norm not in NORMS:
            raise UsageError(f"`norm` must be one of {', '.join(NORMS)}, got {self.norm!r}.")
        counts = (
            "calibration",
            "validation",
            "screening",
            "choices",
            "batch_size",
            "latency_batch",
            "latency_tokens",
        )
        for name in (*counts, "recovery_samples", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{name}` must be at least 1, got {value}.")
        if self.refine is not None and not isinstance(self.refine, Refinement):
            raise UsageError(
                f"`refine` must be a Refinement of rankNAS.recovery or None, got {self.refine!r}."
            )
        if self.early_stopping and self.recovery is not None and self.recovery.epochs < 2:
            raise UsageError(
                "early stopping compares trials after some of their epochs; let them train for "
                "two or more, or leave it out."
            )

    def of(self, strategy: Strategy) -> Settings:
        """The settings with the norm of a strategy, if they name none."""
        return self if self.norm is not None else replace(self, norm=strategy.norm or NORM)

    def sizes(self, data: Data) -> Sizes:
        """The numbers of samples; those that are None by the size of a sample.

        For language data they are numbers of tokens (`TOKENS`), so that 32 windows of 1,024
        tokens are used for calibration and 16 for validation.
        """
        tokens = tokens_of(data.train)
        chosen = [
            given if given is not None else max(1, min(most, most_tokens // tokens))
            for given, most, most_tokens in zip(
                (self.calibration, self.validation, self.screening, self.batch_size),
                SAMPLES,
                TOKENS,
                strict=True,
            )
        ]
        return Sizes(*chosen)

    def sized(self, data: Data) -> Settings:
        """The settings with all numbers of samples stated."""
        return replace(self, **self.sizes(data)._asdict())


def check_seed(seed: object) -> None:
    """Raise a UsageError unless a random seed is a whole number that all libraries take."""
    if not isinstance(seed, Integral) or not 0 <= int(seed) <= LARGEST_SEED:
        raise UsageError(
            f"`seed` must be a whole number from 0 to {LARGEST_SEED}, got {str(seed)[:40]}."
        )


def check_device(device: str | torch.device) -> None:
    """Raise a UsageError unless networks can run on a device here."""
    try:
        torch.empty(1, device=device)
    except Exception as error:  # every backend raises its own kind
        why = str(error).partition("\n")[0].rstrip(".")[:200]
        raise UsageError(
            f"`device` {str(device)!r} cannot be used on this machine ({why}); give cpu, or a "
            "device that PyTorch finds here, such as cuda or cuda:1."
        ) from error
    if torch.device(device).type == "meta":
        raise UsageError("`device` meta holds no values; give cpu, or a GPU such as cuda.")


def study_identity(
    model: nn.Module,
    data: Data,
    task: Task,
    strategy: Strategy,
    objectives: Sequence[ObjectiveBase],
    budgets: Sequence[Mapping[str, float]],
    settings: Settings,
    seed: int,
    layers: int,
) -> dict[str, Any]:
    """Everything that must stay the same when a study is resumed.

    Args:
        model: The dense model.
        data: The data.
        task: Reads batches and outputs.
        strategy: The strategy.
        objectives: What is measured.
        budgets: All budgets. Their bounds may change; the costs that they bound may not, because
            the choices depend on them.
        settings: How candidates are made and measured.
        seed: The random seed.
        layers: The number of layers of the search space.
    """
    return {
        "weights": fingerprint(model.state_dict()),
        "modules": Modules.of(model),
        "outputs": _outputs(model, task, data),
        "data": data.fingerprint,
        "task": task.identity,
        "strategy": strategy,
        "objectives": [f"{o.name}={o.direction}" for o in objectives],
        "costs": sorted({name for budget in budgets for name in budget}),
        "settings": settings,
        "seed": seed,
        "layers": layers,
    }


def _outputs(model: nn.Module, task: Task, data: Data) -> Sketches:
    """Sketches of the model's outputs on the first samples, which other machines find as well.

    Empty, which agrees with everything, if the outputs differ from pass to pass.
    """
    count = affordable_samples(EXAMPLES, data.train, EXAMPLE_TOKENS)
    inputs = task.inputs_of(data.train.example(count))
    outputs = fixed_pass(model, inputs)
    sketches = Sketches.of(outputs, tolerance(model, outputs))
    again = Sketches.of(fixed_pass(model, inputs), sketches.rounding)
    return sketches if again.agree(sketches.to_json()) else Sketches({}, sketches.rounding)
