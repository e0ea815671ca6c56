"""A search space: the decomposable layers of a model, their choices, and the costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.decompositions.shapes import COSTS, LAYER_COSTS, Cost, LayerShape
from rankNAS.exceptions import UsageError
from rankNAS.renamed import renamed

__all__ = ["COSTS", "Layer", "SearchSpace", "Skipped"]


@dataclass(frozen=True)
class Layer(Mapping[Choice, Cost]):
    """A decomposable layer: a mapping from its choices to their exact costs.

    Args:
        name: Path of the module in the model.
        aliases: Other paths that hold the same weight.
        shape: Its shape, with the input sizes of every call in one forward pass.
        choices: The first choice is dense; no other is.
        costs: The cost of each choice, all calls together.
        roles: What it is in a transformer, such as ``q``; see `rankNAS.search_spaces.roles`.
        site: The first layer of those in a row with the same input; empty if unknown.

    Raises:
        UsageError: The first choice is not dense, or another one is.
    """

    name: str
    aliases: tuple[str, ...]
    shape: LayerShape
    choices: tuple[Choice, ...]
    costs: tuple[Cost, ...]
    roles: tuple[str, ...] = ()
    site: str = ""

    def __post_init__(self) -> None:
        if self.choices[:1] != (DENSE,) or self.choices.count(DENSE) > 1:
            raise UsageError(
                f"layer {self.name!r} has the choices {', '.join(map(str, self.choices[:3]))}, …; "
                "the first one, and no other, must be dense."
            )

    @cached_property
    def _table(self) -> dict[Choice, Cost]:
        return dict(zip(self.choices, self.costs, strict=True))

    def __getitem__(self, choice: Choice) -> Cost:
        return self._table[choice]

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path of the layer in the model."""
        return (self.name, *self.aliases)

    def repeated(self, factor: int) -> Layer:
        """The layer with `factor` times the inputs in each call."""
        calls = tuple((factor * call[0], *call[1:]) for call in self.shape.calls)
        costs = tuple(cost.repeated(factor) for cost in self.costs)
        return replace(self, shape=replace(self.shape, calls=calls), costs=costs)

    def restrict(self, keep: Sequence[Choice]) -> Layer:
        """The layer with a subset of its choices in their order here; dense always stays."""
        wanted = {DENSE, *keep}
        kept = tuple(choice for choice in self.choices if choice in wanted)
        return replace(self, choices=kept, costs=tuple(self[choice] for choice in kept))


@dataclass(frozen=True)
class Skipped:
    """What stays dense, and the reason: a layer, or other parameters and operations of a module.

    Args:
        name: Path of the module in the model; for the model itself, its class.
        reason: Why it stays dense.
        cost: Its cost. A parameter that several modules share counts for the first one.
    """

    name: str
    reason: str
    cost: Cost


@renamed(rest="remainder_cost")
@dataclass(frozen=True)
class SearchSpace:
    """The decomposable layers of a model with their choices, and the cost of the remainder.

    Args:
        layers: Name to layer, in the order of the forward pass.
        skipped: Everything else with parameters or multiply-accumulates, with the reason: first
            the layers that are left dense, then the other modules.
        remainder_cost: Cost of everything outside `layers`, skipped layers included.
        input_shape: Shape of the first input tensor that has one sample along axis 0, batch
            included; costs are for the example inputs. Empty for a model without such an input.

    Example:
        >>> import torch
        >>> from rankNAS.search_spaces import compile_space
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
        >>> space = compile_space(model, torch.zeros(1, 64))
        >>> space.cost({"0": Choice("svd", (8,))}).macs  # 8 x (64 + 64) + 64 x 10
        1664
        >>> space.skipped[0].reason
        'output layer'
        >>> class Two(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.left, self.right = torch.nn.Linear(64, 64), torch.nn.Linear(32, 64)
        ...         self.head = torch.nn.Linear(64, 2)
        ...     def forward(self, a, b):
        ...         return self.head(self.left(a) + self.right(b))
        >>> space = compile_space(Two(), (torch.zeros(3, 64), torch.zeros(3, 32)))
        >>> space.batch_size, space.at_batch(6).input_shape
        (3, (6, 64))
    """

    layers: dict[str, Layer]
    skipped: tuple[Skipped, ...]
    remainder_cost: Cost
    input_shape: tuple[int, ...]

    @property
    def batch_size(self) -> int:
        """The number of samples that costs are for."""
        return self.input_shape[0] if self.input_shape else 1

    @cached_property
    def dense_cost(self) -> Cost:
        """Cost of the dense model."""
        return self.cost(self.dense)

    @cached_property
    def dense(self) -> Allocation:
        """The allocation that leaves every layer dense."""
        return Allocation.of(dict.fromkeys(self.layers, DENSE))

    @cached_property
    def shares(self) -> dict[str, dict[str, float]]:
        """By name of a layer or of what is skipped, its fraction of each cost of the dense model.

        The fractions of one cost add up to 1 (to 0 if the model has none of it).
        """
        parts = {name: layer.costs[0] for name, layer in self.layers.items()}
        parts |= {skipped.name: skipped.cost for skipped in self.skipped}
        whole = self.dense_cost
        return {
            name: {of: cost[of] / whole[of] if whole[of] else 0.0 for of in COSTS}
            for name, cost in parts.items()
        }

    def cost(self, allocation: Mapping[str, Choice]) -> Cost:
        """Exact cost of the whole model under an allocation.

        Raises:
            UsageError: The allocation names a layer or a choice that the space does not have.
        """
        self.check(allocation)
        return sum((self.layers[name][c] for name, c in allocation.items()), self.remainder_cost)

    def costs(self, allocation: Mapping[str, Choice]) -> dict[str, int]:
        """Exact costs by name: of the whole model, and of the decomposable layers alone.

        Raises:
            UsageError: The allocation names a layer or a choice that the space does not have.
        """
        total = self.cost(allocation)
        whole = {name: total[name] for name in COSTS}
        layers = {name: total[of] - self.remainder_cost[of] for name, of in LAYER_COSTS.items()}
        return whole | layers

    def check(self, allocation: Mapping[str, Choice]) -> None:
        """Raise a UsageError unless the allocation gives every layer one of its choices."""
        if unknown := [name for name in allocation if name not in self.layers]:
            raise UsageError(f"the space has no layer {unknown[0]!r}.")
        for name, layer in self.layers.items():
            if name not in allocation:
                raise UsageError(f"the allocation has no choice for layer {name!r}.")
            if allocation[name] not in layer:
                raise UsageError(
                    f"layer {name!r} has no choice {str(allocation[name])!r}; it has "
                    f"{len(layer)}, from {layer.choices[0]} to {layer.choices[-1]}."
                )

    def at_batch(self, size: int) -> SearchSpace:
        """The space for another batch size; calls and multiply-adds scale in proportion.

        Args:
            size: A multiple of the batch size that the space was compiled for.
        """
        factor, remainder = divmod(size, self.batch_size)
        if size < 1 or remainder:
            raise UsageError(f"a batch size must be a multiple of {self.batch_size}, got {size}.")
        layers = {name: layer.repeated(factor) for name, layer in self.layers.items()}
        skipped = tuple(replace(s, cost=s.cost.repeated(factor)) for s in self.skipped)
        shape = (size, *self.input_shape[1:]) if self.input_shape else ()
        return SearchSpace(layers, skipped, self.remainder_cost.repeated(factor), shape)

    def restrict(self, keep: Mapping[str, Sequence[Choice]]) -> SearchSpace:
        """The space with a subset of the choices of each layer; dense always stays."""
        layers = {name: layer.restrict(keep[name]) for name, layer in self.layers.items()}
        return replace(self, layers=layers)
