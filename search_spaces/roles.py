"""Roles of layers in a transformer, such as query projection, gate or router.

Names decide where they are among those that the common libraries use. For other linear layers the
flow of data decides: which layers have the same input, and what follows them with which sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import UnknownNameError

__all__ = ["ROLES", "RoleRequest", "find_roles", "role_of"]

ROLES: dict[str, str] = {
    "q": "query projection of attention",
    "k": "key projection of attention",
    "v": "value projection of attention",
    "qkv": "query, key and value projections in one layer",
    "kv": "key and value projections in one layer",
    "o": "output projection of attention",
    "gate": "gate of a gated feed-forward block, before its activation",
    "up": "other input projection of a gated feed-forward block",
    "gate_up": "gate and up in one layer",
    "down": "output projection of a gated feed-forward block",
    "fc1": "first layer of a feed-forward block without a gate",
    "fc2": "second layer of a feed-forward block without a gate",
    "router": "router of a mixture of experts",
    "expert": "any layer of an expert",
    "head": "output layer of the model",
    "embedding": "table of embeddings",
}
PREFIX = "role:"

#: Role by the last part of a path.
LAST: dict[str, str] = {
    name: role
    for role, names in {
        "q": "q_proj q query q_lin to_q wq query_proj q_a_proj q_b_proj",
        "k": "k_proj k key k_lin to_k wk key_proj",
        "v": "v_proj v value v_lin to_v wv value_proj",
        "qkv": "c_attn qkv qkv_proj query_key_value Wqkv in_proj W_pack att_proj",
        "kv": "kv_proj kv kv_a_proj_with_mqa kv_b_proj to_kv",
        "o": "o_proj o out_proj out_lin to_out",
        "gate": "gate_proj w1 wi_0 fc1_g",
        "up": "up_proj w3 wi_1 fc1_x",
        "gate_up": "gate_up_proj w12",
        "down": "down_proj w2",
        "fc1": "fc1 c_fc linear1 lin1 dense_h_to_4h wi fc_in",
        "fc2": "fc2 linear2 lin2 dense_4h_to_h fc_out",
        "router": "router shared_expert_gate",
        "head": "lm_head head classifier score embed_out",
    }.items()
    for name in names.split()
}
#: Role by the last parts of a path, where one part does not tell: the first expression that fits.
ENDS: tuple[tuple[str, str], ...] = (
    (r"(router|gate)\.(classifier|layer|wg|linear)$", "router"),
    (r"(mlp|moe|feed_forward|ffn)\.gate$", "router"),
    (r"(self_?attn|self_?attention|attention|attn|attn\w*)\.(\w+\.)*(dense|proj|c_proj|wo)$", "o"),
    (r"to_out\.\d+$", "o"),
    (r"intermediate\.dense$", "fc1"),
    (r"(mlp|ffn|feed_forward)\.c_proj$", "fc2"),
    (r"(gate_up_proj|w12)\.gate$", "gate"),
    (r"(gate_up_proj|w12)\.up$", "up"),
    (r"DenseReluDense\.wo$", "fc2"),
    (r"(layer\.\d+|layers?|ffn)\.output\.dense$", "fc2"),
    (r"decoder$", "head"),
)
EXPERT = re.compile(r"(^|\.)(experts\.\d+|shared_experts?)\.")


@dataclass(frozen=True)
class RoleRequest:
    """A request for layers by their role, such as ``role:k``.

    Raises:
        UnknownNameError: There is no such role.
    """

    role: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UnknownNameError("role", self.role, ROLES)

    @classmethod
    def of(cls, text: str) -> RoleRequest | None:
        """The request in a text; None if it asks for names."""
        return cls(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None


def role_of(path: str) -> str | None:
    """The role of a layer by its path alone; None if the path does not tell."""
    for pattern, role in ENDS:
        if re.search(pattern, path):
            return role
    return LAST.get(_last(path))


def find_roles(
    shapes: Mapping[str, LayerShape], sites: Mapping[str, str], output: str | None
) -> dict[str, tuple[str, ...]]:
    """The roles of layers; those without any are left out.

    Args:
        shapes: By path, in the order of the calls.
        sites: By path, the first of the layers with the same input.
        output: The last layer of the model.

    Example:
        >>> linear = LayerShape(inputs=8, outputs=8, calls=((1,),))
        >>> names = ("h.0.attn.q_proj", "h.0.mlp.experts.3.down_proj")
        >>> find_roles(dict.fromkeys(names, linear), {}, None)
        {'h.0.attn.q_proj': ('q',), 'h.0.mlp.experts.3.down_proj': ('expert', 'down')}
    """
    linear = {name: shape for name, shape in shapes.items() if not shape.kernel}
    by_name = {name: role for name in linear if (role := role_of(name))}
    if any(role == "gate" for role in by_name.values()) or "wo" in {_last(n) for n in linear}:
        by_name |= _feed_forward_outputs(linear, by_name)
    found = _by_flow(linear, sites) | by_name
    if output in linear:
        found[output] = "head"
    roles = {}
    for name in linear:
        inside = ("expert",) if EXPERT.search(name) else ()
        own = (found[name],) if name in found else ()
        if inside or own:
            roles[name] = (*inside, *own)
    return roles


def _feed_forward_outputs(
    shapes: Mapping[str, LayerShape], by_name: Mapping[str, str]
) -> dict[str, str]:
    """Roles of layers called ``wo`` or ``fc2`` beside a gate or a first layer: the output."""
    found = {}
    gated = {_parent(name) for name, role in by_name.items() if role == "gate"}
    for name in shapes:
        if _last(name) in ("wo", "fc2") and _parent(name) in gated:
            found[name] = "down"
        elif _last(name) == "wo" and name not in by_name:
            found[name] = "o"
    return found


def _by_flow(shapes: Mapping[str, LayerShape], sites: Mapping[str, str]) -> dict[str, str]:
    """Roles from sizes and shared inputs alone."""
    found: dict[str, str] = {}
    groups = list(_sites(shapes, sites))
    for names, after in zip(groups, [*groups, []][1:], strict=True):
        first = shapes[names[0]]
        outputs = [shapes[name].outputs for name in names]
        following = shapes[after[0]] if len(after) == 1 else None
        if len(names) == 3 and outputs[1] == outputs[2]:
            found |= dict(zip(names, ("q", "k", "v"), strict=True))
            if following and following.inputs == outputs[0]:
                found[after[0]] = "o"
        elif following is None or following.outputs != first.inputs:
            continue
        elif len(names) == 2 and outputs[0] == outputs[1] == following.inputs:
            found |= {names[0]: "gate", names[1]: "up", after[0]: "down"}
        elif len(names) == 1 and outputs[0] == 3 * following.inputs:
            found |= {names[0]: "qkv", after[0]: "o"}
        elif len(names) == 1 and first.inputs < outputs[0] == following.inputs:
            found |= {names[0]: "fc1", after[0]: "fc2"}
    return found


def _sites(shapes: Mapping[str, LayerShape], sites: Mapping[str, str]) -> Iterator[Sequence[str]]:
    """The layers with the same input together."""
    found: dict[str, list[str]] = {}
    for name in shapes:
        found.setdefault(sites.get(name, name), []).append(name)
    yield from found.values()


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
