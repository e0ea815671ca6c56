"""Training on a part of the samples: scores in closed form, the choice, refreshing, resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_jobs import JOBS, classification, language, regression, same, state
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from rankNAS.data.samples import Samples
from rankNAS.exceptions import UsageError
from rankNAS.recovery.distil import Distil
from rankNAS.recovery.importance import SCORES, Outcome, importance
from rankNAS.recovery.loop import Loop
from rankNAS.recovery.recipe import Job, make_recipe
from rankNAS.recovery.recover import run_recipe
from rankNAS.recovery.swiftlearn import Subset, SwiftLearn
from rankNAS.tasks.classification import MultiLabel
from rankNAS.tasks.custom import Custom
from rankNAS.tasks.matching import Matching

COMMON: dict[str, Any] = {"batch_size": 16, "learning_rate": 0.02, "speed": "plain"}
TOP = COMMON | {"draw": "top"}


def scored(job: Job, name: str, batch_size: int = 20) -> Tensor:
    return importance(job.network, job.data, job.task, SCORES[name], batch_size=batch_size)


def outputs(job: Job) -> tuple[Tensor, Tensor]:
    """The network's outputs for all samples, and their targets."""
    batch = job.data.batch()
    with torch.no_grad():
        output = job.task.inputs_of(batch).run(job.network.eval())
    return output, job.task.targets_of(batch)


# -------------------------------------------------------------------------------------- scores


def test_scores_of_classes_in_closed_form() -> None:
    job = classification(50)  # the last batch is smaller
    z, y = outputs(job)
    p = z.softmax(-1)
    torch.testing.assert_close(scored(job, "loss"), -p[torch.arange(50), y].log())
    el2n = (p - functional.one_hot(y, 2)).norm(dim=1)
    torch.testing.assert_close(scored(job, "gradient"), el2n)
    torch.testing.assert_close(scored(job, "entropy"), -(p * p.log()).sum(1))
    torch.testing.assert_close(scored(job, "margin"), 1 - (p[:, 0] - p[:, 1]).abs())


def test_scores_of_numbers_in_closed_form() -> None:
    job = regression(50)
    z, y = outputs(job)
    torch.testing.assert_close(scored(job, "loss"), (z - y).square().mean(1))
    torch.testing.assert_close(scored(job, "gradient"), 2 * (z - y).norm(dim=1) / 3)


def test_scores_of_tokens_are_means_over_those_that_count() -> None:
    job = language()
    z, tokens = outputs(job)
    log_p = z[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(scored(job, "loss"), nll.mean(1))
    entropies = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(scored(job, "entropy"), entropies.mean(1))
    labels = tokens.clone()
    labels[:, 3:] = -100
    labels[0] = -100
    pairs = zip(tokens, labels, strict=True)
    samples = Samples.of([{"input_ids": x, "labels": y} for x, y in pairs])
    task = replace(job.task, layout=None).bound(samples.batch(), Ids(job.network))
    other = Job(Ids(job.network), samples, task)
    expected = nll[:, :2].mean(1)
    expected[0] = 0
    torch.testing.assert_close(scored(other, "loss"), expected)


class Ids(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.network(input_ids)


def test_scores_of_labels_and_of_a_task_of_ones_own() -> None:
    x = torch.randn(9, 4)
    y = (torch.rand(9, 3) < 0.5).float()
    network = nn.Linear(4, 3)
    samples = Samples.of(TensorDataset(x, y))
    batch = samples.batch()
    p = network(x).detach().sigmoid()
    job = Job(network, samples, MultiLabel().bound(batch, network))
    losses = functional.binary_cross_entropy(p, y, reduction="none").mean(1)
    torch.testing.assert_close(scored(job, "loss", 4), losses)
    entropies = -(p * p.log() + (1 - p) * (1 - p).log()).mean(1)
    torch.testing.assert_close(scored(job, "entropy", 4), entropies)
    torch.testing.assert_close(scored(job, "margin", 4), 1 - (2 * p - 1).abs().mean(1))

    def distance(output: Tensor, batch: Any) -> Tensor:
        return (output - batch[1]).abs().mean()

    own = replace(job, task=Custom(loss=distance, metrics={}).bound(batch, network))
    expected = (network(x).detach() - y).abs().mean(1)
    torch.testing.assert_close(scored(own, "loss", 4), expected)


def test_random_scores_need_no_pass_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    job = regression()
    with monkeypatch.context() as patch:
        patch.setattr(type(job.network), "forward", None)
        first, second = (scored(job, "random") for _ in range(2))
    assert torch.equal(first, second) and first.unique().numel() == len(job.data)
    other = importance(job.network, job.data, job.task, SCORES["random"], batch_size=20, seed=1)
    assert not torch.equal(first, other)


def test_samples_of_unequal_shapes_are_scored_in_their_order() -> None:
    job = language()
    items = [torch.arange(2 + n % 3) % 32 for n in range(10)]
    mixed = replace(job, data=Samples.of(items))
    alone = [scored(replace(job, data=Samples.of(item[None])), "loss") for item in items]
    torch.testing.assert_close(scored(mixed, "loss", 4), torch.cat(alone))


# ---------------------------------------------------------------------------------- the choice


def seen_samples(recipe: SwiftLearn, job: Job) -> list[list[int]]:
    """By epoch, the rows that the training has taken."""
    found: list[list[int]] = [[]]
    rows = {tuple(x.flatten().tolist()): n for n, x in enumerate(job.data.batch()[0])}
    original = Loop.loss_of

    def watched(self: Loop, network: nn.Module, batch: Any, *rest: Any) -> Tensor:
        found[-1] += [rows[tuple(x.flatten().tolist())] for x in batch[0]]
        return original(self, network, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "loss_of", watched)
        run_recipe(recipe, job, on_epoch=lambda epoch: found.append([]))
    return found[:-1]


def test_shares_fall_from_all_samples_to_those_kept() -> None:
    recipe = SwiftLearn(keep=0.25, warm_up=2, shrink=2, epochs=6)
    assert [recipe.count(n, 80) for n in range(6)] == [80, 80, 40, 20, 20, 20]
    linear = replace(recipe, schedule="linear", shrink=3)
    assert [recipe.share(0), recipe.share(5)] == [1, 0.25]
    assert [linear.count(n, 80) for n in range(6)] == [80, 80, 60, 40, 20, 20]


def test_an_epoch_has_the_most_important_samples() -> None:
    job = regression(80)
    wanted = torch.rand(80, generator=torch.Generator().manual_seed(3))
    by_input = {
        tuple(x.tolist()): float(w) for x, w in zip(job.data.batch()[0], wanted, strict=True)
    }

    def score(outcome: Outcome) -> Tensor:
        return torch.tensor([by_input[tuple(x.tolist())] for x in outcome.batch[0]])

    recipe = SwiftLearn(
        keep=0.25, warm_up=1, shrink=2, epochs=4, score=score, draw="top", **COMMON
    )
    epochs = seen_samples(recipe, job)
    assert [len(epoch) for epoch in epochs] == [80, 40, 20, 20]
    order = wanted.argsort(descending=True).tolist()
    assert [sorted(epoch) for epoch in epochs] == [sorted(order[:n]) for n in (80, 40, 20, 20)]
    assert epochs[2] != epochs[3]  # in another order


@pytest.mark.parametrize("draw", ["top", "weighted"])
def test_keeping_all_is_training_on_all(draw: Any) -> None:
    first, second = classification(), classification()
    run_recipe(SwiftLearn(keep=1.0, draw=draw, epochs=3, **COMMON), first)
    run_recipe(Distil(augmentations=0, epochs=3, **COMMON), second)
    assert same(state(first.network), state(second.network))


def test_a_sample_returns_when_its_score_rises() -> None:
    """A new scoring is made every second epoch; in the fourth, the order is reversed."""
    job, calls = regression(32), list[int]()

    def score(outcome: Outcome) -> Tensor:
        calls.append(len(outcome))
        rank = torch.arange(16) + 16 * ((len(calls) - 1) % 2)  # two batches a scoring
        return rank.float() * (1 if len(calls) <= 2 else -1)

    recipe = SwiftLearn(
        keep=0.5, warm_up=1, refresh=2, epochs=5, score=score, draw="top", **COMMON
    )
    epochs = [sorted(epoch) for epoch in seen_samples(recipe, job)]
    upper, lower = list(range(16, 32)), list(range(16))
    assert epochs == [lower + upper, upper, upper, lower, lower] and calls == [16] * 4


def test_a_weighted_draw_follows_the_scores() -> None:
    """The first of a draw is a sample with a probability in proportion to its score."""
    job = regression(4)
    recipe = SwiftLearn(keep=0.25, warm_up=0, epochs=9000, refresh=9000, draw="weighted")
    subset = Subset(recipe, job)
    subset.load_state_dict({"scores": torch.tensor([0.1, 0.2, 0.7, 0.0]), "scored": 0})
    counts = torch.zeros(4)
    for epoch in range(4000):
        subset.begin_epoch(epoch)
        counts[subset.chosen()] += 1
    torch.testing.assert_close(
        counts / 4000, torch.tensor([0.1, 0.2, 0.7, 0.0]), atol=0.03, rtol=0
    )


@pytest.mark.parametrize(("score", "draw"), [("random", "top"), ("gradient", "weighted")])
def test_equal_seeds_choose_equal_samples(score: str, draw: Any, tmp_path: Path) -> None:
    recipe = SwiftLearn(keep=0.5, warm_up=1, epochs=3, score=score, draw=draw, **COMMON)
    jobs = [
        replace(regression(), seed=seed, checkpoint=tmp_path / f"{number}.pt")
        for number, seed in enumerate((0, 0, 1))
    ]
    first, second, other = (seen_samples(recipe, job) for job in jobs)
    assert first == second and set(first[1]) != set(other[1])


@pytest.mark.parametrize("kind", JOBS)
def test_resumes_between_two_scorings(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def job(name: str = "run") -> Job:
        return replace(JOBS[kind](), checkpoint=tmp_path / f"{name}.pt")

    recipe = SwiftLearn(
        keep=0.5, warm_up=1, refresh=2, shrink=2, draw="weighted", epochs=6, **COMMON
    )
    whole, steps = job("whole"), list[int]()
    run_recipe(recipe, whole)
    monkeypatch.setattr("rankNAS.recovery.loop.SAVED", -1.0)  # after each step
    places: list[int] = []

    def interrupt(step: int, total: int, loss: float) -> None:
        places[:] = [total]
        if step == total - 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, job(), on_step=interrupt)
    resumed = job()
    run_recipe(recipe, resumed, on_step=lambda step, total, loss: steps.append(step))
    assert steps[0] == places[0] - 4 and same(state(resumed.network), state(whole.network))


def test_the_seconds_of_scoring_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="rankNAS.recovery.swiftlearn")
    run_recipe(SwiftLearn(keep=0.5, warm_up=1, epochs=2, **COMMON), regression())
    (line,) = [r.getMessage() for r in caplog.records if "scored in" in r.getMessage()]
    assert float(line.split()[-5]) >= 0


# ----------------------------------------------------------------------------------- bad input


def test_an_empty_subset() -> None:
    with pytest.raises(UsageError, match=r"keep is 0.001, so the subset of the 96 samples is em"):
        run_recipe(make_recipe("swiftlearn:keep=0.001"), regression())
    job = regression()
    run_recipe(SwiftLearn(keep=0.01, warm_up=0, epochs=2, **COMMON), job)  # a single sample


def test_scores_that_do_not_fit_the_task() -> None:
    for name in ("entropy", "margin"):
        with pytest.raises(UsageError, match=f"'{name}' needs probabilities of classes, but the"):
            run_recipe(SwiftLearn(score=name), regression())
    job = classification()
    images = job.data.batch()[0]
    task = Matching().bound(images, job.network)
    unlabelled = replace(job, data=Samples.of(images), task=task)
    with pytest.raises(
        UsageError, match="'gradient' needs labels, but the task 'matching' has none"
    ):
        run_recipe(SwiftLearn(), unlabelled)
    run_recipe(SwiftLearn(score="random", epochs=3, **COMMON), unlabelled)


@pytest.mark.parametrize(
    ("score", "draw", "message"),
    [
        (lambda outcome: torch.zeros(3), "top", r"each of the 16 samples, but it returns \(3,\)"),
        (lambda outcome: 1.0, "top", "but it returns float"),
        (lambda outcome: torch.full((len(outcome),), torch.nan), "top", "of sample 0 is nan"),
        (lambda outcome: -torch.ones(len(outcome)), "weighted", "a score is -1, but a weighted"),
    ],
)
def test_bad_scores(score: Callable[[Outcome], Any], draw: Any, message: str) -> None:
    recipe = SwiftLearn(score=score, draw=draw, warm_up=1, epochs=2, **COMMON)
    with pytest.raises(UsageError, match=message):
        run_recipe(recipe, regression())


def test_a_choice_without_two_samples_of_one_shape() -> None:
    job = language()
    data = Samples.of([torch.arange(2 + n) % 32 for n in range(6)] * 2)

    def score(outcome: Outcome) -> Tensor:
        return torch.tensor([float(len(seen.append(0) or seen) <= 6)])

    seen: list[Any] = []
    recipe = SwiftLearn(
        score=score, draw="top", keep=0.5, warm_up=0, epochs=2, distill=0.0, **COMMON
    )
    with pytest.raises(UsageError, match="no batch of epoch 1 has two samples, because their sh"):
        run_recipe(recipe, replace(job, data=data))


def test_a_score_of_ones_own_is_named_by_its_place() -> None:
    assert str(SwiftLearn(score=named)).endswith("score=test_swiftlearn:named")


def named(outcome: Outcome) -> Tensor:
    return torch.ones(len(outcome))
