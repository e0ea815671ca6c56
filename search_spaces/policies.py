"""Rank policies: the candidate ranks of a layer."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from scipy.optimize import isotonic_regression

from rankNAS.allocation import DENSE, Choice
from rankNAS.decompositions import OPERATORS, Operator, Rank
from rankNAS.decompositions.shapes import COSTS, Cost, LayerShape
from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.renamed import renamed

__all__ = [
    "RankPolicy",
    "candidate_choices",
    "hardware_choices",
    "rank_limits",
    "latency_pareto_ranks",
]

if TYPE_CHECKING:
    from rankNAS.search_spaces.base import Layer

T = TypeVar("T")
ROUNDING = 1e-9  # rounding tolerance of isotonic means


@renamed(latency_steps="latency_tolerance", only_faster="require_speedup")
@dataclass(frozen=True)
class RankPolicy:
    """Policy for the candidate ranks of each layer.

    A choice is offered if it reduces both multiply-accumulates and parameters (break-even), if its
    ranks are multiples of `multiple_of`, and if no larger rank of its family costs as little.

    Args:
        candidates: Largest number of choices per layer, dense excluded. It is divided among the
            operators and, within one, among its families (for example numbers of groups). Ranks
            are evenly spaced; the largest is always kept.
        multiple_of: Ranks are multiples of this number; hardware often favours 8 or 16.
        cost: The cost used for the dominance test: ``macs``, ``params`` or ``weight_bytes``.
        operators: The operators, in this order.
        latency_tolerance: With known latencies, drop ranks dominated in latency: a larger rank
            of the family takes at most (1 + tolerance) times as long. None keeps all. See
            `latency_pareto_ranks`.
        require_speedup: With known latencies, drop choices that are not faster than dense.
        split_fused: Split layers that hold query, key and value, or gate and up, so that each
            has a rank of its own.

    Raises:
        UsageError: A number is below one, a tolerance negative, or a cost or operator unknown.

    Example:
        >>> shape = LayerShape(inputs=64, outputs=64, calls=((1,),))
        >>> choices, _ = candidate_choices(shape, RankPolicy(multiple_of=8, operators=("svd",)))
        >>> [str(choice) for choice in choices]
        ['dense', 'svd:24', 'svd:16', 'svd:8']
    """

    candidates: int = 256
    multiple_of: int = 1
    cost: str = "macs"
    operators: tuple[str, ...] = tuple(OPERATORS)
    latency_tolerance: float | None = None
    require_speedup: bool = False
    split_fused: bool = False

    def __post_init__(self) -> None:
        for name in ("candidates", "multiple_of"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.latency_tolerance is not None and not 0 <= self.latency_tolerance < math.inf:
            raise UsageError(
                "`latency_tolerance` must be a fraction from 0, or None, "
                f"got {self.latency_tolerance}."
            )
        if not self.operators:
            raise UsageError(f"`operators` is empty; give some of {', '.join(OPERATORS)}.")
        if self.cost not in COSTS:
            raise UnknownNameError("cost", self.cost, COSTS)
        for operator in self.operators:
            if operator not in OPERATORS:
                raise UnknownNameError("operator", operator, OPERATORS)


@lru_cache(maxsize=4096)
def candidate_choices(
    shape: LayerShape, policy: RankPolicy
) -> tuple[tuple[Choice, ...], tuple[Cost, ...]]:
    """The choices of a layer of this shape with their costs: dense first, then by cost."""
    usable = [OPERATORS[n] for n in policy.operators if OPERATORS[n].refuses(shape) is None]
    usable = usable[: policy.candidates]
    share = max(1, policy.candidates // max(1, len(usable)))
    found: dict[Choice, Cost] = {}
    for operator in usable:
        for rank, cost in _candidates(operator, shape, policy, share):
            found[Choice(operator.name, rank)] = cost
    ordered = sorted(found.items(), key=lambda item: (-item[1][policy.cost], item[0]))
    return (DENSE, *(c for c, _ in ordered)), (shape.cost(), *(cost for _, cost in ordered))


def _candidates(
    operator: Operator, shape: LayerShape, policy: RankPolicy, share: int
) -> Iterator[tuple[Rank, Cost]]:
    heads = [_head(operator, shape, f) for f in operator.families(shape, policy.multiple_of)]
    heads = _spread([head for head in heads if head], share)
    for head in heads:
        priced = [
            (rank, operator.cost(shape, rank)) for rank in _spread(head, share // len(heads))
        ]
        yield from _non_dominated(priced, policy.cost)


def _head(operator: Operator, shape: LayerShape, family: list[Rank]) -> list[Rank]:
    """The ranks of a family that reduce both MACs and parameters; cost grows along a family."""
    dense = shape.cost()

    def saves_nothing(rank: Rank) -> bool:
        cost = operator.cost(shape, rank)
        return cost.macs >= dense.macs or cost.params >= dense.params

    return family[: bisect_left(family, True, key=saves_nothing)]


def rank_limits(shape: LayerShape, choice: Choice) -> tuple[Rank | None, Rank]:
    """The break-even rank and the full rank of a choice that is not dense.

    The break-even rank is the largest rank of the choice's family that reduces both
    multiply-accumulates and parameters; None if no rank does. The full rank is the largest rank
    of the operator (with the same number of groups for ``group_svd``).

    >>> shape = LayerShape(inputs=64, outputs=32, calls=((1,),))
    >>> rank_limits(shape, Choice("svd", (8,)))  # 21 x (64 + 32) < 64 x 32 < 22 x (64 + 32)
    ((21,), (32,))
    """
    operator = OPERATORS[choice.operator]
    # The first number of group_svd counts groups; it selects the structure, not the rank.
    families = [
        family
        for family in operator.families(shape)
        if choice.operator != "group_svd" or family[0][0] == choice.rank[0]
    ]
    full = max((family[-1] for family in families), key=sum)
    # The family itself, or the nearest one if the offered ranks were rounded to multiples.
    family = min(families, key=lambda f: min(math.dist(rank, choice.rank) for rank in f))
    head = _head(operator, shape, family)
    return (head[-1] if head else None), full


def _spread(items: list[T], count: int) -> list[T]:
    """At most `count` evenly spaced items (at least one), the last always included."""
    count = max(1, min(count, len(items)))
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)] if items else []


def _non_dominated(family: list[tuple[Rank, Cost]], cost: str) -> list[tuple[Rank, Cost]]:
    """The ranks for which no larger rank costs at most as much."""
    kept: list[tuple[Rank, Cost]] = []
    for rank, c in reversed(family):
        if not kept or c[cost] < kept[-1][1][cost]:
            kept.append((rank, c))
    return kept[::-1]


def latency_pareto_ranks(seconds: Sequence[float], tolerance: float = 0.0) -> list[int]:
    """Positions of the latency-Pareto ranks: no larger rank is as fast.

    On tiled hardware, latency against rank is a staircase, and only the upper end of each step is
    useful. Latencies are first made non-decreasing by isotonic regression. The rule extends the
    one-step rule of Hajimolahoseini et al. (arXiv:2309.03824) to all ranks.

    Args:
        seconds: Latencies of one family, in increasing order of the ranks.
        tolerance: Relative extra time within which a larger rank counts as equally fast.

    Returns:
        Increasing positions; the last one is always included.

    >>> ranks = range(1, 310)
    >>> [ranks[i] for i in latency_pareto_ranks([-(-r // 64) for r in ranks])]
    [64, 128, 192, 256, 309]
    """
    smooth = isotonic_regression([float(s) for s in seconds]).x.tolist() if len(seconds) else []
    kept: list[int] = []
    fastest = math.inf
    for i in reversed(range(len(smooth))):
        if fastest > smooth[i] * (1 + tolerance) * (1 + ROUNDING):
            kept.append(i)
            fastest = smooth[i]
    return kept[::-1]


def hardware_choices(
    layer: Layer, seconds: Sequence[float], policy: RankPolicy
) -> tuple[Choice, ...]:
    """The choices of a layer that a policy keeps for known latencies.

    Args:
        layer: The layer.
        seconds: Latency of each choice.
        policy: The policy.
    """
    time = dict(zip(layer.choices, seconds, strict=True))
    kept = set(layer.choices)
    if policy.latency_tolerance is not None:
        for family in _families(layer, policy, time):
            steps = {
                family[i]
                for i in latency_pareto_ranks([time[c] for c in family], policy.latency_tolerance)
            }
            kept -= set(family) - steps
    if policy.require_speedup:
        kept = {c for c in kept if time[c] < time[DENSE]}
    return tuple(c for c in layer.choices if c == DENSE or c in kept)


def _families(
    layer: Layer, policy: RankPolicy, offered: Mapping[Choice, float]
) -> Iterator[list[Choice]]:
    """The offered choices of each family of an operator, by increasing rank."""
    for name in dict.fromkeys(c.operator for c in layer.choices if c != DENSE):
        for ranks in OPERATORS[name].families(layer.shape, policy.multiple_of):
            choices = [Choice(name, rank) for rank in ranks]
            yield [c for c in choices if c in offered]
