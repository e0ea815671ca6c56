from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rankNAS.search_spaces.compiler import compile_space

X = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Four linear layers; `b` is the one that is used in an odd way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.c(self.b(self.a(x))))
        return y


class ReadsDtype(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.b.weight.dtype))


class ReadsSize(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, : self.b.in_features])


class ReadsBias(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b.bias


class TiedInCode(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(super().forward(x), self.b.weight.t())


class TiedInAList(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.weights[0].T


class ReachedOtherwise(Chain):
    def __init__(self, holder: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.held = holder(self.b)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.c(self.held(self.a(x))))
        return y


class Called:
    """A callable that hides a layer in a list and a dict."""

    def __init__(self, layer: nn.Module) -> None:
        self.inside = [{"layer": layer}]

    def __call__(self, x: Tensor) -> Any:
        return self.inside[0]["layer"](x)


class AsksForTheClass(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.c(self.b(x) if isinstance(self.b, nn.Linear) else x))


class NeedsTheClass(Chain):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.b, nn.Linear):
            raise TypeError("b must be linear")
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ReadsDtype(), r"its weight is read by the model \(ReadsDtype\), outside its own call"),
        (ReadsSize(), r"its in_features is read by the model"),
        (ReadsBias(), r"its bias is read by the model"),
        (TiedInCode(), r"its weight is read by the model"),
        (TiedInAList(), r"its weight is used by the model \(TiedInAList\)"),
        (ReachedOtherwise(Called), r"called by the model \(ReachedOtherwise\) in another way"),
        (ReachedOtherwise(lambda b: lambda x: b(x)), r"in another way than by its path"),
        (ReachedOtherwise(functools.partial), r"in another way than by its path"),
        (AsksForTheClass(), r"not called if it is of another class"),
        (NeedsTheClass(), r"the model fails with another module instead \(TypeError: b must be"),
    ],
)
def test_a_layer_that_is_needed_in_its_place_stays_dense(model: nn.Module, reason: str) -> None:
    if isinstance(model, ReachedOtherwise) and isinstance(model.held, functools.partial):
        model.held = functools.partial(model.b)
    outputs, names = model(X), dict(model.named_modules())
    space = compile_space(model, X)
    assert list(space.layers) == ["a", "c"]
    found = {skipped.name: skipped.reason for skipped in space.skipped}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found["b"])
    assert dict(model.named_modules()) == names and torch.equal(model(X), outputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Harmless(Chain):
    """Reads that a replaced layer allows, and calls inside a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype).to(next(self.b.parameters()).device)
        x = checkpoint(self.a, x, use_reentrant=False)  # type: ignore[no-untyped-call]
        x = checkpoint(self.b, x, use_reentrant=True)  # type: ignore[no-untyped-call]
        y: Tensor = self.head(self.c(x))
        return y


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_types_of_parameters_and_checkpoints_need_no_layer_in_place() -> None:
    assert list(compile_space(Harmless(), X).layers) == ["a", "b", "c"]


def test_the_reason_names_the_module_that_reads() -> None:
    class Reader(nn.Module):
        def __init__(self, other: nn.Linear) -> None:
            super().__init__()
            self.others = [other]

        def forward(self, x: Tensor) -> Tensor:
            return x.to(self.others[0].weight.device) @ self.others[0].weight

    chain = Chain()
    model = nn.Sequential(chain, Reader(chain.b), nn.Linear(32, 32))
    skipped = {s.name: s.reason for s in compile_space(model, X).skipped}
    assert skipped["0.b"] == "its weight is used by '1' (Reader), outside its own call"
