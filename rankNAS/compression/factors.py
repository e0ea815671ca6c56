"""The factors of one layer; every rank of every operator is a slice of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.decompositions import OPERATORS, ErrorNorm, Factors, Rank, Target
from rankNAS.decompositions.layer_view import LayerView
from rankNAS.exceptions import RankNASError
from rankNAS.search_spaces.base import Layer
from rankNAS.threads import limited_threads

__all__ = ["LayerFactors", "Screen", "Select", "factorise_layer"]

#: From a layer and the relative error of each of its choices, the choices to keep.
Select = Callable[[Layer, Sequence[float]], Sequence[Choice]]
#: From a layer, the relative error of each of its choices (infinite if unknown) and estimates that
#: are at most the errors (infinite for the others), the choices with estimates that may be of use.
Screen = Callable[[Layer, Sequence[float], Sequence[float]], Sequence[Choice]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one layer by operator, with its dense weight and error norm.

    Args:
        layer: The layer of the search space.
        weight: The dense weight, folded (g, o, c, kh, kw).
        bias: The dense bias (outputs,), or None.
        norm: The error norm, without C.
        factors: Factors by operator name.
        energy: ||H W C^1/2||_F^2, to which errors are relative; C is the identity in the norm
            ``weight``.
        moment: A symmetric matrix (g, m, m), m = min(o, i), with the eigenvalues of the second
            moment W C W^T of the layer's outputs; further ones are zero. None where no strategy
            needs them.
        file: The file in which they lie; None for factors in memory.
    """

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    norm: ErrorNorm
    factors: dict[str, Factors]
    energy: float
    moment: Tensor | None
    file: Path | None = None

    def error(self, choice: Choice) -> float:
        """Relative error of a choice in the norm; 0 for dense."""
        return 0.0 if choice == DENSE else self.factors[choice.operator].error(choice.rank)

    def errors(self) -> list[float]:
        """Relative error of each choice of the layer."""
        return [self.error(choice) for choice in self.layer.choices]

    def losses(self, batch: int) -> list[float]:
        """Half the absolute error of each choice, summed over the positions of a sample.

        Args:
            batch: Samples in the inputs that the layer's calls were counted for.
        """
        positions = sum(math.prod(call) for call in self.layer.shape.output_calls()) / batch
        return [0.5 * positions * self.energy * error for error in self.errors()]

    def restrict(self, keep: Sequence[Choice]) -> LayerFactors:
        """The factors of a subset of the choices; the others are freed."""
        layer = self.layer.restrict(keep)
        factors = {
            name: self.factors[name].restrict(ranks)
            for name, ranks in ranks_by_operator(layer.choices).items()
        }
        return replace(self, layer=layer, factors=factors)

    def folded(self, choice: Choice) -> tuple[Tensor, Tensor | None]:
        """The product of a choice's factors (shaped as by `LayerShape.unfold`), and the bias."""
        if choice == DENSE:
            return self.layer.shape.unfold(self.weight), self.bias
        approximation = self._approximation(choice)
        return (
            self.layer.shape.unfold(approximation).to(self.weight.dtype),
            self._corrected_bias(approximation),
        )

    def write(self, model: nn.Module, choice: Choice) -> None:
        """Set the layer's weight in a model to the product of a choice's factors, in place.

        A copy from `changeable_copy` may store the choice instead of the weight.
        """
        LayerView(model, self.layer.paths).write_from(partial(self.folded, choice))

    def module(self, choice: Choice) -> nn.Module:
        """The decomposed layer as an ordinary chain of modules."""
        bias = self.bias_of(choice)
        module = self.factors[choice.operator].truncate(choice.rank, bias, self.weight.dtype)
        return module.to(self.weight.device)

    def bias_of(self, choice: Choice) -> Tensor | None:
        """The bias of the decomposed layer."""
        if self.bias is None or self.norm.mean is None:
            return self.bias
        return self._corrected_bias(self._approximation(choice))

    def _approximation(self, choice: Choice) -> Tensor:
        """The approximated weight (g, o, n), where the weight is; factors may lie in files."""
        return self.factors[choice.operator].weight(choice.rank).to(self.weight.device)

    def _corrected_bias(self, approximation: Tensor) -> Tensor | None:
        """The bias b + (W - What) E[x], which removes the mean of the error."""
        if self.bias is None or self.norm.mean is None:
            return self.bias
        D = self.weight.double().flatten(2) - approximation
        shift = (D @ self.norm.mean.to(D).unsqueeze(-1)).flatten()
        return (self.bias.double() + shift).to(self.bias.dtype)


def factorise_layer(
    layer: Layer, module: nn.Module, norm: ErrorNorm, screen: Screen | None = None
) -> LayerFactors:
    """The factors of one layer for all its choices, or for those that pass a screen.

    Args:
        layer: The layer of the search space.
        module: Its module.
        norm: The error norm.
        screen: Decides from estimates which choices may be of use; the others may be left out.

    Raises:
        RankNASError: The weight is not finite.
    """
    shape = layer.shape
    view = LayerView(module, [""])
    weight = shape.fold(view.weight)
    if not weight.isfinite().all():
        raise RankNASError(
            f"the weight of layer {layer.name!r} is not finite; look for NaN or infinity in the "
            "checkpoint."
        )
    target = Target(weight, norm)
    if target.energy < 0:  # rounding of a covariance that is small against the mean
        target = target.repaired
    if not weight.any():
        logger.warning("the weight of layer %r is zero: all of its choices are exact.", layer.name)
    with limited_threads(max(shape.width, shape.outputs // shape.groups)):
        layer, factors = _factorised(layer, target, screen)
        moment = _moment(target)
    # C is as large as all factors together and no longer needed.
    norm = replace(norm, C=None)
    return LayerFactors(layer, weight, view.bias, norm, factors, target.energy, moment)


def _moment(target: Target) -> Tensor:
    """W C W^T, or R C R^T with W = QR, which is smaller if W has more rows than columns."""
    W = target.W
    if W.shape[-2] <= W.shape[-1]:
        return target.WC @ W.mT
    R: Tensor = torch.linalg.qr(W, mode="r").R
    return target.norm.right(R) @ R.mT


def _factorised(
    layer: Layer, target: Target, screen: Screen | None
) -> tuple[Layer, dict[str, Factors]]:
    """The factors by operator, and the layer with the choices that have factors.

    Operators come in order: the estimates of one compete with the errors of those before it.
    """
    errors: dict[Choice, float] = {DENSE: 0.0}
    factors = {}
    for name, ranks in ranks_by_operator(layer.choices).items():
        kept = set(ranks)
        wanted = None if screen is None else partial(_wanted, screen, layer, name, errors, kept)
        found = OPERATORS[name].factorise(layer.shape, target, ranks, wanted)
        if kept:
            factors[name] = found
            errors |= {Choice(name, rank): found.error(rank) for rank in kept}
    return layer.restrict(list(errors)), factors


def _wanted(
    screen: Screen,
    layer: Layer,
    name: str,
    errors: Mapping[Choice, float],
    kept: set[Rank],
    estimates: Mapping[Rank, float],
) -> Collection[Rank]:
    """The ranks of an operator that pass the screen; the other ones are removed from `kept`."""
    guessed = {Choice(name, rank): error for rank, error in estimates.items()}
    known, guesses = (
        [some.get(choice, math.inf) for choice in layer.choices] for some in (errors, guessed)
    )
    useful = {choice.rank for choice in screen(layer, known, guesses) if choice in guessed}
    kept.difference_update(estimates.keys() - useful)
    return useful


def ranks_by_operator(choices: Iterable[Choice]) -> dict[str, list[tuple[int, ...]]]:
    """The ranks of the choices by operator; dense is excluded."""
    ranks: dict[str, list[tuple[int, ...]]] = {}
    for choice in choices:
        if choice != DENSE:
            ranks.setdefault(choice.operator, []).append(choice.rank)
    return ranks
