"""Recipe ``fast``: gradients in closed form, parts one by one, and the limit of seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipe_jobs import classification, generator, language, regression, same, state
from torch import Tensor, nn
from torch.nn import functional

from rankNAS.deadline import Deadline, limited_by
from rankNAS.decompositions.shapes import GroupedLinear
from rankNAS.exceptions import UsageError
from rankNAS.recovery.fast import Fast
from rankNAS.recovery.gradients import Centralisation, Sharpness, VirtualStep
from rankNAS.recovery.loop import Loop
from rankNAS.recovery.recipe import make_recipe
from rankNAS.recovery.recover import run_recipe

SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 16, "learning_rate": 0.02, "speed": "plain"}
Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
    )


def batch(count: int = 8) -> Batch:
    x = torch.randn(count, 3, 4, 4, generator=generator(1))
    return x, torch.randint(4, (count,), generator=generator(2))


def computing(model: nn.Module) -> Callable[[Batch, Any], float]:
    """What the loop does with a batch."""

    def compute(given: Batch, place: Any) -> float:
        loss = functional.cross_entropy(model(given[0]), given[1])
        model.zero_grad()
        loss.backward()
        return loss.item()

    return compute


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


# ------------------------------------------------------------------------------- centralisation


def test_centralised_gradients_have_the_mean_zero_over_the_fan_in() -> None:
    """T: of each output, over inputs and kernel."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 8), GroupedLinear(8, 4, 2)
    )
    model(torch.randn(5, 3, 4, 4)).pow(2).sum().backward()
    before = gradients(model)
    Centralisation(model).before_step(0.1)
    for weight in (model[0].weight, model[2].weight, model[3].weight):
        rows = weight.grad.flatten(0, 1) if weight.dim() == 3 else weight.grad.flatten(1)
        torch.testing.assert_close(rows.sum(1), torch.zeros(len(rows)), atol=1e-4, rtol=0)
    expected = before[2] - before[2].mean(1, keepdim=True)
    torch.testing.assert_close(model[2].weight.grad, expected)
    assert torch.equal(model[2].bias.grad, before[3])
    Centralisation(model).before_step(0.1)  # a projection
    torch.testing.assert_close(model[2].weight.grad, expected)


def test_of_factors_the_first_is_centralised() -> None:
    """The gradient of V in W = U V is U^T times that of W, so both have the mean 0."""
    thin = nn.Sequential(nn.Linear(10, 3, bias=False), nn.Linear(3, 6))
    model = nn.Sequential(thin, nn.Tanh(), nn.Linear(6, 1), nn.Linear(1, 2))
    model(torch.randn(5, 10)).pow(2).sum().backward()
    before = gradients(model)
    Centralisation(model).before_step(0.1)
    first, second, _, _, _, single, _ = gradients(model)
    torch.testing.assert_close(first.sum(1), torch.zeros(3), atol=1e-4, rtol=0)
    assert torch.equal(second, before[1])
    assert torch.equal(single, before[5])  # of one input, the mean is all


def test_frozen_weights_have_no_gradient_to_centralise() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    computing(model)(batch(), None)
    Centralisation(model).before_step(0.1)
    assert model[0].weight.grad is None


# ------------------------------------------------------------------------------------------ SAM


def test_sam_takes_the_gradients_at_a_distance_along_the_gradient() -> None:
    """T: at w + radius g / |g|, with the norm over all weights; w returns to the bit."""
    model, other = network(), network()
    part = Sharpness(model, 0.05, every=2)
    part.begin_epoch(0)
    compute = computing(model)
    assert part.gradients(compute, 0.1) is compute and part.passes(0) == 1
    part.begin_epoch(1)
    before = [p.detach().clone() for p in model.parameters()]
    value = part.gradients(compute, 0.1)(batch(), None)
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    assert part.passes(1) == 2

    assert computing(other)(batch(), None) == value
    norm = torch.cat([g.flatten() for g in gradients(other)]).norm()
    statistics = {name: b.clone() for name, b in other.named_buffers()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(parameter.grad, alpha=0.05 / float(norm))
    computing(other)(batch(), None)
    for own, wanted in zip(gradients(model), gradients(other), strict=True):
        torch.testing.assert_close(own, wanted)
    for name in ("1.running_mean", "1.running_var"):  # those of the first pass
        assert torch.equal(dict(model.named_buffers())[name], statistics[name])
    assert model[1].momentum == 0.1


def test_sam_returns_to_the_weights_at_rate_0() -> None:
    """T: a step of the optimiser at learning rate 0 leaves every weight."""
    model = network()
    part = Sharpness(model, 0.05, every=1)
    part.begin_epoch(0)
    before = [p.detach().clone() for p in model.parameters()]
    part.gradients(computing(model), 0.0)(batch(), None)
    torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True).step()
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


def test_weights_return_after_an_error() -> None:
    model = network()
    part = Sharpness(model, 0.05, every=1)
    part.begin_epoch(0)
    before, passes = state(model), list[int]()

    def compute(given: Batch, place: Any) -> float:
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return computing(model)(given, place)

    with pytest.raises(KeyboardInterrupt):
        part.gradients(compute, 0.1)(batch(), None)
    after = state(model)
    for name, _ in model.named_parameters():
        assert torch.equal(before[name], after[name])
    assert model[1].momentum == 0.1


# -------------------------------------------------------------------------------- virtual step


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_virtual_step_comes_before_the_gradients_of_the_other_half(clip: float | None) -> None:
    model, other = network(), network()
    before = [p.detach().clone() for p in model.parameters()]
    value = VirtualStep(model, clip).gradients(computing(model), 0.3)(batch(), None)
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    x, y = batch()
    first = computing(other)((x[:4], y[:4]), None)
    if clip is not None:
        nn.utils.clip_grad_norm_(other.parameters(), clip)
    torch.optim.SGD(other.parameters(), lr=0.3).step()
    second = computing(other)((x[4:], y[4:]), None)
    assert value == pytest.approx((first + second) / 2)
    for own, wanted in zip(gradients(model), gradients(other), strict=True):
        torch.testing.assert_close(own, wanted)


def test_a_small_batch_stays_whole() -> None:
    model, other = network(), network()
    value = VirtualStep(model, None).gradients(computing(model), 0.3)(batch(3), None)
    assert value == computing(other)(batch(3), None)
    assert all(map(torch.equal, gradients(model), gradients(other)))


# ----------------------------------------------------------------------------------- the recipe


PARTS = {
    "label_smoothing": 0.0,
    "centralise": False,
    "sam": 0.0,
    "virtual": False,
    "ema": 0.0,
    "decay": 0.0,
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_left_out(part: str) -> None:
    found = []
    for options in ({}, {part: PARTS[part]}):
        job = classification()
        run_recipe(Fast(**SHORT, sam_every=2, **options), job)
        found.append(state(job.network))
    assert not same(*found)


def test_without_its_parts_it_is_distil_without_distillation() -> None:
    job, other = classification(), classification()
    bare = {name: value for name, value in PARTS.items() if name not in ("ema", "decay")}
    run_recipe(Fast(**SHORT, ema=0.998, seconds=None, **bare), job)
    run_recipe(make_recipe("distil:epochs=3,batch=16,lr=0.02,speed=plain,distill=0"), other)
    assert same(state(job.network), state(other.network))


def test_smoothed_labels() -> None:
    """(1 - s) times the label's cross entropy and s times the mean of all classes'."""
    job = classification()
    given = job.data.example(16)
    recipe = Fast(label_smoothing=0.2)
    with recipe.prepared(job) as setup, torch.no_grad():
        prediction = job.task.run(job.network.eval(), given)
        found = setup.loss(given, prediction, None)
        logs = functional.log_softmax(job.network(given[0]), 1)
    picked = logs[torch.arange(16), given[1]]
    torch.testing.assert_close(found, -(0.8 * picked + 0.2 * logs.mean(1)).mean())


def test_language_models_have_no_smoothed_labels() -> None:
    assert Fast().smoothing(language()) == 0 and Fast().smoothing(classification()) == 0.1


def test_it_learns_from_the_dense_network_too() -> None:
    job = classification()
    dense = state(job.dense)
    run_recipe(Fast(**SHORT, distill=0.9, sam_every=2), job)
    assert same(dense, state(job.dense))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast:label_smoothing=1", "label_smoothing is 1.0"),
        ("fast:sam=-1", "sam is -1.0"),
        ("fast:sam_every=0", "sam_every is 0"),
    ],
)
def test_bad_options(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_recipe(text)


# ----------------------------------------------------------------------------------- the limit


def test_the_schedule_counts_the_steps_that_take_twice_the_time() -> None:
    """Of three epochs of six steps, the third takes twice the time: 24 passes."""
    job = regression()
    recipe = Fast(epochs=10**4, batch_size=16, sam_every=3)
    loop = Loop(
        job.network,
        job.data,
        job.task,
        recipe.config(job),
        lambda batch, prediction, place: prediction.loss(),
        [Sharpness(job.network, 0.05, 3)],
    )
    assert loop.epochs.total(1) == 6
    assert [loop._affordable(passes * 0.5, 0.5) for passes in (6, 12, 14, 24, 25, 48)] == [
        *(6, 12, 13, 18, 19, 36)
    ]
    loop.step = 13
    assert loop._affordable(11 * 0.5, 0.5) == 13 + 5 + 1 and loop._affordable(0.0, 0.5) == 13
    assert loop._affordable(1e9, 0.5) == 6 * 10**4


def test_judging_takes_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second and judging two, of which forty must have passed."""
    now, began = [0.0], list[float]()

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def judged(self: Loop) -> float:
        began.append(now[0])
        now[0] += 2.0
        return 1.0

    def on_step(step: int, total: int, loss: float) -> None:
        now[0] += 1.0

    monkeypatch.setattr("rankNAS.recovery.loop.time", Time)
    monkeypatch.setattr(Loop, "judged", judged)
    with limited_by(Deadline(1e6)):
        run_recipe(
            make_recipe("plain:epochs=40,batch=16,distill=0"), regression(), on_step=on_step
        )
    gaps = [b - a - 2.0 for a, b in zip(began, began[1:], strict=False)]
    assert len(gaps) > 3 and 40.0 <= min(gaps) and max(gaps) < 48.0


def test_the_seconds_are_kept() -> None:
    job = copy.deepcopy(regression())
    report = run_recipe(Fast(epochs=10**5, batch_size=16, seconds=2.0, speed="plain"), job)
    assert 0.2 < report.seconds < 6 and report.planned < 6 * 10**5
