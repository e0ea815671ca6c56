from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from mixed_net import Mixed, assert_close, drawn, fold_in, mixed
from torch import nn

from rankNAS.allocation import DENSE, Allocation, Choice
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.factorisation import factorise, skeleton
from rankNAS.compression.factors import _moment
from rankNAS.compression.surgery import changeable_copy
from rankNAS.decompositions import OPERATORS, ErrorNorm, Target
from rankNAS.exceptions import UsageError
from rankNAS.search_spaces.attention import separate_attention
from rankNAS.search_spaces.base import Layer, SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.solver.pareto import pareto_filter, pareto_screen


@pytest.mark.parametrize("norm", ["weight", "input", "fisher", "pooled"])
def test_networks_equal_the_model_with_folded_weights(norm: Any) -> None:
    model, space, x = mixed()
    factorisation = factorise(model, space, calibrate(model, space, x, norm=norm), norm=norm)
    for seed in range(6):
        allocation = drawn(space, seed)
        network = factorisation.materialise(allocation)
        assert_close(network(x), fold_in(factorisation, allocation)(x))
        params = sum(p.numel() for p in network.parameters())
        assert params == space.cost(allocation).params


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_on_every_layer(operator: str) -> None:
    model, space, x = mixed()
    factorisation = factorise(model, space, calibrate(model, space, x), norm="fisher")
    used = 0
    for name, layer in space.layers.items():
        choices = [c for c in layer if c.operator == operator]
        if not choices:
            continue
        used += 1
        for choice in (choices[0], choices[len(choices) // 2], choices[-1]):
            allocation = {**space.dense, name: choice}
            network = factorisation.materialise(allocation)
            assert_close(network(x), fold_in(factorisation, allocation)(x))
            assert not torch.allclose(network(x), model(x))
    assert used >= 2


def test_errors_are_those_of_the_folded_weights() -> None:
    model, space, _ = mixed()
    factorisation = factorise(model, space)
    errors = factorisation.errors()
    for name, layer in space.layers.items():
        weight = model.get_submodule(name).weight.double()
        for choice, error in zip(layer, errors[name], strict=True):
            W, _ = factorisation.layers[name].folded(choice)
            relative = ((W.double() - weight).square().sum() / weight.square().sum()).item()
            assert error == pytest.approx(relative, abs=1e-6)
        assert errors[name][0] == 0


def test_dense_is_the_model() -> None:
    model, space, x = mixed()
    network = factorise(model, space).materialise(space.dense)
    assert network is not model and torch.equal(network(x), model(x))
    assert list(network.state_dict()) == list(model.state_dict())
    for name in space.layers:
        weight, bias = factorise(model, space).layers[name].folded(DENSE)
        module = model.get_submodule(name)
        assert torch.equal(weight, module.weight)
        assert bias is None or torch.equal(bias, module.bias)


def test_tied_layers_stay_tied() -> None:
    model, space, x = mixed()
    assert space.layers["shared"].paths == ("shared", "again", "tied")
    allocation = {**space.dense, "shared": Choice("svd", (3,))}
    network = factorise(model, space).materialise(allocation)
    assert network.shared is network.again is network.tied
    assert [type(m).__name__ for m in network.shared] == ["Linear", "Linear"]
    empty = skeleton(mixed()[0], allocation)
    assert empty.shared is empty.again is empty.tied
    dense = factorise(model, space).materialise(space.dense)
    assert dense.shared is dense.again and dense.tied.weight is dense.shared.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_a_network_changes_nothing_else(dtype: torch.dtype) -> None:
    model, space, x = mixed()
    model, x = model.to(dtype), x.to(dtype)
    space = compile_space(model, x[:1], min_weights=1)
    factorisation = factorise(model, space)
    reference = [model(x)]
    allocation = drawn(space, 1)
    first = factorisation.materialise(allocation)
    before = first(x)
    for trained in (first, factorisation.materialise(space.dense)):
        trained.train()
        trained(x).sum().backward()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1)
    assert torch.equal(model(x), reference[0])
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(factorisation.materialise(allocation)(x), before)
    assert not torch.allclose(first.eval()(x), before)
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    for network in (first, trained):
        assert not pointers & {t.data_ptr() for t in network.state_dict().values()}


def test_double_precision_is_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16)).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    space = compile_space(model, x, min_weights=1, keep_output_dense=False)
    factorisation = factorise(model, space)
    allocation = {name: layer.choices[1] for name, layer in space.layers.items()}
    network = factorisation.materialise(allocation)
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    expected = fold_in(factorisation, allocation)(x)
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16)).bfloat16()
    x = torch.randn(5, 16).bfloat16()
    space = compile_space(model, x, min_weights=1, keep_output_dense=False)
    network = factorise(model, space).materialise(drawn(space, 0))
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network(x).dtype == torch.bfloat16


def test_a_skeleton_takes_the_weights_of_a_network() -> None:
    model, space, x = mixed()
    factorisation = factorise(model, space)
    for seed in range(3):
        allocation = drawn(space, seed)
        network = factorisation.materialise(allocation)
        for empty in (skeleton(Mixed(), allocation), _on_meta(allocation)):
            assert list(empty.state_dict()) == list(network.state_dict())
            empty.load_state_dict(network.state_dict(), assign=True)
            assert torch.equal(empty.eval()(x), network(x))


def _on_meta(allocation: Allocation) -> nn.Module:
    with torch.device("meta"):
        return skeleton(Mixed(), allocation)


def test_attention_is_decomposed_and_takes_its_weights_back() -> None:
    torch.manual_seed(0)

    def build() -> nn.Module:
        return nn.Sequential(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)).eval()

    model, x = build(), torch.randn(3, 5, 16)
    space = compile_space(model, x, min_weights=1)
    factorisation = factorise(model, space)
    allocation = drawn(space, 0)
    network = factorisation.materialise(allocation)
    assert_close(network(x), fold_in(factorisation, allocation)(x))
    torch.testing.assert_close(factorisation.materialise(space.dense)(x), model(x))
    empty = skeleton(build(), allocation)
    empty.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(empty(x), network(x))
    assert isinstance(model[0].self_attn, nn.MultiheadAttention)


def test_hugging_face_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(24, 16), nn.ReLU(), conv1d(8, 24))
    with torch.no_grad():
        model[0].weight.normal_()
    x = torch.randn(4, 3, 16)
    space = compile_space(model, x, min_weights=1, keep_output_dense=False)
    statistics = calibrate(model, space, x, norm="input")
    factorisation = factorise(model, space, statistics, norm="input")
    for seed in range(4):
        allocation = drawn(space, seed)
        network = factorisation.materialise(allocation)
        assert_close(network(x), fold_in(factorisation, allocation)(x))
        empty = skeleton(copy.deepcopy(model), allocation)
        empty.load_state_dict(network.state_dict(), assign=True)
        assert torch.equal(empty(x), network(x))
    monkeypatch.setattr("rankNAS.compression.surgery.LIGHT", 0)
    heavy = changeable_copy(model, factorisation.layers)
    for name, choice in allocation.items():
        factorisation.layers[name].write(heavy, choice)
    assert torch.equal(heavy(x), fold_in(factorisation, allocation)(x))


def test_allocations_of_other_models() -> None:
    model, space, _ = mixed()
    factorisation = factorise(model, space)
    with pytest.raises(UsageError, match="no layer 'other'"):
        factorisation.materialise({**space.dense, "other": DENSE})
    with pytest.raises(UsageError, match="no choice for layer"):
        factorisation.materialise({})
    with pytest.raises(UsageError, match="has no choice 'svd:77'"):
        factorisation.materialise({**space.dense, "head": Choice("svd", (77,))})
    with pytest.raises(UsageError, match="no layer 'other'; is it another model"):
        skeleton(Mixed(), {"other": Choice("svd", (3,))})
    with pytest.raises(UsageError, match="'head' needs the unknown operator 'cp'"):
        skeleton(Mixed(), {"head": Choice("cp", (3,))})


def test_which_layers_are_centred_by_default() -> None:
    def means(model: nn.Module, shape: tuple[int, ...], **options: Any) -> list[bool]:
        x = torch.randn(9, *shape)
        space = compile_space(model.eval(), x, min_weights=1, keep_output_dense=False)
        statistics = calibrate(model, space, x, norm="input")
        layers = factorise(model, space, statistics, norm="input", **options).layers
        return [layer.norm.mean is not None for layer in layers.values()]

    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12, bias=False))

    assert means(plain(), (12,)) == [True, False]
    assert means(plain().append(nn.BatchNorm1d(12)), (12,)) == [True, True]
    assert means(plain(), (12,), centred=False) == [False, False]
    assert means(plain(), (12,), centred=True) == [True, True]


def test_progress_and_missing_statistics() -> None:
    model, space, _ = mixed()
    seen: list[tuple[int, int]] = []
    factorise(model, space, on_layer=lambda *done: seen.append(done))
    assert seen == [(i + 1, len(space.layers)) for i in range(len(space.layers))]
    with pytest.raises(UsageError, match="needs calibration statistics"):
        factorise(model, space, norm="fisher")


@pytest.mark.parametrize("build", [skeleton, lambda m, a: factorise(m, _space(m)).materialise(a)])
def test_nested_paths(build: Callable[[nn.Module, Allocation], nn.Module]) -> None:
    block = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(16, 16), nn.ReLU())})
    model = nn.Sequential(nn.Sequential(block["deep"]), block["deep"], nn.Linear(16, 2))
    allocation = Allocation.of({"0.0.0": Choice("svd", (2,))})
    network = build(model, allocation)
    assert network[0][0] is network[1] and isinstance(network[1][0], nn.Sequential)
    assert separate_attention(network) is network


def _space(model: nn.Module) -> SearchSpace:
    return compile_space(model, torch.randn(1, 16), min_weights=1)


@pytest.mark.parametrize("norm", ["weight", "fisher"])
def test_a_screen_spares_factors_and_keeps_the_front(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.Flatten()
    ).append(nn.Linear(24 * 36, 5))
    with torch.no_grad():
        model[2].weight.mul_(torch.arange(1, 17).pow(-1.0).reshape(1, -1, 1, 1))
    x = torch.randn(20, 8, 6, 6)
    space = compile_space(model, x[:1], min_weights=1)
    statistics = calibrate(model, space, x, norm=norm)

    def front(layer: Layer, errors: Sequence[float]) -> list[Choice]:
        kept = pareto_filter(errors, [[cost.macs for cost in layer.costs]], len(errors))
        return [layer.choices[i] for i in kept]

    def screen(layer: Layer, errors: Sequence[float], guesses: Sequence[float]) -> list[Choice]:
        kept = pareto_screen(errors, guesses, [[cost.macs for cost in layer.costs]])
        return [layer.choices[i] for i in kept]

    every = factorise(model, space, statistics, norm=norm, select=front)
    found = factorise(model, space, statistics, norm=norm, select=front, screen=screen)
    for name, layer in every.space.layers.items():
        assert found.space.layers[name].choices == layer.choices
        assert found.errors()[name] == pytest.approx(every.errors()[name], abs=1e-9)
    # Without a selection, what remains shows what was spared.
    screened = factorise(model, space, statistics, norm=norm, screen=screen)
    assert len(screened.space.layers["2"]) < len(space.layers["2"])
    for name, layer in screened.space.layers.items():
        assert all(error < 1 for error in screened.errors()[name])
        screened.layers[name].folded(layer.choices[-1])


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_the_moment_has_the_eigenvalues_of_the_outputs(shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=False).double()
    X = torch.randn(200, inputs, generator=generator, dtype=torch.float64)
    target = Target(
        layer.weight.detach()[None, :, :, None, None], ErrorNorm(C=(X.mT @ X / 200)[None])
    )
    moment = _moment(target)
    assert moment.shape[-1] == min(shape)
    Y = X @ layer.weight.detach().mT
    expected = torch.linalg.eigvalsh(Y.mT @ Y / 200).flip(-1)
    found = torch.linalg.eigvalsh(moment[0]).flip(-1)
    torch.testing.assert_close(found, expected[: len(found)])
    assert target.energy == pytest.approx(float(expected.sum()))
