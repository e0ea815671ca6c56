"""The training of a super-net: logits and weights in turns, continued from a checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.compression.batch_norm import reestimate_batch_norm
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.compression.reconstruction import refit_sequentially
from rankNAS.copies import copied
from rankNAS.data.samples import Samples
from rankNAS.evaluation.context import SearchContext
from rankNAS.exceptions import ObjectiveError, WeightsError
from rankNAS.io.checkpoints import read_checkpoint, write_checkpoint
from rankNAS.io.tensors import write_tensors
from rankNAS.strategies.problem import Problem
from rankNAS.strategies.supernet.candidates import picked
from rankNAS.strategies.supernet.losses import (
    Maps,
    Penalty,
    expected_costs,
    feature_distance,
    gumbel_softmax,
    penalised,
)
from rankNAS.strategies.supernet.network import FactoredWeight, SuperNet
from rankNAS.tasks.feeding import input_batches
from rankNAS.trees import channels_last, size_of

__all__ = ["Schedule", "Training"]

logger = logging.getLogger(__name__)
VERSION = 4  # part of the key of checkpoints: raise it when the training changes
TEMPERATURES = 5.0, 0.1  # [ComCAT]
DECAY = 5e-4  # weight decay of the logits [ComCAT]
MOMENTUM = 0.9
NORMALISED = 128  # samples per pass of the re-estimation of batch norms
SMALLEST = 0.01  # the coefficient of the regulariser falls no further [ComCAT]


class Schedule(Protocol):
    """The configuration of a training; see `Haloc`, whose fields these are."""

    @property
    def epochs(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def penalty(self) -> Penalty: ...
    @property
    def strength(self) -> float: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_rate(self) -> float: ...
    @property
    def features(self) -> float: ...


class Training:
    """The training of a super-net in progress: what changes from epoch to epoch.

    Args:
        configuration: Its printed form is part of the key of checkpoints.
        context: The model and the data.
        problem: Its choices are the candidates.
    """

    def __init__(self, configuration: Schedule, context: SearchContext, problem: Problem) -> None:
        self.configuration, self.context, self.problem = configuration, context, problem
        self.task = context.task
        space = context.factorisation.space.restrict(problem.choices)
        self.net = SuperNet(context.factorisation.model, space)
        self.names = list(problem.choices)
        device = context.device
        self.logits = [
            torch.full((len(c),), 1 / len(c), device=device, requires_grad=True)
            for c in problem.choices.values()
        ]
        self.optimizer = torch.optim.AdamW(
            self.logits, lr=configuration.learning_rate, weight_decay=DECAY
        )
        target = np.array([[problem.dense[n] * f] for n, f in problem.budget.items()])
        rest = np.array([[problem.remainder_cost[n]] for n in problem.budget])
        tables = [np.stack(costs) / target for costs in zip(*problem.budgeted(), strict=True)]
        self.tables = [torch.as_tensor(t, dtype=torch.float32, device=device) for t in tables]
        self.rest = torch.as_tensor((rest / target)[:, 0], dtype=torch.float32, device=device)
        self.held_out, self.training = _halves(context.splits.training, context.seed)
        self.epoch = 0
        costs = [[costs.tolist() for costs in table] for table in problem.budgeted()]
        self.key = f"{VERSION} {configuration!r} {problem.budget_key} {problem.labels()} {costs}"
        self.path = context.checkpoint(self.key)

    def run(self) -> list[Tensor]:
        """Train until the last epoch, from the checkpoint if there is one, and give the logits."""
        if self.path.is_file():
            self._load()
        while self.epoch < self.configuration.epochs:
            seed = (self.context.seed * 1_000_003 + self.epoch) % 2**31
            generator = torch.Generator().manual_seed(seed)
            factors = self.net.decompose()
            self._search_logits(factors, generator)
            self._train_weights(factors, generator)
            self.epoch += 1
            self._save()
        return self.logits

    def keep(self, allocation: Allocation) -> Path:
        """Write the trained network at an allocation's ranks; the file of its state.

        Args:
            allocation: Choices of the problem.

        Raises:
            WriteError: The file cannot be written.
        """
        path = self.context.checkpoint(f"{self.key} weights {allocation.to_json()}")
        path = path.with_suffix(".safetensors")
        if not path.is_file():
            write_tensors(path, self._compressed(allocation).state_dict())
        return path

    def _compressed(self, allocation: Allocation) -> nn.Module:
        """The trained network at an allocation's ranks.

        Its weights are decomposed and refitted as those of the dense network are for other
        strategies; those of a streamed model are truncated.
        """
        model = copied(self.context.factorisation.model)
        model.load_state_dict(self.net.network.state_dict())
        space = self.net.space.restrict({name: [c] for name, c in allocation.items()})
        calibration = self.context.splits.calibration
        if len(calibration) < 2:
            return factorise(model, space).materialise(allocation)
        inputs = input_batches(
            calibration, NORMALISED, task=self.task, device=self.context.device, even=True
        )
        reestimate_batch_norm(model, inputs)
        if self.context.factorisation.streamed:
            network = factorise(model, space).materialise(allocation)
        else:
            statistics = calibrate(model, space, calibration, self.task, seed=self.context.seed)
            factors = factorise(model, space, statistics, norm="fisher")
            network = refit_sequentially(factors, allocation, inputs).materialise(allocation)
        reestimate_batch_norm(network, inputs)
        return network

    def _search_logits(self, factors: Factorisation, generator: torch.Generator) -> None:
        """Improve the logits on held-out data; weights stay as they are."""
        first, last = TEMPERATURES
        temperature = first * (last / first) ** (self.epoch / self.configuration.epochs)
        truncations = self.net.truncations(factors)
        for step, batch in enumerate(self._batches(self.held_out, generator)):
            p = [gumbel_softmax(logits, temperature, generator) for logits in self.logits]
            weights = {
                name: torch.tensordot(q.to(truncations[name].dtype), truncations[name], 1)
                for name, q in zip(self.names, p, strict=True)
            }
            output, maps = self.net.forward(self.task.inputs_of(batch), weights)
            # A relaxed sample is one of these as the temperature falls to 0 (Gumbel-max).
            selection = [logits.softmax(-1) for logits in self.logits]
            ratios = expected_costs(selection, self.tables, self.rest)
            c = self.configuration
            loss = penalised(self._loss(output, batch), ratios, c.penalty, c.strength)
            self._update(self.optimizer, loss, maps, step)
            self._check("a logit", dict(zip(self.names, self.logits, strict=True)))

    def _train_weights(self, factors: Factorisation, generator: torch.Generator) -> None:
        """Train the network at the likely ranks and multiply its factors back."""
        likely = picked(self.problem, self.logits, within=False)
        chosen = {
            name: FactoredWeight.of(found, found.layer.choices[i])
            for i, (name, found) in zip(likely, factors.layers.items(), strict=True)
        }
        others = [p.requires_grad_() for p in self.net.others()]
        trained = [w for factored in chosen.values() for w in factored.weights]
        c = self.configuration
        optimizer = torch.optim.SGD([*trained, *others], lr=c.weight_rate, momentum=MOMENTUM)
        falling = c.features * math.cos(math.pi / 2 * self.epoch / c.epochs)
        mu = max(min(SMALLEST, c.features), falling)
        for step, batch in enumerate(self._batches(self.training, generator), c.steps):
            if self.task.invariant:
                batch = self.context.splits.augmentation.of_batch(batch, generator)
            inputs = self.task.inputs_of(batch)
            targets = self.net.original(inputs)
            output, maps = self.net.forward(inputs, {n: w.product() for n, w in chosen.items()})
            loss = self._loss(output, batch) + mu * feature_distance(maps, targets)
            self._update(optimizer, loss, maps, step)
        for parameter in others:
            parameter.requires_grad_(False)
        with torch.no_grad():
            weights = {name: factored.product() for name, factored in chosen.items()}
        self._check("a weight", weights)
        self._check("a parameter", dict(self.net.network.named_parameters()))
        self.net.absorb(weights)

    def _update(
        self, optimizer: torch.optim.Optimizer, loss: Tensor, maps: Maps, step: int
    ) -> None:
        if not math.isfinite(loss.item()):
            flat = {name: torch.cat([f.flatten() for f in calls]) for name, calls in maps.items()}
            self._fail("the loss", flat)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps = 2 * self.configuration.steps
        self.context.report(
            "haloc", self.epoch * steps + step + 1, self.configuration.epochs * steps
        )

    def _check(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        if not all(t.isfinite().all() for t in tensors.values()):
            self._fail(what, tensors)

    def _fail(self, what: str, tensors: Mapping[str, Tensor]) -> NoReturn:
        """Name the first layer that is not finite; if all are, that of the largest value."""
        sizes = {name: float(t.detach().abs().max()) for name, t in tensors.items()}
        bad = [name for name, size in sizes.items() if not math.isfinite(size)]
        layer = bad[0] if bad else max(sizes, key=sizes.__getitem__)
        kept = f"the state after epoch {self.epoch} is kept in {self.path}"
        raise ObjectiveError(
            f"strategy 'haloc': {what} is not finite in epoch {self.epoch + 1} of "
            f"{self.configuration.epochs}, in layer {layer!r}; "
            f"{kept if self.epoch else 'there is no checkpoint yet'}. "
            "Lower `learning_rate` or `weight_rate`."
        )

    def _loss(self, output: Any, batch: Any) -> Tensor:
        """The task's loss; without labels, the divergence from the dense network."""
        prediction = self.task.predict(output, batch)
        if self.task.labelled:
            return prediction.loss()
        with torch.no_grad():
            reference = self.task.run(self.context.factorisation.model, batch)
        return prediction.distillation(reference)

    def _batches(self, part: Samples, generator: torch.Generator) -> Iterator[Any]:
        """The batches of one epoch; where the data is short, of several passes over it."""
        return islice(self._endless(part, generator), self.configuration.steps)

    def _endless(self, part: Samples, generator: torch.Generator) -> Iterator[Any]:
        while True:
            seed = int(torch.randint(2**31, (1,), generator=generator))
            size, device = self.configuration.batch_size, self.context.device
            for batch in part.batches(size, device=device, shuffle_seed=seed):
                if size_of(batch) > 1:  # a batch norm cannot train on one sample
                    yield channels_last(batch)

    def _save(self) -> None:
        """Write all that `_load` needs, as tensors and plain values."""
        content = {
            "epoch": self.epoch,
            "logits": [x.detach() for x in self.logits],
            "optimizer": self.optimizer.state_dict(),
            "network": self.net.network.state_dict(),
            "identity": self.key,
        }
        write_checkpoint(self.path, content)

    def _load(self) -> None:
        try:
            content = read_checkpoint(self.path, self.key, self.context.device)
        except WeightsError as error:
            logger.warning("strategy 'haloc' starts anew, because of a bad checkpoint: %s", error)
            return
        with torch.no_grad():
            for logits, saved in zip(self.logits, content["logits"], strict=True):
                logits.copy_(saved)
        self.optimizer.load_state_dict(content["optimizer"])
        self.net.network.load_state_dict(content["network"])
        self.epoch = content["epoch"]


def _halves(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Two disjoint random halves: for the logits, and for the weights."""
    size = len(samples)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    halves = order[: size // 2], order[size // 2 :]
    return samples.take(halves[0].sort().values), samples.take(halves[1].sort().values)
