from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from rankNAS.data.images.augment import Augmentation
from rankNAS.data.loading import load_data
from rankNAS.data.splits import split
from rankNAS.exceptions import RankNASError, UsageError, WeightsError
from rankNAS.recovery import TrainingConfig, train
from rankNAS.recovery.schedule import learning_rate
from rankNAS.recovery.trainer import Recovery
from rankNAS.tasks.infer import infer_task

CONFIG = TrainingConfig(epochs=4, batch_size=16, learning_rate=0.05)


def images(count: int = 60) -> TensorDataset:
    """Two classes that differ in the brightness of the upper half."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 3, 8, 8, generator=generator)
    targets = torch.randint(2, (count,), generator=generator)
    inputs[:, :, :4] += (2 * targets - 1)[:, None, None, None]
    return TensorDataset(inputs, targets)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(72, 2),
    )


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def test_learns_and_leaves_the_network_ready() -> None:
    data = images()
    trained = network()
    steps: list[tuple[int, int]] = []
    losses: list[float] = []

    def on_step(step: int, total: int, loss: float) -> None:
        steps.append((step, total))
        losses.append(loss)

    assert train(trained, data, CONFIG, on_step=on_step) is trained
    assert steps == [(step, 16) for step in range(1, 17)]
    assert losses[-1] < 0.5 * losses[0] and not trained.training
    inputs, targets = data.tensors
    assert (trained(inputs).argmax(1) == targets).float().mean() > 0.9
    assert all(parameter.is_contiguous() for parameter in trained.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumes_to_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer, learning_rate=0.01)
    augmentation = Augmentation(flip=True)
    whole = train(network(), images(), config, augmentation=augmentation)
    path = tmp_path / "run.pt"

    def interrupt(step: int, total: int, loss: float) -> None:
        if step == 10:  # in the third of four epochs
            raise KeyboardInterrupt

    broken = network()
    with pytest.raises(KeyboardInterrupt):
        train(
            broken,
            images(),
            config,
            augmentation=augmentation,
            checkpoint=path,
            on_step=interrupt,
        )
    torch.rand(5)  # the state of torch's own generator must not matter
    steps: list[int] = []
    resumed = train(
        broken,
        images(),
        config,
        augmentation=augmentation,
        checkpoint=path,
        on_step=lambda step, total, loss: steps.append(step),
    )
    assert steps == list(range(9, 17)) and same(resumed, whole)
    torch.load(path, weights_only=True)
    again = train(network(), images(), config, augmentation=augmentation, checkpoint=path)
    assert same(again, whole)
    with pytest.raises(WeightsError):  # it was another augmentation
        train(network(), images(), config, checkpoint=path)


def test_the_seed_decides() -> None:
    first, second = (train(network(), images(), CONFIG) for _ in range(2))
    other = train(network(), images(), replace(CONFIG, seed=1))
    assert same(first, second) and not same(first, other)


def test_the_training_of_a_study_takes_seed_and_augmentation_from_it() -> None:
    data = replace(load_data((images(), images(10))), flip=True)
    splits = split(data, calibration=10, validation=10, seed=4)
    assert splits.augmentation == Augmentation(flip=True) != Augmentation()
    task = infer_task(network().eval(), images()[:])
    recovery = Recovery.of(splits, task, CONFIG, 4)
    assert recovery.task is task
    assert recovery.data is splits.training and recovery.config == replace(CONFIG, seed=4)
    whole = train(
        network(),
        splits.training,
        replace(CONFIG, seed=4),
        augmentation=Augmentation(flip=True),
    )
    assert same(recovery.train(network(), network()), whole)
    assert not same(train(network(), splits.training, replace(CONFIG, seed=4)), whole)
    few = Recovery.of(splits, task, CONFIG, 4, 12)
    assert len(few.data) == 12 and len(Recovery.of(splits, task, CONFIG, 4, 999).data) == 50


def test_the_random_state_of_the_caller_is_kept() -> None:
    model = network()
    state = torch.get_rng_state()
    train(model, images(), CONFIG)
    assert torch.equal(torch.get_rng_state(), state)


def _linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


def test_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(network(), images(), replace(CONFIG, epochs=1), checkpoint=path)
    with pytest.raises(WeightsError, match="another configuration"):
        train(network(), images(), CONFIG, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WeightsError, match="delete it"):
        train(network(), images(), CONFIG, checkpoint=path)


def test_max_steps_ends_within_an_epoch_with_the_schedule() -> None:
    steps: list[tuple[int, int]] = []
    config = replace(CONFIG, epochs=3, max_steps=6)
    train(
        network(), images(), config, on_step=lambda step, total, loss: steps.append((step, total))
    )
    assert steps == [(step, 6) for step in range(1, 7)]


def test_schedule_warms_up_then_falls_like_a_cosine() -> None:
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0 < rates[-1] < 0.01
    assert learning_rate(0, 1, 2.0) == 2.0


def test_last_batch_of_one_image_is_left_out() -> None:
    steps: list[int] = []
    tiny = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    config = replace(CONFIG, epochs=2, augment=False)
    train(tiny, images(33), config, on_step=lambda step, total, loss: steps.append(total))
    assert steps == [4] * 4


def test_sequence_targets() -> None:
    tokens = torch.randint(5, (32, 6), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
    config = TrainingConfig(epochs=60, batch_size=16, learning_rate=0.5, weight_decay=0.0)
    trained = train(model, TensorDataset(tokens, (tokens + 1) % 5), config)
    assert torch.equal(trained(tokens).argmax(-1), (tokens + 1) % 5)


def test_a_student_equal_to_its_teacher_stays() -> None:
    teacher, student = _linear(), _linear()
    student.load_state_dict(teacher.state_dict())
    config = replace(CONFIG, distill=1.0, weight_decay=0.0)
    losses: list[float] = []
    train(
        student,
        images(),
        config,
        teacher=teacher,
        on_step=lambda step, total, loss: losses.append(loss),
    )
    assert max(map(abs, losses)) < 1e-5
    torch.testing.assert_close(student[1].weight, teacher[1].weight, rtol=0, atol=1e-4)


def test_distillation_needs_a_teacher() -> None:
    with pytest.raises(UsageError, match="no teacher"):
        train(network(), images(), replace(CONFIG, distill=0.5))


def test_frozen_parameters_stay_and_biases_do_not_decay() -> None:
    class Silent(nn.Module):
        """Logits that depend on no parameter, so that only weight decay moves them."""

        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(2, 2))
            self.bias = nn.Parameter(torch.ones(2))
            self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

        def forward(self, inputs: Tensor) -> Tensor:
            return 0 * (self.kernel.sum() + self.bias.sum()) * inputs.flatten(1)[:, :2]

    model = Silent()
    train(model, images(), CONFIG)
    assert (model.kernel < 1).all() and (model.bias == 1).all() and (model.frozen == 1).all()


def test_a_network_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match="all parameters of the network are frozen"):
        train(network().requires_grad_(False), images(), CONFIG)


def test_a_loss_that_is_not_finite_stops() -> None:
    data = images()
    data.tensors[0][:] = math.inf
    with pytest.raises(RankNASError, match=r"nan at step 1 of 16 with learning rate"):
        train(_linear(), data, CONFIG)


def test_a_limit_on_the_gradient_keeps_steps_small() -> None:
    """Without momentum's past, the first step of SGD is at most rate times limit times 1.9."""
    moved = {}
    for clip in (None, 0.01):
        config = TrainingConfig(1, max_steps=1, learning_rate=0.1, weight_decay=0.0, clip=clip)
        torch.manual_seed(0)
        own = network()
        before = [p.detach().clone() for p in own.parameters()]
        train(own, images(), config)
        steps = [(p - q).square().sum() for p, q in zip(own.parameters(), before, strict=True)]
        moved[clip] = torch.stack(steps).sum().sqrt().item()
    assert moved[0.01] == pytest.approx(0.1 * 1.9 * 0.01, rel=1e-3) and moved[None] > moved[0.01]
    with pytest.raises(UsageError, match="clip is 0"):
        TrainingConfig(1, clip=0.0)
