"""The training loop of all recipes: batches, steps, schedule, limits, checkpoints.

What recipes differ in is a loss, and `Part`s: the decay of products, an average of the weights,
frozen factors, adapters, the samples of an epoch. All randomness derives from the seed and the
epoch, and a checkpoint within an epoch holds the state of the generators, so a resumed training
gives the same weights as an uninterrupted one. With a limit on the time, a short measurement fixes
the number of steps, and a training that the limit ends all the same keeps the best weights so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from rankNAS.data.images.augment import NO_FLIP, Augmentation
from rankNAS.data.samples import Samples
from rankNAS.data.sizes import PASS, affordable_samples
from rankNAS.deadline import Deadline, TimeLimitError, check_time, limited_by, seconds_left
from rankNAS.exceptions import UsageError
from rankNAS.io.checkpoints import read_checkpoint, write_checkpoint
from rankNAS.recovery.batches import EpochBatches, Place, epoch_seed
from rankNAS.recovery.config import TrainingConfig, steps_per_epoch
from rankNAS.recovery.parts import Gradients, Part
from rankNAS.recovery.schedule import Epochs, learning_rate, make_optimizer
from rankNAS.recovery.speed import Mode, fastest, training_mode
from rankNAS.tasks.base import Prediction, Task
from rankNAS.trees import channels_last, size_of

if TYPE_CHECKING:
    from rankNAS.recovery.team import Team

__all__ = ["Loop", "Loss", "Place", "Report", "TooShortError"]

Loss: TypeAlias = Callable[[Any, Prediction, Place | None], Tensor]

SAVED = 60.0  # seconds between checkpoints within an epoch, if they are written quickly
QUICK, RARE = 3.0, 20.0  # seconds of a quick write; a slow one takes at most this part of the time
TIMED = 8  # steps, after the first one, from which the number of all steps is fixed
RESERVE = 0.1  # of the time that is left: for the judging and the end of the training
JUDGED = 256  # samples on which the best weights so far are found; few if they are long
JUDGED_TOKENS = 4 * PASS  # of these samples, if they are sequences
JUDGING = 0.05  # of the time, at most, for finding them
ENDING = 2.0  # times the seconds of that: the end of the training


class TooShortError(UsageError):
    """The time limit has ended before the first step of a training."""

    def __init__(self) -> None:
        super().__init__(
            "the time limit is shorter than one step of the training, so nothing is trained; "
            "give more time."
        )


@dataclass(frozen=True)
class Report:
    """What a training has done.

    Args:
        steps: Steps of the optimiser, those of earlier sessions included.
        planned: The steps of the schedule.
        seconds: Seconds of the training, those of earlier sessions included.
        stopped: Whether a time limit has ended it before the last step.
        mode: How it has computed; see `Mode`.
    """

    steps: int
    planned: int
    seconds: float
    stopped: bool = False
    mode: str = ""


@dataclass
class Loop:
    """A training in progress.

    Args:
        network: The network, which is trained in place.
        samples: The training samples.
        task: Reads batches and outputs.
        config: Length, batches, optimiser and schedule.
        loss: The loss of a batch and the network's prediction for it.
        parts: What happens beside the loss.
        augmentation: The augmentation that the data allow.
        device: Where to train.
        variants: The batches and their augmentations are the same in every so many epochs, in
            another order; 0 for new ones in each.
        team: The processes that share each batch; None if this one trains alone.
        speed: ``auto`` measures which mode is the fastest; see `rankNAS.recovery.speed`.
        seconds: Seconds of the training, those of earlier sessions included; None for no limit.
        keeps_best: Whether a time limit ends the training with the best weights so far. Otherwise
            it raises a TimeLimitError.
        checkpoint: Written at the end of each epoch and every minute, more rarely where that takes
            long; the training resumes from it if it exists.
        identity: What else a checkpoint depends on.
        on_step: Called after each step with its number from 1, the number of steps and the loss.
        on_epoch: Called after each epoch with its number from 1; it may evaluate the network.
    """

    network: nn.Module
    samples: Samples
    task: Task
    config: TrainingConfig
    loss: Loss
    parts: Sequence[Part] = ()
    augmentation: Augmentation = NO_FLIP
    device: torch.device = torch.device("cpu")
    variants: int = 0
    team: Team | None = None
    speed: str = "plain"
    seconds: float | None = None
    keeps_best: bool = False
    checkpoint: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    on_step: Callable[[int, int, float], None] | None = None
    on_epoch: Callable[[int], object] | None = None

    def __post_init__(self) -> None:
        size = len(self.samples)
        counts = next((found for part in self.parts if (found := part.counts(size))), [size])
        batch_size = self.config.batch_size
        # A batch norm over 1 x 1 pixels cannot be trained on a last batch of one image.
        least = 2 if self.team is None else self.team.least(batch_size)
        self.epochs = Epochs([steps_per_epoch(n, batch_size, least) for n in counts])
        self._batches = EpochBatches(
            self.samples,
            batch_size,
            self.config.seed,
            self.device,
            self.augmentation if self.config.augment and self.task.invariant else None,
            self.variants,
            least,
        )
        every = self.epochs.total(self.config.epochs)
        self.total = int(min(every, self.config.max_steps or math.inf))
        self.step, self.spent = 0, 0.0
        self.mode: Mode | None = None
        self.network.to(self.device)
        exempt = {id(p) for part in self.parts for p in part.exempt()}
        self.optimizer = make_optimizer(self.network, self.config, exempt)
        self._epoch, self._position = 0, 0  # of the next batch
        self._present = self.samples  # those of the epoch
        self._generators: dict[str, Tensor] | None = None  # of a checkpoint within an epoch
        self._best: tuple[float, dict[str, Tensor]] | None = None
        self._timed = False  # whether the number of steps has been fixed
        self._timing: tuple[int, float] | None = None  # a step of this session, and when it ended
        self._began = self._saved = 0.0
        self._cost = 0.0  # seconds of writing the last checkpoint
        self._judged, self._judging = -math.inf, 0.0  # when weights were judged; its seconds
        self._each = 0.0  # seconds of the last step

    # ------------------------------------------------------------------------------ the course

    def run(self) -> Report:
        """Train until the last step or the end of the time.

        Raises:
            UsageError: The loss is not finite, or the time is shorter than one step.
            TimeLimitError: The active deadline has passed, and the best weights are not kept.
            WeightsError: The checkpoint is damaged or of another training; nothing has changed.
            WriteError: The checkpoint cannot be written; the last one is intact.
        """
        self._began = self._saved = time.monotonic()
        content = self._content()
        limits = self._limits((content or {}).get("seconds", 0.0))
        stopped = False
        if self.mode is None:
            self.mode = fastest(self, self.speed, min(self.seconds or math.inf, seconds_left()))
        with training_mode(self.network, self.device, self.mode):
            if content is not None:
                self._load(content)
            elif self.keeps_best and limits is not None:
                self._judge()
            try:
                with nullcontext() if limits is None else limits:
                    self._epochs(limited=limits is not None)
            except TimeLimitError:
                if not self.keeps_best:
                    raise
                stopped = self.step < self.total
            with limited_by(None):
                self._finish(stopped)
        return Report(self.step, self.total, self._seconds(), stopped, str(self.mode))

    def follow(self) -> None:
        """Train beside the process that leads the team, until it says to stop.

        Raises:
            DismissedError: The leader has said so.
            UsageError: The loss is not finite.
        """
        assert self.team is not None
        content = self._content()
        self.checkpoint = None  # the leader writes it
        if self.mode is None:
            self.mode = fastest(self, self.speed)
        with training_mode(self.network, self.device, self.mode):
            if content is not None:
                self._load(content)
            self._epochs(limited=False)
            self.team.wait()

    def _content(self) -> dict[str, Any] | None:
        """The checkpoint and its mode, if there is one."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return None
        content = read_checkpoint(self.checkpoint, self._identity())
        self.mode = Mode.parse(content.get("mode", "channels_last"))
        return content

    def _limits(self, spent: float) -> AbstractContextManager[None] | None:
        """Context with the limit on the time; None if there is none.

        Args:
            spent: Seconds of earlier sessions.
        """
        left = math.inf if self.seconds is None else max(self.seconds - spent, 1e-3)
        if left < seconds_left():
            return limited_by(Deadline(left))
        return nullcontext() if math.isfinite(seconds_left()) else None

    def _epochs(self, *, limited: bool) -> None:
        while self.step < self.total:
            if not self._position:
                self._epoch = self.epochs.of(self.step)
            self._begin_epoch()
            self._one_epoch(limited)
            self._position, self._generators = 0, None
            if self.checkpoint is not None and self._is_due():
                self._save()
            if limited and self.keeps_best and self.step < self.total:
                if self._judging <= JUDGING * (time.monotonic() - self._judged):
                    self._judge()
            if self.on_epoch is not None:
                self.on_epoch(self.epochs.of(self.step - 1) + 1)
                self.network.train()

    def _begin_epoch(self) -> None:
        self._present = self.samples
        for part in self.parts:
            part.begin_epoch(self._epoch)
            if (positions := part.chosen()) is not None:
                self._present = self.samples.take(positions)

    def _one_epoch(self, limited: bool) -> None:
        """Train for one pass over the data, or until the last step."""
        seed = epoch_seed(self.config.seed, self._epoch)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for dropout
        try:
            self._steps(generator, limited)
        except TimeLimitError:
            if self.checkpoint is not None and self.step:
                self._save(generator)  # more time may be given later
            raise
        if not self._position:
            raise UsageError(
                f"no batch of epoch {self._epoch + 1} has two samples, because their shapes "
                "differ; give data with a `collate_fn` that pads."
            )

    def _steps(self, generator: torch.Generator, limited: bool) -> None:
        batches = self._batches.of(self._epoch, self._present, generator)
        for number, (place, batch) in enumerate(batches):
            if self.step == self.total:
                return
            if number < self._position:
                continue
            if self._generators is not None:
                self._restore_generators(generator)
            check_time()
            needed = self._each + ENDING * self._judging
            if limited and self.keeps_best and self.step and seconds_left() < needed:
                raise TimeLimitError("the end of the training needs the time that is left")
            began = time.monotonic()
            self._update(batch(), place)
            self._each = time.monotonic() - began
            self._position = number + 1
            if limited and not self._timed:
                self._fix_length()
            passed = time.monotonic() - self._saved
            if self.checkpoint is not None and passed > SAVED * max(1.0, self._cost / QUICK):
                self._save(generator)

    def _update(self, batch: Any, place: Place | None) -> None:
        if self.team is not None:
            self.total = self.team.begin_step(self.step, self.total)
        rate = learning_rate(self.step, self.total, self.config.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        compute: Gradients = self._backward
        for part in self.parts:
            compute = part.gradients(compute, rate)
        value = compute(batch, place)
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        for part in self.parts:
            part.before_step(rate)
        self.optimizer.step()
        for part in self.parts:
            part.after_step(self.step)
        self.step += 1
        if self.on_step is not None:
            self.on_step(self.step, self.total, value)

    def _backward(self, batch: Any, place: Place | None) -> float:
        """Set the gradients of a batch; its loss."""
        assert self.mode is not None
        weight = 1.0
        if self.team is not None:
            batch, weight = self.team.own(batch)
        loss = weight * self.loss_of(self.network, batch, place, self.mode)
        value = loss.item()
        if self.team is None and not math.isfinite(value):
            raise self._diverged(value)
        self.optimizer.zero_grad()
        loss.backward()
        if self.team is not None:  # all processes learn of a loss that is not finite
            value = self.team.exchange(value)
            if not math.isfinite(value):
                raise self._diverged(value)
        return value

    def loss_of(self, network: nn.Module, batch: Any, place: Place | None, mode: Mode) -> Tensor:
        """The loss of a batch in a mode, with gradients."""
        if self.device.type == "cpu" and mode.channels_last:
            batch = channels_last(batch)
        cast = nullcontext()
        if mode.bf16:
            cast = torch.autocast(self.device.type, torch.bfloat16)  # type: ignore[assignment]
        with cast:
            # In training mode, a model may change inputs that it leaves alone in evaluation mode.
            output = self.task.inputs_of(batch).copied().run(mode.runner(network))
            return self.loss(batch, self.task.predict(output, batch), place)

    def _diverged(self, value: float) -> UsageError:
        kept, rate = "", self.optimizer.param_groups[0]["lr"]
        if self.checkpoint is not None and self.checkpoint.is_file():
            kept = f"; the last good checkpoint is kept in {str(self.checkpoint)!r}"
        return UsageError(
            f"the loss is {value} at step {self.step + 1} of {self.total} with learning rate "
            f"{rate:.3g}, in epoch {self._epoch + 1}{kept}; lower the learning rate."
        )

    # ------------------------------------------------------------------------- limits, the best

    def _fix_length(self) -> None:
        """Once a few steps have been timed, let the schedule end within the time."""
        if self._timing is None:
            self._timing = self.step, time.monotonic()
        first, began = self._timing
        if self.step == first + TIMED:
            passes = sum(self._passes(self.epochs.of(i)) for i in range(first, self.step))
            each = max((time.monotonic() - began) / passes, 1e-9)
            seconds = (1 - RESERVE) * seconds_left()
            self.total, self._timed = self._affordable(seconds, each), True

    def _affordable(self, seconds: float, each: float) -> int:
        """The number of all steps, those done included, if a plain step takes ``each`` seconds."""
        step = self.step
        while step < self.total:
            epoch = self.epochs.of(step)
            cost, more = each * self._passes(epoch), self.epochs.total(epoch + 1) - step
            if seconds < more * cost:
                return min(self.total, step + int(seconds / cost))
            step, seconds = step + more, seconds - more * cost
        return self.total

    def _passes(self, epoch: int) -> float:
        return math.prod([part.passes(epoch) for part in self.parts])

    @torch.no_grad()
    def _judge(self) -> None:
        """Remember the present weights if they are the best so far."""
        began = time.monotonic()
        with limited_by(None), ExitStack() as stack:
            for part in self.parts if self.step else ():
                stack.enter_context(part.evaluated())
            found = self.judged()
            if self._best is None or found < self._best[0]:
                state = {n: x.detach().clone() for n, x in self.network.state_dict().items()}
                self._best = found, state
        self.network.train()
        self._judged = time.monotonic()
        self._judging = self._judged - began

    @torch.no_grad()
    def judged(self) -> float:
        """The loss of the network in evaluation mode on a few samples without augmentation."""
        count = affordable_samples(JUDGED, self.samples, JUDGED_TOKENS)
        few = self.samples.subsample(count, self.config.seed)
        self.network.eval()
        total, count = 0.0, 0
        for batch in few.batches(self.config.batch_size, device=self.device):
            value = float(self.loss(batch, self.task.run(self.network, batch), None))
            total, count = total + value * size_of(batch), count + size_of(batch)
        found = total / max(count, 1)
        return found if math.isfinite(found) else math.inf

    def _finish(self, stopped: bool) -> None:
        if stopped and not self.step:
            raise TooShortError
        for part in self.parts:
            part.average()
        if stopped and self._best is not None:
            best, state = self._best
            if not self.judged() <= best:
                self.network.load_state_dict(state)
        for part in self.parts:
            part.finish()

    # ------------------------------------------------------------------------------ checkpoints

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self._began

    def _is_due(self) -> bool:
        """Whether to write a checkpoint at the end of an epoch: not all, if that takes long."""
        passed = time.monotonic() - self._saved
        return self._cost < QUICK or passed > RARE * self._cost or self.step == self.total

    def _save(self, generator: torch.Generator | None = None) -> None:
        """Write the state that `_load` needs, unless a weight is not finite."""
        assert self.checkpoint is not None and self.mode is not None
        if not all(bool(p.isfinite().all()) for p in self.network.parameters()):
            return
        content: dict[str, Any] = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "parts": [part.state_dict() for part in self.parts],
            "step": self.step,
            "total": self.total,
            "timed": self._timed,
            "seconds": self._seconds(),
            "mode": str(self.mode),
            "best": self._best,
            "identity": self._identity(),
        }
        if generator is not None:
            content |= {"epoch": self._epoch, "position": self._position}
            content["generators"] = _generators(generator, self.device)
        began = time.monotonic()
        write_checkpoint(self.checkpoint, content)
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def _load(self, content: Mapping[str, Any]) -> None:
        """Resume from a checkpoint of `_save`."""
        self.network.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        for part, state in zip(self.parts, content.get("parts", ()), strict=True):
            part.load_state_dict(state)
        self.step = content["step"]
        self.total = content.get("total", self.total)
        self._timed = content.get("timed", False)
        self.spent = content.get("seconds", 0.0)
        self._best = content.get("best")
        self._epoch, self._position = content.get("epoch", 0), content.get("position", 0)
        self._generators = content.get("generators")

    def _restore_generators(self, generator: torch.Generator) -> None:
        assert self._generators is not None
        generator.set_state(self._generators["augmentation"])
        torch.set_rng_state(self._generators["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._generators["cuda"], self.device)
        self._generators = None

    def _identity(self) -> dict[str, Any]:
        shapes = {name: list(tensor.shape) for name, tensor in self.network.state_dict().items()}
        return {
            **self.config.to_json(),
            "flip": self.augmentation.flip,
            "images": len(self.samples),
            "shapes": shapes,
            **self.identity,
        }


def _generators(generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    found = {"augmentation": generator.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found
