"""HALOC: ranks by differentiable architecture search on a super-net.

Every layer has a few candidates of equal Tucker-2 ranks in coarse steps, all truncations of one
weight, and one logit per candidate. Each epoch first improves the logits on training data that the
weights do not see, by the cross-entropy under a penalty on the expected cost, and then trains the
network at the likely ranks, its feature maps held close to the dense network's. The answer
is the most probable allocation within the budgets; what is evaluated is the original weights,
decomposed anew.

Notation: p_lj the probability of candidate j of layer l, T the budget.

Provenance. This is a reconstruction. Xiao et al., AAAI 2023 (arXiv:2301.09422), published no code;
from its abstract and from summaries by others come: Tucker-2, selection as differentiable
architecture search, weights and probabilities learned in turn, the expected hardware cost in the
objective, ranks in coarse multiples, equal ranks, and the feature-map regulariser. The code of the
same first author's ComCAT (Xiao et al., ICML 2023) gives the rest, and may differ from HALOC's own
settings: equal logits at the start, Gumbel-softmax with its temperature falling from 5 to 0.1,
AdamW on the logits, the loss CE (cost / T)^1.5 above the budget, fixed ranks before each epoch of
weights, and the coefficient of the regulariser. Own choices: dense and the cheapest choice as
candidates, the cost expected under softmax(logits) where ComCAT weighs it by the relaxed sample,
the relative error in the regulariser, few steps an epoch, the expected ranks where the argmax,
which ComCAT takes, leaves a tenth of the budget (`picked`), exact decoding of the answer, and SVD
where Tucker-2 does not apply (at equal ranks the Tucker-2 of a matrix is its truncated SVD, so
the method is not tied to images). The super-net truncates in the norm of the weights; the answer
is decomposed in the metric of the study.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NoReturn, final, get_args

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from rankNAS.allocation import Allocation, Choice
from rankNAS.compression.factorisation import Factorisation
from rankNAS.data.batches import batches, channels_last, len_of, subset
from rankNAS.decompositions import LayerShape
from rankNAS.evaluation.context import SearchContext, silent
from rankNAS.exceptions import ObjectiveError, UsageError, WeightsError
from rankNAS.io.checkpoints import read_checkpoint, write_checkpoint
from rankNAS.solver.pareto import pareto_filter
from rankNAS.solver.programmes import min_sum
from rankNAS.strategies.base import Array, History, Problem, Request, Strategy
from rankNAS.strategies.supernet import (
    FactoredWeight,
    Maps,
    Penalty,
    SuperNet,
    expected_costs,
    feature_distance,
    gumbel_softmax,
    penalised,
)

__all__ = ["Haloc", "coarse", "picked"]

logger = logging.getLogger(__name__)
VERSION = 3  # part of the key of checkpoints: raise it when the training changes
STEPS = 8  # candidates of a layer, if nothing else is asked for, up to its full rank
TEMPERATURES = 5.0, 0.1  # [ComCAT]
DECAY = 5e-4  # weight decay of the logits [ComCAT]
MOMENTUM = 0.9
SPENT = 0.9  # of a budget, by the argmax, for that to be the answer
DECIDED = 5.0  # difference of logits that the expected costs do not undo
SMALLEST = 0.01  # the coefficient of the regulariser falls no further [ComCAT]


@final
@dataclass(frozen=True)
class Haloc(Strategy):
    """Differentiable search of equal Tucker-2 ranks on a super-net; a reconstruction.

    It needs a model and training data (see `bind`), classes and a budget, and proposes one
    allocation per problem. The training is continued where it was interrupted.

    Args:
        epochs: Rounds of logits and weights.
        steps: Batches of each in a round.
        batch_size: Samples a batch.
        granularity: Ranks are multiples of this, as far as the space offers them; None takes an
            eighth of each layer's smaller side.
        penalty: ``power`` or ``log``, see `penalised`.
        strength: The exponent of ``power``, or the factor of ``log`` (16 in ARS).
        learning_rate: Of the logits (AdamW).
        weight_rate: Of the weights (SGD, momentum 0.9).
        features: Coefficient of the feature-map regulariser in the first epoch.
        operators: In order of preference: a layer takes its candidates from the first that it
            offers. None is the default, followed by all others.

    Raises:
        UsageError: A number out of range, or an unknown penalty.
    """

    epochs: int = 8
    steps: int = 24
    batch_size: int = 64
    granularity: int | None = None
    penalty: Penalty = "power"
    strength: float = 1.5
    learning_rate: float = 1e-2
    weight_rate: float = 5e-3
    features: float = 0.5
    operators: tuple[str, ...] | None = ("tucker2", "svd")
    name = "haloc"

    def __post_init__(self) -> None:
        for number in ("epochs", "steps", "granularity"):
            value = getattr(self, number)
            if value is not None and value < 1:
                raise UsageError(f"`{number}` must be at least 1, got {value}.")
        if self.batch_size < 2:
            raise UsageError(f"`batch_size` must be at least 2, got {self.batch_size}.")
        for number in ("strength", "learning_rate", "weight_rate"):
            if not 0 < (value := getattr(self, number)) < math.inf:
                raise UsageError(f"`{number}` must be positive, got {value}.")
        if not 0 <= self.features < math.inf:
            raise UsageError(f"`features` must not be negative, got {self.features}.")
        if self.penalty not in get_args(Penalty):
            raise UsageError(f"`penalty` must be power or log, got {self.penalty!r}.")

    def check(self, request: Request) -> None:
        """Raise a UsageError without a budget, without classes, or with too little data."""
        _check_budget(request.budget)
        if not request.classes:
            raise UsageError(
                "strategy 'haloc' trains with the cross-entropy, but the targets are no classes; "
                "choose another strategy, for example 'energy'."
            )
        self._check_size(request.training)

    def _check_size(self, training: int) -> None:
        if training < 2 * self.batch_size:
            raise UsageError(
                f"strategy 'haloc' needs two batches of training data, {2 * self.batch_size} "
                f"samples, but there are {training}; lower `batch_size` or give more data."
            )

    def bind(self, context: SearchContext) -> Strategy:
        """The strategy with the model and the data that it trains on."""
        self._check_size(len_of(context.splits.training))
        return _Bound(self, context, self.operators)

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        raise UsageError(
            "strategy 'haloc' has no model and no training data yet; call `bind(context)` "
            "first, as `rankNAS.search` does, and propose with what it returns."
        )


def _check_budget(budget: Mapping[str, float]) -> None:
    if not budget:
        raise UsageError(
            "strategy 'haloc' trades accuracy for a cost, so it needs a budget; give one, for "
            "example macs=0.5."
        )


@final
@dataclass(frozen=True)
class _Bound(Strategy):
    """`Haloc` on a workbench; equal to another of the same configuration."""

    configuration: Haloc
    context: SearchContext = field(compare=False, repr=False)
    operators: tuple[str, ...] | None
    name = "haloc"

    def __getstate__(self) -> dict[str, Any]:
        # A progress bar and an evaluator, with its traced network, do not pickle; neither matters.
        context = replace(self.context, report=silent, evaluator=None)  # type: ignore[arg-type]
        return self.__dict__ | {"context": context}

    def propose(
        self, problem: Problem, history: History, n: int, rng: np.random.Generator
    ) -> list[Allocation]:
        """The answer, once; it is trained for if no checkpoint has it.

        Raises:
            ObjectiveError: The training diverged.
            BudgetError: No allocation of the candidates meets the budgets.
            UsageError: There is no budget.
            WriteError: The checkpoint cannot be written; the one of the last epoch is intact.
        """
        _check_budget(problem.budget)
        if n < 1 or history.candidates(problem):
            return []
        layers = self.context.factorisation.space.layers
        shapes = {name: layers[name].shape for name in problem.choices}
        searched = coarse(problem, shapes, self.operators, self.configuration.granularity)
        logits = _Search(self.configuration, self.context, searched).run()
        allocation = searched.allocation(picked(searched, logits))
        return [] if allocation in history.proposed else [allocation]


def coarse(
    problem: Problem,
    shapes: Mapping[str, LayerShape],
    operators: Sequence[str] | None,
    granularity: int | None = None,
) -> Problem:
    """The problem with the candidates of the super-net as its only choices.

    For each multiple r of the granularity, the offered choice nearest to (r, r); further the
    cheapest choice, so that a budget which can be met stays so. Candidates that another beats in
    error and in every budgeted cost are dropped: where a larger rank costs no more time, the
    smaller one leaves.

    Args:
        problem: Tables, and at least one budget.
        shapes: Of every layer.
        operators: In order of preference; None is ``tucker2``, ``svd``, then all others.
        granularity: In ranks; None takes an eighth of each layer's smaller side.
    """
    kept = []
    for i, (name, choices) in enumerate(problem.choices.items()):
        costs = [table[i] for table in problem.budgeted()]
        allowed = [
            j for j, c in enumerate(choices) if operators is None or c.operator in operators
        ]
        cheapest = {min(allowed, key=cost.__getitem__, default=0) for cost in costs}
        nearest = _equal_ranks(choices, shapes[name], operators, granularity)
        rows = sorted({0} | cheapest | nearest)
        found = pareto_filter(problem.errors[i][rows], [cost[rows] for cost in costs], len(rows))
        kept.append(sorted({0, *(rows[j] for j in found)}))
    return problem.restricted(kept)


def _equal_ranks(
    choices: Sequence[Choice],
    shape: LayerShape,
    operators: Sequence[str] | None,
    granularity: int | None,
) -> set[int]:
    """Positions of the choices nearest to (r, r) for the multiples r, of one operator."""
    offered = {c.operator for c in choices if c.rank}
    order = operators or ("tucker2", "svd", *sorted(offered))
    operator = next((name for name in order if name in offered), None)
    rows = [j for j, c in enumerate(choices) if c.operator == operator]
    if not rows:
        return set()
    full = min(shape.outputs, shape.inputs) // shape.groups
    step = granularity or max(1, round(full / STEPS))

    def distance(j: int, r: int) -> tuple[int, int, tuple[int, ...]]:
        rank = choices[j].rank
        return max(abs(x - r) for x in rank), max(rank) - min(rank), rank

    return {min(rows, key=lambda j: distance(j, r)) for r in range(step, full + 1, step)}


def picked(problem: Problem, logits: Sequence[Tensor], *, within: bool = True) -> tuple[int, ...]:
    """Positions of the candidates that logits stand for.

    The argmax of every layer, if that spends the budget; within the budgets, the most probable
    allocation. Where a short search leaves logits soft, the argmax can cost a fraction of a tight
    budget although the expected cost is on it. Then the candidates are those whose costs are
    nearest to the layers' expected costs (`_expected`), in sum.

    Args:
        problem: Its choices are the candidates.
        logits: (J,), one a layer.
        within: Meet the budgets, exactly; otherwise take the best of every layer.

    Raises:
        BudgetError: No allocation of the candidates meets the budgets.
    """
    limits = list(problem.limits.values())
    ratios = [[c / t for c in table] for table, t in zip(problem.budgeted(), limits, strict=True)]
    values = [-torch.log_softmax(x.detach().double().cpu(), -1).numpy() for x in logits]
    likely = [int(np.argmin(value)) for value in values]
    if max(sum(c[i] for c, i in zip(table, likely, strict=True)) for table in ratios) < SPENT:
        units = [np.sum(costs, axis=0) for costs in zip(*ratios, strict=True)]
        means = _expected(values, ratios, units)
        values = [np.abs(c - mean) for c, mean in zip(units, means, strict=True)]
    if not within:
        return tuple(int(np.argmin(value)) for value in values)
    return tuple(min_sum(values, problem.budgeted(), limits, gap=0.0).indices)


def _expected(
    surprise: Sequence[Array], ratios: Sequence[Sequence[Array]], units: Sequence[Array]
) -> list[float]:
    """Each layer's expected cost, in all just within the budgets.

    It is sum_j q_lj c_lj, with q the distribution nearest to p, by its divergence from p, whose
    expected cost is the budget: q_lj ~ p_lj exp(m c_lj), m bounded.

    Args:
        surprise: -log p, (J,), one a layer.
        ratios: By budget, the costs c in units of it.
        units: The sum of these over the budgets.
    """

    def tilted(m: float) -> list[Array]:
        return [softmax(m * c - s) for c, s in zip(units, surprise, strict=True)]

    def exceeds(m: float) -> bool:
        q = tilted(m)
        totals = [sum(c @ x for c, x in zip(table, q, strict=True)) for table in ratios]
        return bool(max(totals) > 1)

    steepest = DECIDED / max(c.max() for c in units)
    low, high = -steepest, steepest
    while high - low > 1e-6 * steepest:
        middle = (low + high) / 2
        low, high = (low, middle) if exceeds(middle) else (middle, high)
    return [float(c @ q) for c, q in zip(units, tilted(low), strict=True)]


class _Search:
    """A search in progress: what changes from epoch to epoch.

    Args:
        configuration: Of the search.
        context: The model and the data.
        problem: Its choices are the candidates.
    """

    def __init__(self, configuration: Haloc, context: SearchContext, problem: Problem) -> None:
        self.configuration, self.context, self.problem = configuration, context, problem
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

    def _search_logits(self, factors: Factorisation, generator: torch.Generator) -> None:
        """Improve the logits on held-out data; weights stay as they are."""
        first, last = TEMPERATURES
        temperature = first * (last / first) ** (self.epoch / self.configuration.epochs)
        truncations = self.net.truncations(factors)
        for step, (x, y) in enumerate(self._batches(self.held_out, generator)):
            p = [gumbel_softmax(logits, temperature, generator) for logits in self.logits]
            weights = {
                name: torch.tensordot(q.to(truncations[name].dtype), truncations[name], 1)
                for name, q in zip(self.names, p, strict=True)
            }
            output, maps = self.net.forward(x, weights)
            # A relaxed sample is one of these as the temperature falls to 0 (Gumbel-max).
            selection = [logits.softmax(-1) for logits in self.logits]
            ratios = expected_costs(selection, self.tables, self.rest)
            c = self.configuration
            loss = penalised(_cross_entropy(output, y), ratios, c.penalty, c.strength)
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
        for step, (x, y) in enumerate(self._batches(self.training, generator), c.steps):
            x = self.context.splits.augmentation(x, generator)
            targets = self.net.original(x)
            output, maps = self.net.forward(x, {n: w.product() for n, w in chosen.items()})
            loss = _cross_entropy(output, y) + mu * feature_distance(maps, targets)
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

    def _batches(
        self, part: Dataset[Any], generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch; where the data is short, of several passes over it."""
        return islice(self._endless(part, generator), self.configuration.steps)

    def _endless(
        self, part: Dataset[Any], generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            seed = int(torch.randint(2**31, (1,), generator=generator))
            size, device = self.configuration.batch_size, self.context.device
            for x, y in batches(part, size, device=device, shuffle_seed=seed):
                if len(x) > 1:  # a batch norm cannot train on one sample
                    yield channels_last(x), y

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


def _halves(dataset: Dataset[Any], seed: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """Two disjoint random halves: for the logits, and for the weights."""
    size = len_of(dataset)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    halves = order[: size // 2], order[size // 2 :]
    return subset(dataset, halves[0].sort().values), subset(dataset, halves[1].sort().values)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
