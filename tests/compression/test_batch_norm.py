from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from rankNAS.compression.batch_norm import BatchNormReference
from rankNAS.engine import search
from rankNAS.exceptions import UsageError
from rankNAS.recovery import has_batch_norm, reestimate_batch_norm
from rankNAS.settings import Settings


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs.clone())
        return inputs


def test_statistics_are_those_of_the_batches() -> None:
    torch.manual_seed(0)
    inputs = 3 * torch.randn(24, 4, 5, 5) + 2
    norm = nn.BatchNorm2d(4, momentum=0.3)
    norm.running_mean.fill_(100.0)
    assert reestimate_batch_norm(norm, inputs, batch_size=8) is norm
    parts = inputs.split(8)
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    variance = torch.stack([part.var((0, 2, 3)) for part in parts]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.3 and not norm.training and norm.num_batches_tracked == 3


def test_later_layers_see_batch_normalised_inputs() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6))
    inputs = torch.randn(40, 3)
    reestimate_batch_norm(network, inputs, batch_size=40)
    hidden = network[0](inputs)
    scaled = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(network[3].running_mean, scaled.relu().mean(0))


def test_dropout_is_off_and_gradients_too() -> None:
    recorder = Recorder()
    network = nn.Sequential(nn.Dropout(0.5), recorder, nn.BatchNorm1d(3)).train()
    inputs = torch.randn(10, 3, requires_grad=True)
    reestimate_batch_norm(network, inputs)
    assert torch.equal(recorder.seen[0], inputs) and not recorder.seen[0].requires_grad
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (9, 4, [3, 3, 3]),
        (5, 4, [3, 2]),
        (3, 2, [3]),
        (5, 2, [3, 2]),
        (4, 256, [4]),
        (6, 2, [2] * 3),
    ],
)
def test_no_batch_has_a_single_input(count: int, size: int, expected: list[int]) -> None:
    recorder = Recorder()
    reestimate_batch_norm(nn.Sequential(recorder, nn.BatchNorm1d(2)), torch.randn(count, 2), size)
    assert [len(batch) for batch in recorder.seen] == expected


def test_without_running_statistics_there_is_no_forward() -> None:
    recorder = Recorder()
    network = nn.Sequential(recorder, nn.BatchNorm1d(2, track_running_stats=False))
    assert not has_batch_norm(network) and has_batch_norm(nn.BatchNorm1d(2))
    reestimate_batch_norm(network, torch.empty(0, 2))
    assert not recorder.seen and not network.training


def test_restores_the_layers_when_the_forward_fails() -> None:
    norm = nn.BatchNorm1d(2, momentum=0.2)
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(norm, torch.randn(4, 3))
    assert norm.momentum == 0.2 and not norm.training


def test_refuses_a_single_input() -> None:
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(5.0)
    for inputs, size in ((torch.randn(1, 2), 4), (torch.randn(4, 2), 1)):
        with pytest.raises(UsageError, match="at least 2"):
            reestimate_batch_norm(norm, inputs, size)
    assert (norm.running_mean == 5).all()


def corrected(inputs: Tensor, changed: Tensor) -> tuple[nn.BatchNorm1d, nn.BatchNorm1d]:
    """A batch norm with stored statistics, and one corrected from changed inputs."""
    norm = nn.BatchNorm1d(inputs.shape[1])
    norm.running_var.fill_(2.0)
    reference = BatchNormReference(norm, inputs)
    assert not norm._forward_hooks and (norm.running_var == 2).all()
    other = reestimate_batch_norm(nn.BatchNorm1d(inputs.shape[1]), changed)
    assert isinstance(other, nn.BatchNorm1d)
    reference.correct([other], [norm])
    return norm, other


def test_the_correction_is_the_change_of_the_statistics() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(256, 3)
    inputs[:, 2] *= 1e-4  # as small as a variance may be
    changed = inputs * torch.tensor([0.01, 3.0, 20.0]) + 1
    _, other = corrected(inputs, changed)
    before, now = inputs.var(0), changed.var(0)
    torch.testing.assert_close(
        other.running_var, 2 * (now + 1e-5) / (before + 1e-5), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(other.running_mean, changed.mean(0) - inputs.mean(0))


def test_few_samples_cannot_make_a_correction_large() -> None:
    inputs = torch.tensor([[1.0, 3.0, 2.0], [1.0, -3.0, -2.0]])
    changed = torch.tensor([[-4.0, 1e-5, 3.0], [4.0, 2e-5, -3.0]])
    _, other = corrected(inputs, changed)
    # The variances are 0 and 32, 18 and 0, 8 and 18.
    expected = torch.tensor([2 * 32 / 3.97, 2 * 3.97 / 18, 2 * 18 / 8])
    torch.testing.assert_close(other.running_var, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_corrected_statistics_are_those_that_the_network_can_keep(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2)
    reference = BatchNormReference(norm, torch.randn(300, 2), keeping=nn.BatchNorm1d(2).to(dtype))
    other = reestimate_batch_norm(nn.BatchNorm1d(2), 1e4 * torch.randn(300, 2) - 1e6)
    assert isinstance(other, nn.BatchNorm1d)
    reference.correct([other], [norm])
    for found in (other.running_mean, other.running_var):
        assert found is not None and found.isfinite().all() and found.dtype == torch.float32
        assert torch.equal(found.to(dtype).float(), found)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_search_with_few_calibration_samples_gives_a_usable_network(count: int) -> None:
    torch.manual_seed(0)
    layers = [p for _ in range(3) for p in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    x = torch.randn(300, 32)
    for _ in range(20):
        model(x)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    data = TensorDataset(x, y)
    settings = Settings(calibration=count, validation=200)
    for seed in range(3):
        study = search(
            model,
            (data, data),
            budget={"macs": 0.7},
            strategy="uniform",
            n_trials=1,
            seed=seed,
            settings=settings,
        )
        assert study.best.metrics["loss"] < 4
