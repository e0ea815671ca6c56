from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rankNAS.tasks.categorical import Categorical


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Distillation of class predictions (..., classes)."""
    own, guide = (Categorical(x.flatten(0, -2)) for x in (student, teacher))
    return own.distillation(guide, temperature)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_distillation_term(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    assert soft_loss(teacher, teacher, 4.0) == pytest.approx(0.0, abs=1e-12)
    p, q = (functional.softmax(x.reshape(6, 5) / 4, dim=1) for x in (teacher, student))
    expected = 16 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_loss(student, teacher, 4.0), expected)


def test_soft_gradient_approaches_the_logit_difference_when_hot() -> None:
    # Hinton et al. 2015, equation 4: for zero-mean logits, T² dKL/ds -> (s - t) / classes.
    teacher = torch.tensor([[1.0, -2.0, 1.0]], dtype=torch.float64)
    student = torch.tensor([[0.5, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    soft_loss(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 3, rtol=1e-3, atol=0)
