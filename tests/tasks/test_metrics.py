"""The metrics of all predictions against direct formulas, torch.distributions and scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, r2_score
from torch import Tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import kl_divergence
from torch.nn import functional

from rankNAS.tasks import Classification, MultiLabel, Regression, Segmentation
from rankNAS.tasks.base import Sums, Task, added
from rankNAS.tasks.binary import Bernoulli
from rankNAS.tasks.categorical import Categorical, TopClasses
from rankNAS.tasks.language import CausalLanguageModelling, MaskedLanguageModelling
from rankNAS.tasks.layout import Layout
from rankNAS.tasks.matching import Matching

XY = Layout((0,), 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def metrics(
    task: Task, output: Tensor, y: Tensor, dense: Tensor | None = None
) -> dict[str, float]:
    return task.finish(streamed(task, output, y, dense, [len(y)]))


def streamed(
    task: Task, output: Tensor, y: Tensor, dense: Tensor | None, sizes: list[int]
) -> Sums:
    """The sums over consecutive batches of some sizes."""
    sums: Sums = {}
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        batch = (y[rows], y[rows])
        reference = None if dense is None else task.predict(dense[rows], batch)
        sums = added(sums, task.predict(output[rows], batch).sums(reference))
        start += size
    return sums


def test_classification() -> None:
    z, dense, y = normal(40, 5), normal(40, 5, seed=2), classes(5, 40)
    found = metrics(Classification(layout=XY), z, y, dense)
    p, q = CategoricalDistribution(logits=dense), CategoricalDistribution(logits=z)
    assert found == pytest.approx(
        {
            "accuracy": accuracy_score(y, z.argmax(1)),
            "loss": float(functional.cross_entropy(z, y)),
            "kl_divergence": float(kl_divergence(p, q).mean()),
            "reverse_kl": float(kl_divergence(q, p).mean()),
        }
    )


@pytest.mark.parametrize("form", ["column", "int32", "float", "uint8"])
def test_class_numbers_of_any_type_are_the_same(form: str) -> None:
    z, y = normal(12, 3), classes(3, 12)
    given_as = {"column": y[:, None], "int32": y.int(), "float": y.double(), "uint8": y.byte()}
    task = Classification(layout=XY)
    assert metrics(task, z, given_as[form]) == metrics(task, z, y)


def test_class_weights_are_those_of_torch() -> None:
    z, y, weights = normal(30, 3), classes(3, 30), (0.2, 1.0, 3.0)
    y[4] = -100
    task = Classification(layout=XY, weights=weights)
    expected = functional.cross_entropy(z, y, weight=torch.tensor(weights).double())
    assert metrics(task, z, y)["loss"] == pytest.approx(float(expected))
    assert float(task.predict(z, (y, y)).loss()) == pytest.approx(float(expected))


@pytest.mark.parametrize("shape", [(20,), (20, 1)])
@pytest.mark.parametrize("weights", [None, (0.5, 3.0)])
def test_one_logit_is_two_classes(
    shape: tuple[int, ...], weights: tuple[float, ...] | None
) -> None:
    z, dense, y = normal(20), normal(20, seed=3), classes(2, 20)
    y[:3] = -100
    two, dense_two = (torch.stack([torch.zeros_like(x), x], 1) for x in (z, dense))
    task = Classification(layout=XY, weights=weights)
    expected = metrics(task, two, y, dense_two)
    for targets in (y, y[:, None], y.double()):
        assert metrics(task, z.reshape(shape), targets, dense.reshape(shape)) == expected
    if weights is None:
        plain = functional.binary_cross_entropy_with_logits(z[3:], y[3:].double())
        assert expected["loss"] == pytest.approx(float(plain))
    assert expected["accuracy"] == pytest.approx(float(((z > 0) == (y > 0))[3:].double().mean()))


def test_several_labels() -> None:
    z, dense, y = normal(30, 4), normal(30, 4, seed=2), classes(2, 30, 4)
    found = metrics(MultiLabel(layout=XY), z, y, dense)
    p, q = BernoulliDistribution(logits=dense), BernoulliDistribution(logits=z)
    assert found == pytest.approx(
        {
            "f1": f1_score(y, z > 0, average="micro"),
            "accuracy": float(((z > 0) == (y > 0)).double().mean()),
            "loss": float(functional.binary_cross_entropy_with_logits(z, y.double())),
            "kl_divergence": float(kl_divergence(p, q).sum(1).mean()),
            "reverse_kl": float(kl_divergence(q, p).sum(1).mean()),
        }
    )
    for same in (y.bool(), y.int(), y.float()):
        assert metrics(MultiLabel(layout=XY), z, same, dense) == found


def test_ignored_labels_change_nothing() -> None:
    z, dense, y = normal(9, 3), normal(9, 3, seed=2), classes(2, 9, 3)
    task = MultiLabel(layout=XY)
    expected = metrics(task, z, y, dense)
    more = [torch.cat([x, normal(2, 3, seed=5) * 50]) for x in (z, dense)]
    padded = torch.cat([y, torch.full((2, 3), -100)])
    assert metrics(task, more[0], padded, more[1]) == pytest.approx(expected)
    loss = task.predict(more[0], (padded, padded)).loss()
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize("number", [3, 6])
def test_segmentation(number: int) -> None:
    z, y = normal(4, number, 5, 6), classes(3, 4, 5, 6)
    z[:, 3:] -= 100  # never predicted and never there
    y[0, :2] = -100
    found = metrics(Segmentation(layout=XY), z, y, z)
    kept = y.flatten() != -100
    said, true = z.argmax(1).flatten()[kept], y.flatten()[kept]
    assert found == pytest.approx(
        {
            "miou": jaccard_score(true, said, average="macro"),
            "accuracy": accuracy_score(true, said),
            "loss": float(functional.cross_entropy(z, y)),
            "kl_divergence": 0.0,
            "reverse_kl": 0.0,
        }
    )
    assert metrics(Segmentation(layout=XY), z, y[:, None], z) == found
    ignoring = Segmentation(layout=XY, ignored=255)
    assert metrics(ignoring, z, torch.where(y == -100, 255, y), z) == found


def test_segmentation_of_one_logit_is_that_of_two_classes() -> None:
    z, y = normal(3, 1, 4, 4), classes(2, 3, 4, 4)
    task = Segmentation(layout=XY)
    two = torch.cat([torch.zeros_like(z), z], 1)
    assert metrics(task, z, y) == metrics(task, two, y) == metrics(task, z, y[:, None].float())


@pytest.mark.parametrize("shape", [(25,), (25, 3), (25, 2, 2)])
def test_regression(shape: tuple[int, ...]) -> None:
    x, dense, y = normal(*shape), normal(*shape, seed=2), 3 * normal(*shape, seed=3) + 7
    found = metrics(Regression(layout=XY), x, y, dense)
    a, b, r = (t.reshape(len(t), -1) for t in (x, y, dense))
    assert found == pytest.approx(
        {
            "r2": r2_score(b, a, multioutput="uniform_average"),
            "mae": float((a - b).abs().mean()),
            "loss": float(functional.mse_loss(a, b)),
            "distance": float(((a - r).square().mean(0) / r.var(0, correction=0)).mean()),
        }
    )
    assert float(Regression(layout=XY).predict(x, (y, y)).loss()) == pytest.approx(found["loss"])


@pytest.mark.parametrize("constant", [0.0, 2.5])
@pytest.mark.parametrize("exact", [True, False])
def test_r2_of_constant_targets_is_that_of_scikit_learn(constant: float, exact: bool) -> None:
    x, y = normal(10, 2), normal(10, 2, seed=2)
    y[:, 1] = constant
    if exact:
        x[:, 1] = constant
    found = metrics(Regression(layout=XY), x, y)
    assert found["r2"] == pytest.approx(r2_score(y, x, multioutput="uniform_average"))


def test_r2_of_targets_far_from_zero() -> None:
    x, y = 1e6 + normal(50, 1), 1e6 + normal(50, 1, seed=2)
    assert metrics(Regression(layout=XY), x, y)["r2"] == pytest.approx(r2_score(y, x), rel=1e-2)


def test_perplexity_weights_tokens_rather_than_batches() -> None:
    z, y = normal(6, 5, 11), classes(11, 6, 5)
    y[0, 1:] = -100
    y[3, :4] = -100
    task = MaskedLanguageModelling(layout=XY)
    found = task.finish(streamed(task, z, y, z, [1, 3, 2]))
    loss = float(functional.cross_entropy(z.flatten(0, 1), y.flatten()))
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    assert found["loss"] == pytest.approx(loss)


@pytest.mark.parametrize("shifted", [True, False])
def test_causal_targets_are_the_next_tokens(shifted: bool) -> None:
    z, tokens = normal(4, 7, 9), classes(9, 4, 8)
    task = CausalLanguageModelling(layout=XY, shifted=shifted)
    if shifted:
        found = metrics(task, z, tokens[:, 1:])
        expected = functional.cross_entropy(z.flatten(0, 1), tokens[:, 1:].flatten())
    else:
        found = metrics(task, z, tokens[:, :-1])
        expected = functional.cross_entropy(z[:, :-1].flatten(0, 1), tokens[:, 1:-1].flatten())
    assert found["loss"] == pytest.approx(float(expected))


def test_matching_by_distance_and_by_kl() -> None:
    z, dense = normal(30, 4), normal(30, 4, seed=2)
    found = metrics(Matching(layout=Layout()), z, z, dense)
    error = (z - dense).square().mean() / dense.var(correction=0)
    assert found == pytest.approx({"distance": float(error)})
    p, q = CategoricalDistribution(logits=dense), CategoricalDistribution(logits=z)
    found = metrics(Matching(layout=Layout(), by="kl"), z, z, dense)
    assert found["kl_divergence"] == pytest.approx(float(kl_divergence(p, q).mean()))
    assert found["reverse_kl"] == pytest.approx(float(kl_divergence(q, p).mean()))


CASES: list[tuple[Task, Tensor, Tensor, Tensor]] = [
    (Classification(layout=XY, weights=(1, 2, 3)), normal(12, 3), classes(3, 12), normal(12, 3)),
    (MultiLabel(layout=XY), normal(12, 3), classes(2, 12, 3), normal(12, 3, seed=4)),
    (Segmentation(layout=XY), normal(12, 3, 2), classes(3, 12, 2), normal(12, 3, 2, seed=4)),
    (Regression(layout=XY), normal(12, 2), normal(12, 2, seed=3), normal(12, 2, seed=4)),
    (CausalLanguageModelling(layout=XY), normal(12, 3, 5), classes(5, 12, 3), normal(12, 3, 5)),
    (Matching(layout=XY), normal(12, 2), normal(12, 2, seed=3), normal(12, 2, seed=4)),
]


@given(st.sampled_from(CASES), st.lists(st.integers(1, 5), min_size=12, max_size=12))
@settings(max_examples=40, deadline=None)
def test_metrics_do_not_depend_on_the_batches(
    case: tuple[Task, Tensor, Tensor, Tensor], sizes: list[int]
) -> None:
    task, output, y, dense = case
    cut: list[int] = []
    while sum(cut) < 12:
        cut.append(min(sizes[len(cut)], 12 - sum(cut)))
    whole = task.finish(streamed(task, output, y, dense, [12]))
    assert task.finish(streamed(task, output, y, dense, cut)) == pytest.approx(whole, rel=1e-9)
    assert set(whole) == set(task.directions)
    assert task.divergence_name in whole


def test_rows_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = normal(20, 4), classes(4, 20)
    y[3:9] = -100
    whole = Categorical(z, y, confusion=True).sums(Categorical(z.flip(0)))
    monkeypatch.setattr("rankNAS.tasks.categorical.CACHED", 12)  # logits of a CPU
    chunked = Categorical(z, y, confusion=True).sums(Categorical(z.flip(0)))
    torch.testing.assert_close(chunked, whole)


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 1.0, 300.0]))
@settings(max_examples=30, deadline=None)
def test_divergences_are_the_sums_over_the_probabilities(seed: int, scale: float) -> None:
    """Close networks and far ones, whose least probabilities are 0 in float64, too."""
    z = 5 * normal(7, 6, seed=seed)
    dense = z + scale * normal(7, 6, seed=seed + 1)
    found = Categorical(z).sums(Categorical(dense))
    log_q, log_p = z.log_softmax(-1), dense.log_softmax(-1)
    for name, a, b in (("kl", log_p, log_q), ("reverse_kl", log_q, log_p)):
        expected = float((a.exp() * (a - b)).sum())
        assert float(found[name]) == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_classes_that_are_impossible() -> None:
    """A class that only the reference excludes adds nothing to KL(p || q), and the other way."""
    z, dense = torch.zeros(3, 4), torch.zeros(3, 4)
    z[:2, 0], dense[1:, 0] = -math.inf, -math.inf  # excluded by q, by both, by the reference
    rows = [Categorical(z[i : i + 1]).sums(Categorical(dense[i : i + 1])) for i in range(3)]
    found = [(float(row["kl"]), float(row["reverse_kl"])) for row in rows]
    ratio = math.log(4 / 3)
    assert found[0] == (math.inf, pytest.approx(ratio))
    assert found[1] == (0.0, 0.0)
    assert found[2] == (pytest.approx(ratio), math.inf)


@pytest.mark.parametrize("scale", [1.0, 5.0, 60.0])
@given(seed=st.integers(0, 10**6), count=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_a_compact_reference_bounds_the_divergence(scale: float, seed: int, count: int) -> None:
    dense, z = normal(6, 8, seed=seed) * scale, normal(6, 8, seed=seed + 1)
    exact = Categorical(z).sums(Categorical(dense))
    found = Categorical(z).sums(TopClasses.of(dense, count))
    for name in ("kl", "reverse_kl"):
        bound, value = float(exact[name]), float(found[name])
        assert value <= bound * (1 + 1e-5) + 1e-5
        # What all 8 classes leave for others is not known better than by rounding.
        if count == 8 and scale < 60:
            assert value == pytest.approx(bound, rel=1e-4, abs=1e-5)


@given(st.integers(0, 4000))
@settings(max_examples=40, deadline=None)
def test_a_kept_reference_obeys_its_bytes(most: int) -> None:
    logits = normal(10, 40).float()
    kept = Categorical(logits[:, :]).kept(most)
    assert kept is None or kept.nbytes <= most
    assert (kept is not None) == (most >= 360)
    for other in (Bernoulli(logits, logits), Regression(layout=XY).predict(logits, (0, logits))):
        kept = other.kept(most)
        assert (kept is None) == (most < 1600)
        assert kept is None or held_bytes(kept) <= most


def held_bytes(prediction: Any) -> int:
    stores = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in vars(prediction).values()
        if isinstance(x, Tensor)
    }
    return sum(stores.values())


def test_a_kept_reference_is_no_view_of_a_larger_tensor() -> None:
    states = normal(8, 100, 5)
    for prediction in (
        Categorical(states[:, -1]),
        Regression(layout=XY).predict(states[:, -1], (0, states[:, -1])),
        MultiLabel(layout=XY).predict(states[:, -1], (0, classes(2, 8, 5))),
    ):
        kept = prediction.kept(10_000)
        assert kept is not None
        assert held_bytes(kept) == kept.nbytes == 8 * 5 * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    z = (normal(4096, 3) * 300).to(dtype).requires_grad_()
    y = classes(3, 4096)
    many = torch.nn.functional.one_hot(y, 3)
    for task, targets in (
        (Classification(layout=XY), y),
        (MultiLabel(layout=XY), many),
        (Regression(layout=XY), many * 1e5),
    ):
        found, exact = (task.predict(x, (0, targets)) for x in (z, z.detach().double()))
        dense = task.predict(z.detach().flip(0), (0, targets))
        for value in (
            found.loss(),
            found.distillation(dense),
            found.sampled_loss(torch.Generator().manual_seed(0)),
        ):
            assert value.dtype == torch.float32
            assert value.isfinite()
            assert torch.autograd.grad(value, z, retain_graph=True)[0].isfinite().all()
        assert found.loss().item() == pytest.approx(float(exact.loss()), rel=1e-4)
        sums = found.sums(dense)
        assert all(value.dtype == torch.float64 for value in sums.values())
        assert all(math.isfinite(value) for value in task.finish(sums).values())


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    z, dense = normal(9, 4), normal(9, 4, seed=2)
    y = classes(4, 9)
    y[2] = -100
    for a, b, scale in (
        (Categorical(z, y), Categorical(dense), 8),
        (Bernoulli(z, z), Bernoulli(dense, z), 9),
    ):
        expected = float(a.sums(b)["kl"]) / scale
        assert float(a.distillation(b)) == pytest.approx(expected)
    assert np.isclose(float(Categorical(z).distillation(Categorical(z), 3.0)), 0)
    none = Categorical(z, torch.full((9,), -100))
    assert float(none.distillation(Categorical(dense))) == 0.0
