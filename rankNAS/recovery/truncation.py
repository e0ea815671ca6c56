"""Truncation in depth: a transformer with some of its blocks.

References:
    arXiv 2110.08460, 2021: a truncated GPT-2 as the start of a training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from rankNAS.copies import copied
from rankNAS.exceptions import UsageError

__all__ = ["RULES", "Rule", "chosen_blocks", "with_blocks"]

Rule: TypeAlias = Literal["even", "alternate", "first", "last", "ends"]
RULES: tuple[Rule, ...] = get_args(Rule)
#: Names under which a module keeps the number of its block: where its keys and values are cached.
NUMBERS = ("layer_idx", "layer_id")
COUNT = "num_hidden_layers"
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists of a configuration
SCALED = "scale_attn_by_inverse_layer_idx"


def with_blocks(network: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A copy of a transformer with some of its blocks, in the given order.

    The blocks are the elements of the one list of modules of the same class that is not inside
    another. Their numbers, by which models of ``transformers`` cache keys and values, and the
    configuration become those of the shorter model, so it generates, and it is saved and loaded
    as any other.

    Args:
        network: The network; it is not changed.
        kept: Numbers of blocks, from 0, each at most once.

    Raises:
        UsageError: There is no such list or several, a number is not in it, or what a block
            computes depends on its number.
    """
    path, blocks = _block_list(network)
    count = len(blocks)
    if not kept or len(set(kept)) < len(kept) or not set(kept) <= set(range(count)):
        raise UsageError(
            f"the blocks {list(kept)} were asked for, but they must be different numbers from 0 "
            f"to {count - 1}."
        )
    if getattr(getattr(network, "config", None), SCALED, False):
        raise UsageError(
            f"the configuration has {SCALED}, so a block at another place is another function; "
            "such a model cannot be truncated."
        )
    found = copied(network)
    chosen = [found.get_submodule(path)[i] for i in kept]  # type: ignore[index]
    for new, (old, block) in enumerate(zip(kept, chosen, strict=True)):
        _renumber(block, old, new)
    parent, _, name = path.rpartition(".")
    setattr(found.get_submodule(parent), name, type(blocks)(*_as_arguments(blocks, chosen)))
    configs = {id(m.config): m.config for m in found.modules() if hasattr(m, "config")}
    for config in configs.values():
        _shorten(config, count, kept)
    return found


def chosen_blocks(count: int, kept: int, rule: Rule = "even") -> list[int]:
    """The numbers of the blocks that are kept.

    Args:
        count: The number of blocks.
        kept: How many are kept.
        rule: ``even`` spreads them from the first to the last one, ``alternate`` takes equal steps
            from the first one, ``first`` and ``last`` take neighbours, ``ends`` takes half of
            them, rounded up, from the start and the others from the end.

    Raises:
        UsageError: There are not so many, or no such rule.

    >>> chosen_blocks(12, 6), chosen_blocks(12, 6, "alternate"), chosen_blocks(12, 6, "ends")
    ([0, 2, 4, 7, 9, 11], [0, 2, 4, 6, 8, 10], [0, 1, 2, 9, 10, 11])
    """
    if not 1 <= kept <= count:
        raise UsageError(f"{kept} of {count} blocks were asked for; keep 1 to {count}.")
    if rule == "even":
        return [round(i * (count - 1) / max(1, kept - 1)) for i in range(kept)]
    if rule == "alternate":
        return [i * count // kept for i in range(kept)]
    start = {"first": kept, "last": 0, "ends": kept - kept // 2}.get(rule)
    if start is None:
        raise UsageError(f"the rule is {rule!r}, but it must be one of {', '.join(RULES)}.")
    return [*range(start), *range(count - kept + start, count)]


def _block_list(network: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The path of the list of the blocks, and the list."""
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for path, module in network.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and path and not inside:
            children = list(module)
            alike = len({type(child) for child in children}) == 1
            if len(children) > 1 and alike and any(True for _ in children[0].children()):
                found[path] = module
    if len(found) != 1:
        listed = f"several lists of blocks ({', '.join(found)})" if found else "no list of blocks"
        raise UsageError(
            f"{type(network).__name__} has {listed}; blocks are taken from a network with one "
            "list of modules of the same class."
        )
    return next(iter(found.items()))


def _as_arguments(blocks: nn.Module, chosen: list[Any]) -> list[Any]:
    """The arguments with which a list of the same kind is made."""
    return chosen if isinstance(blocks, nn.Sequential) else [chosen]


def _renumber(block: nn.Module, old: int, new: int) -> None:
    """Replace the number of a block in its modules."""
    for module in block.modules():
        for name in NUMBERS:
            if vars(module).get(name) == old:
                setattr(module, name, new)


def _shorten(config: Any, count: int, kept: Sequence[int]) -> None:
    """Give a configuration the number of blocks and what it lists for each of them."""
    if getattr(config, COUNT, None) != count:
        return
    for name in PER_BLOCK:
        listed = getattr(config, name, None)
        if isinstance(listed, list | tuple) and len(listed) == count:
            setattr(config, name, type(listed)(listed[i] for i in kept))
    setattr(config, COUNT, len(kept))
