"""Roles by names, by sizes and shared inputs, and layers that stay dense by role."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rankNAS.decompositions.shapes import LayerShape
from rankNAS.exceptions import UnknownNameError
from rankNAS.search_spaces.compiler import check_patterns, compile_space
from rankNAS.search_spaces.roles import ROLES, find_roles


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.layers.3.self_attn.k_proj", "k"),
        ("transformer.h.0.attn.c_attn", "qkv"),
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "fc2"),
        ("bert.encoder.layer.11.attention.self.value", "v"),
        ("bert.encoder.layer.11.attention.output.dense", "o"),
        ("bert.encoder.layer.11.intermediate.dense", "fc1"),
        ("bert.encoder.layer.11.output.dense", "fc2"),
        ("gpt_neox.layers.0.attention.dense", "o"),
        ("blocks.0.attn.proj", "o"),
        ("layers.0.mlp.gate", "router"),
        ("layers.0.mlp.gate_up_proj", "gate_up"),
        ("encoder.block.0.layer.0.SelfAttention.o", "o"),
        ("cls.predictions.decoder", "head"),
    ],
)
def test_names_of_common_libraries(path: str, role: str) -> None:
    shape = LayerShape(inputs=8, outputs=8, calls=((1,),))
    assert find_roles({path: shape}, {}, None) == {path: (role,)}
    assert role in ROLES


def test_an_output_projection_is_told_from_that_of_a_gated_block() -> None:
    shape = LayerShape(inputs=8, outputs=8, calls=((1,),))
    names = ("0.wi_0", "0.wi_1", "0.wo", "1.wq", "1.wo", "2.experts.4.w1")
    found = find_roles(dict.fromkeys(names, shape), {}, None)
    assert found == {
        "0.wi_0": ("gate",),
        "0.wi_1": ("up",),
        "0.wo": ("down",),
        "1.wq": ("q",),
        "1.wo": ("o",),
        "2.experts.4.w1": ("expert", "gate"),
    }


def test_convolutions_have_no_role() -> None:
    shape = LayerShape(inputs=8, outputs=8, kernel=(3, 3), calls=((1, 4, 4),))
    assert find_roles({"q": shape}, {}, "q") == {}


class Anonymous(nn.Module):
    """A block of a transformer whose names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.d = nn.Linear(32, 32)
        self.e, self.f, self.g = nn.Linear(32, 80), nn.Linear(32, 80), nn.Linear(80, 32)
        self.h, self.i, self.j = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.d(self.a(x) * torch.cat([self.b(x), self.c(x)], -1))
        x = x + self.g(self.e(x).sigmoid() * self.f(x))
        x = x + self.i(self.h(x).relu())
        found: Tensor = self.j(x)
        return found


def test_roles_by_the_flow_of_data() -> None:
    space = compile_space(Anonymous(), torch.zeros(1, 6, 32), min_weights=1)
    roles = {name: layer.roles for name, layer in space.layers.items()}
    names = dict(zip("abcdefghi", "q k v o gate up down fc1 fc2".split(), strict=True))
    assert roles == {name: (role,) for name, role in names.items()}


def test_layers_with_the_same_input_know_it() -> None:
    space = compile_space(Anonymous(), torch.zeros(1, 6, 32), min_weights=1)
    sites = {name: layer.site for name, layer in space.layers.items()}
    assert sites == dict(zip("abcdefghi", "aaadeeghi", strict=True))


def test_layers_stay_dense_by_role() -> None:
    space = compile_space(
        Anonymous(), torch.zeros(1, 6, 32), min_weights=1, exclude=["role:k", "^g$"]
    )
    assert list(space.layers) == list("acdefhi")
    reasons = {skipped.name: skipped.reason for skipped in space.skipped}
    assert reasons["b"] == reasons["g"] == "excluded"


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown role 'keys'"):
        check_patterns(["role:keys"])
