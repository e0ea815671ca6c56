from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import small, split
from torch import nn

import rankNAS
from rankNAS.compression.factorisation import factorise
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.compiler import compile_space, count_macs
from rankNAS.search_spaces.wrappers import unwrapped

X = torch.zeros(1, 3, 8, 8)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_inside(model: nn.Module) -> nn.Module:
    return nn.Sequential(compiled(model), nn.Linear(4, 4))


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (compiled, ""),
        (nn.DataParallel, ""),
        (lambda model: nn.DataParallel(compiled(model)), ""),
        (compiled_inside, "0."),
        (compiled_in_place, ""),
    ],
)
def test_wrappers_leave_no_trace_in_names_or_networks(wrap: Any, prefix: str) -> None:
    model = wrap(small())
    space = compile_space(model, X)
    assert list(space.layers)[:2] == [f"{prefix}conv2", f"{prefix}linear"]
    factorisation = factorise(model, space)
    network = factorisation.materialise({n: x.choices[-1] for n, x in space.layers.items()})
    assert not any("_orig_mod" in name or "module." in name for name in network.state_dict())
    assert not any(module._compiled_call_impl for module in network.modules())
    assert network(X).shape == (1, 4)
    assert count_macs(model, X) == space.dense_cost.macs


def test_an_unwrapped_copy_shares_its_parameters() -> None:
    model = small()
    wrapped = compiled_inside(model)
    inner: Any = unwrapped(wrapped)
    assert inner[0].conv1.weight is model.conv1.weight and inner is not wrapped
    assert unwrapped(model) is model


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (X,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.jit.trace(model, X), "is a TorchScript program"),
        (exported, r"\(ExportedProgram\) is an exported program"),
        (lambda model: exported(model).module(), r"\(GraphModule\) is an exported program"),
        (lambda model: nn.Sequential(nn.LazyConv2d(8, 3)), "'0' is a LazyConv2d that has not run"),
        (lambda model: model.forward, r"\(method\) is no nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_layers_is_refused_by_name(make: Any, message: str) -> None:
    model = make(small())
    with pytest.raises(UsageError, match=message) as found:
        compile_space(model, X)
    assert "\n" not in str(found.value)


def test_a_part_that_is_sharded_is_refused_by_its_path() -> None:
    model, part = nn.Sequential(small()), small()

    class FullyShardedDataParallel(nn.Module):
        """Another class of this name: a real one needs processes."""

    part.linear = FullyShardedDataParallel()
    model.append(part)
    with pytest.raises(UsageError, match=r"layer '1\.linear' is sharded over processes \(FSDP\)"):
        compile_space(model, X)


def test_a_model_without_values_is_refused_before_the_search() -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(UsageError, match=r"parameter 'conv1.weight' is on the meta device"):
        rankNAS.search(model, split(), budget={"macs": 0.5})
    assert compile_space(model, X.to("meta")).layers


def test_data_of_another_type_than_the_weights_say_so() -> None:
    with pytest.raises(UsageError, match="inputs are float32 and the weights float16: convert"):
        compile_space(small().half(), X)
    with pytest.raises(rankNAS.RankNASError, match="inputs are float32 and the weights float16"):
        rankNAS.search(small().half(), split(), budget={"macs": 0.5})
