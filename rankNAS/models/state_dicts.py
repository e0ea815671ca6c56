"""State dicts as users have them: the entry of a checkpoint, and the prefix, that fit a model."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankNAS.exceptions import WeightsError

__all__ = ["fitting_state"]

COMPILED = "_orig_mod."  # what torch.compile puts before names
COUNTER = "num_batches_tracked"  # of a batch norm; files of old versions lack it
DEPTH = 3  # of entries in a checkpoint
LISTED = 3  # tensor names listed in a message; the others are counted

State = Mapping[str, Tensor]
Place = tuple[str, ...]  # the keys that lead to an entry of a checkpoint
Entries = Sequence[tuple[Place, State]]


def fitting_state(content: object, model: nn.Module, source: str) -> dict[str, Tensor]:
    """The tensors in a checkpoint that fit a model, by the names of the model.

    A prefix common to all names is taken out or added. A missing counter of a batch norm is zero,
    and a missing name of a tied weight has the tensor of its other name.

    Args:
        content: Tensors by name, or a dict with one such entry that fits, under any key.
        model: The network.
        source: The name of ``content`` in messages, for example the path of a file.

    Raises:
        WeightsError: Nothing fits, or more than one entry does.
    """
    model_names = _Names.of(model)
    entries = list(_entries(content))
    if not entries:
        raise WeightsError(
            f"{source} holds no dict of tensors, neither directly nor under a key such as "
            "'state_dict' or 'model'; save model.state_dict(), best as safetensors."
        )
    fitting = []
    for where, state in entries:
        names = next(filter(model_names.fit, _renamings(state, model_names.shapes)), None)
        if names is not None:
            fitting.append((where, _renamed(state, names)))
    fitting = [(w, s) for w, s in fitting if model_names.same_shapes(s)] or fitting
    if not fitting:
        raise _misfit(entries, model_names, source)
    if len(fitting) > 1:
        keys = [_key(where) or "the top level" for where, _ in fitting]
        raise WeightsError(
            f"{source} holds several dicts of tensors that fit the model: {', '.join(keys)}; "
            f"take out the one that you mean: torch.save(torch.load(...){keys[-1]}, 'weights.pt')."
        )
    return model_names.completed(fitting[0][1])


@dataclass(frozen=True)
class _Names:
    """The names that a model expects.

    Args:
        expected: The state dict of the model.
        shapes: Its shapes; None if not known yet.
        twins: For each name of a tied weight, all of its names.
    """

    expected: State
    shapes: Mapping[str, Any]
    twins: Mapping[str, Collection[str]]

    @classmethod
    def of(cls, model: nn.Module) -> _Names:
        """The names of a model."""
        expected = model.state_dict()
        tied: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        twins = {name: names for names in tied.values() if len(names) > 1 for name in names}
        return cls(expected, {name: _shape(value) for name, value in expected.items()}, twins)

    def missing(self, names: Collection[str]) -> list[str]:
        """The expected names that have no tensor and no substitute."""
        return [
            name
            for name in self.expected
            if name not in names
            and name.rpartition(".")[2] != COUNTER
            and not any(twin in names for twin in self.twins.get(name, ()))
        ]

    def left(self, names: Mapping[str, str]) -> list[str]:
        """The old names whose new ones the model does not expect."""
        return [old for old, new in names.items() if new not in self.expected]

    def fit(self, names: Mapping[str, str]) -> bool:
        """Whether the new names are what the model expects."""
        given = set(names.values())
        return len(given) == len(names) and not self.left(names) and not self.missing(given)

    def same_shapes(self, state: State) -> bool:
        """Whether the tensors have the shapes of the model."""
        return all(self.shapes[n] in (None, tuple(x.shape)) for n, x in state.items())

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, with those that the model can do without."""
        for name, value in self.expected.items():
            if name not in state:
                twin = next((t for t in self.twins.get(name, ()) if t in state), None)
                state[name] = value.new_zeros(()) if twin is None else state[twin]
        return state


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None for a lazy one and for other values."""
    return None if not isinstance(value, Tensor) or is_lazy(value) else tuple(value.shape)


def _entries(
    content: object, where: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All dicts of tensors in a checkpoint, with their keys; values of other kinds are dropped."""
    if not isinstance(content, dict):
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = OrderedDict((n, value) for n, value in named.items() if isinstance(value, Tensor))
    if tensors:
        vars(tensors)["_metadata"] = getattr(content, "_metadata", None)
        yield where, tensors
    if len(where) < DEPTH:
        for name, value in named.items():
            yield from _entries(value, (*where, name))


def _renamings(names: Collection[str], expected: Collection[str]) -> Iterator[dict[str, str]]:
    """Possible new names by old name: a common prefix less, or one more."""
    plain = {name.replace(COMPILED, ""): name for name in expected}
    own = {name: name.replace(COMPILED, "") for name in names}
    yield {name: name for name in names}
    for prefix in _prefixes(own.values()):
        shorter = {old: new.removeprefix(prefix) for old, new in own.items()}
        yield {old: plain.get(new, new) for old, new in shorter.items()}
    for prefix in _prefixes(plain)[1:]:
        yield {old: plain.get(prefix + new, prefix + new) for old, new in own.items()}


def _prefixes(names: Collection[str]) -> list[str]:
    """All prefixes that names have in common, up to a dot; the empty one first."""
    parts = os.path.commonprefix(list(names)).split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts) + 1)]


def _renamed(state: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors by new name, with the versions of modules, which PyTorch looks up by name."""
    found = OrderedDict((new, state[old]) for old, new in names.items())
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, dict) and all(isinstance(v, dict) for v in versions.values()):
        modules = _modules(names)
        vars(found)["_metadata"] = {
            modules[name]: version for name, version in versions.items() if name in modules
        }
    return found


def _modules(names: Mapping[str, str]) -> dict[str, str]:
    """The new names of all modules around renamed tensors, by old name."""
    found = {}
    for old, new in names.items():
        before, after = old.split("."), new.split(".")
        while before and after and before[-1] == after[-1]:
            before.pop()
            after.pop()
            found[".".join(before)] = ".".join(after)
    return found


def _misfit(entries: Entries, model: _Names, source: str) -> WeightsError:
    """The error for tensors that do not fit; it compares the nearest ones with the model."""
    part = _part(entries, model)
    if part is not None:
        where, missing, left, hint = part
    else:
        known = model.expected
        tried = [(where, names) for where, state in entries for names in _renamings(state, known)]
        where, names = max(
            tried, key=lambda one: (len(known.keys() & set(one[1].values())), -len(one[1]))
        )
        missing, left = model.missing(set(names.values())), model.left(names)
        hint = "choose the model that the weights were made for"
        if not missing:
            hint = "take out the names that the model does not have"
    under = f" (under {_key(where)})" if where else ""
    return WeightsError(
        f"{source}{under} belongs to another model: missing {_listing(missing)}; unexpected "
        f"{_listing(left)}; {hint}."
    )


def _part(entries: Entries, model: _Names) -> tuple[Place, list[str], list[str], str] | None:
    """The place of tensors that fit but for others beside them, and what to do."""
    for where, state in entries:
        for prefix in dict.fromkeys(p for name in state for p in _prefixes([name])[1:]):
            names = {n: n.removeprefix(prefix) for n in state if n.startswith(prefix)}
            if model.fit(names):
                hint = (
                    f"the {len(names)} names that begin with {prefix!r} fit without it, so take "
                    f"out the others: given = torch.load(...){_key(where)}; torch.save("
                    f"{{n: x for n, x in given.items() if n.startswith({prefix!r})}}, 'part.pt')"
                )
                return where, [], [name for name in state if name not in names], hint
    return None


def _key(where: Place) -> str:
    """The place of an entry, as an expression: ``['net']['encoder']``."""
    return "".join(f"[{name!r}]" for name in where)


def _listing(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
