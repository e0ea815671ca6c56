"""Sampled targets have the analytic Fisher matrix; padded positions change no statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankNAS.compression.calibration import calibrate
from rankNAS.data.samples import Samples
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.tasks import Matching, Segmentation
from rankNAS.tasks.base import Prediction, Task
from rankNAS.tasks.binary import Bernoulli
from rankNAS.tasks.categorical import Categorical
from rankNAS.tasks.continuous import Gaussian, Outputs
from rankNAS.tasks.language import CausalLanguageModelling, MaskedLanguageModelling
from rankNAS.tasks.layout import Layout

COPIES = 40_000  # samples of the targets of one prediction


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(make: Callable[[Tensor], Prediction], rows: Tensor) -> Tensor:
    """The mean outer product (D, D) of gradients at outputs (N, D)."""
    outputs = rows.clone().requires_grad_()
    loss = make(outputs).sampled_loss(torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(loss, outputs)
    return gradient.mT @ gradient / len(rows)


def test_categorical() -> None:
    z = normal(5)
    p = z.softmax(0)
    found = moment(Categorical, z.expand(COPIES, -1))
    torch.testing.assert_close(found, p.diag() - p.outer(p), atol=6e-3, rtol=0)


def test_bernoulli() -> None:
    z = normal(4) * 2
    p = z.sigmoid()
    found = moment(lambda x: Bernoulli(x, x), z.expand(COPIES, -1))
    torch.testing.assert_close(found, (p * (1 - p)).diag(), atol=6e-3, rtol=0)


def test_gaussian() -> None:
    scale = torch.tensor([0.1, 1.0, 20.0]).double()
    x = normal(COPIES, 3) * scale + 5
    found = moment(lambda mean: Gaussian(mean, mean), x)
    expected = (1 / x.var(0, correction=0)).diag()
    weight = scale.outer(scale)
    torch.testing.assert_close(found * weight, expected * weight, atol=3e-2, rtol=0)


def test_outputs() -> None:
    x = normal(COPIES, 2) * 4
    found = moment(lambda mean: Outputs([mean]), x)
    expected = torch.eye(2).double() / x.var(correction=0)
    torch.testing.assert_close(found * 16, expected * 16, atol=3e-2, rtol=0)


def test_a_constant_output_has_finite_gradients() -> None:
    for mean in (torch.full((6, 2), 3.0), normal(1, 2), torch.zeros(3, 2)):
        for prediction in (Gaussian(mean, mean), Outputs([mean.requires_grad_()])):
            assert moment(lambda x, p=prediction: _with(p, x), mean.detach()).isfinite().all()


def _with(prediction: Prediction, x: Tensor) -> Prediction:
    return Gaussian(x, x) if isinstance(prediction, Gaussian) else Outputs([x])


@pytest.mark.parametrize(
    "make",
    [
        Categorical,
        lambda x: Bernoulli(x, x),
        lambda x: Gaussian(x, x),
        lambda x: Outputs([x]),
    ],
)
def test_samples_depend_on_the_generator_alone(make: Callable[[Tensor], Prediction]) -> None:
    x = normal(50, 3).requires_grad_()

    def gradient(seed: int) -> Tensor:
        loss = make(x).sampled_loss(torch.Generator().manual_seed(seed))
        return torch.autograd.grad(loss, x)[0]

    first = gradient(0)
    torch.manual_seed(99)
    assert torch.equal(gradient(0), first)
    assert not torch.equal(gradient(1), first)


def test_what_does_not_count_has_no_gradient() -> None:
    x = normal(6, 3).requires_grad_()
    y = torch.tensor([0, -100, 2, 1, -100, 0])
    for prediction in (
        Categorical(x, y),
        Categorical(x, counts=y >= 0),
        Bernoulli(x, x, counts=(y >= 0)[:, None].expand(-1, 3)),
    ):
        loss = prediction.sampled_loss(torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(loss, x)
        assert (gradient.abs().sum(1) > 0).tolist() == (y >= 0).tolist()


def test_pixels_are_samples() -> None:
    z = normal(4, 3, 5, 5)
    y = torch.zeros(4, 5, 5, dtype=torch.int64)
    prediction = Segmentation(layout=Layout((0,), 1)).predict(z, (z, y))
    assert len(prediction) == 100


class Tokens(nn.Module):
    """A token model in which positions do not mix, so that padding can have no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.last(torch.relu(self.first(self.embed(input_ids))))


@pytest.mark.parametrize("norm", ["input", "fisher"])
@pytest.mark.parametrize(
    "task", [CausalLanguageModelling(), MaskedLanguageModelling(), Matching(by="kl"), None]
)
@pytest.mark.parametrize("marked", [True, False])
def test_padding_changes_no_statistics(norm: str, task: Task | None, marked: bool) -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    ids = torch.randint(11, (10, 6))
    mask = torch.ones_like(ids)
    plain = {"input_ids": ids, "attention_mask": mask}
    padded = {
        "input_ids": torch.cat([ids, torch.full((10, 3), 7)], 1),
        "attention_mask": torch.cat([mask, torch.zeros(10, 3, dtype=mask.dtype)], 1),
    }
    if task is not None and task.labelled:
        labels = torch.randint(11, (10, 6))
        plain["labels"] = labels
        padded["labels"] = torch.cat([labels, torch.full((10, 3), -100 if marked else 7)], 1)
    task = Matching() if task is None else task
    found = []
    space = compile_space(model, (ids, mask), min_weights=1, keep_output_dense=False)
    for data in (plain, padded):
        bound = task.bound(data, model)
        statistics = calibrate(
            model,
            space,
            Samples.of(data),
            bound,
            norm=norm,
            batch_size=4,  # type: ignore[arg-type]
        )
        found.append(statistics)
        prediction = bound.run(model, data)
        assert len(prediction) in (10, 50, 60)
    for name, expected in found[0].items():
        torch.testing.assert_close(
            found[1][name].input_second_moment, expected.input_second_moment
        )
        torch.testing.assert_close(
            found[1][name].output_gradient_second_moment, expected.output_gradient_second_moment
        )


@pytest.mark.parametrize("task", [CausalLanguageModelling(), MaskedLanguageModelling()])
@pytest.mark.parametrize("label", [-100, 7])
def test_padding_changes_no_metric(task: Task, label: int) -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    ids, labels = torch.randint(11, (2, 10, 6))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    tail = {"input_ids": 7, "attention_mask": 0, "labels": label}
    padded = {k: torch.cat([x, torch.full((10, 2), tail[k])], 1) for k, x in plain.items()}
    found = []
    for data in (plain, padded):
        prediction = task.bound(data, model).run(model, data)
        found.append([task.finish(prediction.sums(prediction)), prediction.loss().item()])
    assert found[0][0] == pytest.approx(found[1][0])
    assert found[0][1] == pytest.approx(found[1][1])
