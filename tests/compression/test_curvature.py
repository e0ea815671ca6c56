"""Second-order losses of choices: against per-sample gradients, closed forms and divergences."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankNAS.allocation import DENSE, Choice
from rankNAS.compression import curvature
from rankNAS.compression.calibration import calibrate
from rankNAS.compression.curvature import by_sample, second_order_losses
from rankNAS.compression.factorisation import Factorisation, factorise
from rankNAS.data.samples import Samples
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.tasks.layout import Layout
from rankNAS.tasks.matching import Matching

TASK = Matching(by="kl", layout=Layout())


class Net(nn.Module):
    """Convolutions with one and with several groups, a layer that is called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, stride=2, groups=2)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x).tanh()).tanh().flatten(2).mT
        return self.head(self.twice(self.twice(x).tanh()).mean(1))


def factors(model: nn.Module, x: Tensor, **options: object) -> Factorisation:
    space = compile_space(model, x[:1], keep_output_dense=False, min_weights=1)
    return factorise(model, space, **options)  # type: ignore[arg-type]


def sampled(logits: Tensor) -> Tensor:
    """Labels drawn from the model's probabilities by inversion, as documented by the seed."""
    uniform = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(0))
    return (logits.detach().softmax(1).cumsum(1) < uniform).sum(1).clamp_max(2)


def brute_force(found: Factorisation, x: Tensor) -> dict[str, list[float]]:
    """Half the mean square of <D, gradient>, sample by sample, from autograd."""
    model, labels = found.model, sampled(found.model(x))
    total = {name: [0.0] * len(layer.choices) for name, layer in found.space.layers.items()}
    for one, label in zip(x, labels, strict=True):
        loss = nn.functional.cross_entropy(model(one[None]), label[None])
        weights = [model.get_submodule(name).weight for name in found.space.layers]
        for name, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            layer = found.layers[name]
            W = layer.folded(DENSE)[0]
            for i, choice in enumerate(layer.layer.choices):
                D = W - layer.folded(choice)[0]
                total[name][i] += 0.5 * float((D * gradient).sum()) ** 2 / len(x)
    return total


def test_losses_are_those_of_the_gradients_of_single_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(7, 2, 7, 7)
    found = factors(model, x, centred=False)
    expected = brute_force(found, x)
    for elements, direct in ((1 << 24, 0), (200, 0), (1 << 24, 99), (200, 99)):
        monkeypatch.setattr(curvature, "PATCHES", elements)  # all samples at once; one by one
        monkeypatch.setattr(curvature, "DIRECT", direct)  # by gradients of samples, or without
        losses = second_order_losses(found, Samples.of(x), TASK)
        assert list(losses) == ["conv", "grouped", "twice", "head"]
        for name in losses:
            assert losses[name][0] == 0
            assert losses[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-9)
            assert max(losses[name]) > 0


def test_the_loss_of_the_output_layer_is_the_curvature_of_its_divergence() -> None:
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(12, 3)).eval(), torch.randn(4000, 12)
    found = factors(model, x, centred=False)
    losses = second_order_losses(found, Samples.of(x), TASK, batch_size=1000)["0"]
    layer = found.layers["0"]
    p = model(x).softmax(1)
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    for choice, loss in zip(layer.layer.choices, losses, strict=True):
        z = x @ (layer.folded(DENSE)[0] - layer.folded(choice)[0]).T
        exact = 0.5 * torch.einsum("no,nop,np->n", z, H, z).mean().item()
        assert loss == pytest.approx(exact, rel=0.15, abs=1e-9)


def test_the_mean_of_an_error_that_a_bias_corrects_does_no_harm() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    x = torch.ones(50, 6) + 1e-3 * torch.randn(50, 6)  # inputs that are all but constant
    space = compile_space(model, x[:1], keep_output_dense=False, min_weights=1)
    statistics = calibrate(model, space, x, TASK)
    losses = {}
    for centred in (False, True):
        found = factorise(model, space, statistics, norm="input", centred=centred)
        kept = Factorisation(model, space, found.layers)
        losses[centred] = second_order_losses(kept, Samples.of(x), TASK)["0"]
    one = space.layers["0"].choices.index(Choice("svd", (1,)))
    assert 0 < losses[True][one] < 1e-3
    shifted = found.layers["0"].folded(Choice("svd", (1,)))[0] - model[0].weight.detach()
    assert float((shifted @ x.mean(0)).norm()) > 0.1  # without the correction it does


def test_a_batch_norm_gives_outputs_their_variance_back() -> None:
    """A choice that only scales each output changes nothing behind a batch norm."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    x = torch.randn(64, 4, 2, 2)
    found = factors(model, x)
    layer = found.layers["0"]
    W = layer.weight.float().flatten(2)
    C = torch.eye(4)[None]
    torch.testing.assert_close(curvature._rescaled(0.1 * W, W, C), W)
    assert curvature._rescaled(0 * W, W, C).abs().max() == 0
    statistics = calibrate(model, found.space, x, TASK)
    plain, corrected = (
        second_order_losses(found, Samples.of(x), TASK, given)["0"] for given in (None, statistics)
    )
    assert plain[0] == corrected[0] == 0
    assert sum(corrected) != pytest.approx(sum(plain), rel=1e-3)
    linear = [second_order_losses(found, Samples.of(x), TASK, g)["3"] for g in (None, statistics)]
    assert linear[0] == linear[1]  # no batch norm follows it


def test_both_orders_of_the_products_agree_on_centred_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(6)
    model, x = Net().eval(), torch.randn(9, 2, 7, 7)
    found = factors(model, x, centred=True)
    both = []
    for direct in (0, 99):
        monkeypatch.setattr(curvature, "DIRECT", direct)
        both.append(second_order_losses(found, Samples.of(x), TASK))
    for name, losses in both[0].items():
        assert losses == pytest.approx(both[1][name], rel=1e-4, abs=1e-12)


def test_few_measured_choices_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model, x = (
        nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)).eval(),
        torch.randn(200, 40),
    )
    found = factors(model, x, centred=False)
    every = second_order_losses(found, Samples.of(x), TASK)["0"]
    monkeypatch.setattr(curvature, "CHANGES", 1)
    few = second_order_losses(found, Samples.of(x), TASK)["0"]
    assert len(every) > 2 * curvature.FEWEST
    equal = sum(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(every, few, strict=True))
    assert curvature.FEWEST <= equal < len(every)
    for a, b in zip(every[1:], few[1:], strict=True):
        assert a / 3 < b < 3 * a


def test_samples_lie_along_the_axis_that_has_their_number() -> None:
    x = torch.randn(5, 3, 2)
    assert torch.equal(by_sample(x, 5), x)
    assert torch.equal(by_sample(x.transpose(0, 1), 5), x)
    assert torch.equal(by_sample(x.reshape(15, 2), 5), x)
    assert torch.equal(by_sample(x[:, 0], 5), x[:, :1])
    assert by_sample(x[:, 0], 4).shape == (5, 1, 2)  # each row for itself
    assert by_sample(x[0, 0], 5).shape == (1, 2)


def test_the_model_is_left_as_it_was_and_equal_seeds_agree() -> None:
    torch.manual_seed(5)
    model, x = Net().eval(), torch.randn(6, 2, 7, 7)
    found = factors(model, x, centred=False)
    before = model(x)
    first = second_order_losses(found, Samples.of(x), TASK, seed=3)
    assert first == second_order_losses(found, Samples.of(x), TASK, seed=3)
    assert first != second_order_losses(found, Samples.of(x), TASK, seed=4)
    assert torch.equal(model(x), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_losses_are_cached_by_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 2, 6, 6)
    model, passes = Net().eval(), list[int]()
    found = factors(model, x)

    def losses(found: Factorisation = found, x: Tensor = x, **options: int) -> dict[str, Any]:
        def on_batch(done: int, total: int) -> None:
            passes.append(done)

        options = {"cache": tmp_path, "on_batch": on_batch, **options}  # type: ignore[dict-item]
        return second_order_losses(found, Samples.of(x), TASK, **options)  # type: ignore[arg-type]

    first = second_order_losses(found, Samples.of(x), TASK)
    assert losses() == first == losses() and passes == [1]
    losses(seed=1)
    losses(x=x[:4])
    losses(batch_size=4)
    assert len(passes) == 1 + 1 + 1 + 2 and len(list(tmp_path.iterdir())) == 4
    layers = found.space.layers
    fewer = found.space.restrict({name: layer.choices[:2] for name, layer in layers.items()})
    assert all(len(few) <= 2 for few in losses(factorise(model, fewer)).values())
    assert len(passes) == 6
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert losses() == first and len(passes) == 7
    assert "made again" in caplog.text
