"""What workers read in shared memory is what was sent."""

from __future__ import annotations

import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import rankNAS
from rankNAS.exceptions import UsageError
from rankNAS.execution.sharing import _reduced, _restored, shared_bytes
from rankNAS.objectives import Objective


def test_tensors_go_through_shared_memory_as_they_are() -> None:
    x = torch.randn(2, 3, 4, 5)
    parameter = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    tensors = [
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.half(),
        x.bfloat16(),
        torch.tensor(3.5),
        torch.arange(5),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        x.transpose(1, 3),
        torch.randn(4, 26)[:1, :1].T,
        torch.randn(1, 26).T[:1],
        parameter,
    ]
    for tensor in tensors:
        restore, arguments = _reduced(tensor)
        back = restore(*arguments)
        assert type(back) is type(tensor)
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)
        assert back.requires_grad == tensor.requires_grad
    assert _restored(*_reduced(tensors[1])[1]).is_contiguous(memory_format=torch.channels_last)
    arguments = _reduced(x)[1]
    assert _restored(*arguments).data_ptr() == arguments[0].ctypes.data  # no copy


def searched(
    small_net: nn.Module, small_data: tuple[TensorDataset, TensorDataset], **settings: bool
) -> rankNAS.Study:
    """A study of one trial."""
    return rankNAS.search(
        small_net,
        small_data,
        budget={"macs": 0.5},
        strategy="uniform",
        n_trials=1,
        settings=rankNAS.Settings(calibration=64, validation=50, **settings),
    )


def test_a_sent_evaluator_has_every_sample_once(
    small_net: nn.Module, small_data: tuple[TensorDataset, TensorDataset]
) -> None:
    study = searched(small_net, small_data, early_stopping=True)
    sent: list[tuple[int, ...]] = []

    class Noting(pickle.Pickler):
        def reducer_override(self, given: Any) -> Any:
            if isinstance(given, torch.Tensor):
                sent.append(tuple(given.shape))
            return NotImplemented

    Noting(io.BytesIO()).dump(study.evaluator)
    images = sorted(shape for shape in sent if shape[1:] == (3, 8, 8))
    assert images == [(50, 3, 8, 8), (64, 3, 8, 8)]  # not the 300 that they were taken from
    # And the dense network's predictions of the validation samples, part by part.
    assert sum(shape[0] for shape in sent if shape[1:] == (4,)) >= 50
    assert study.evaluator.backend.references[0].model is not None
    copied = pickle.loads(pickle.dumps(study.evaluator))
    study.evaluator.forget()  # what the trial remembers of its parts
    assert copied.evaluate(study.best.allocation) == study.evaluator.evaluate(
        study.best.allocation
    )


def test_what_cannot_be_sent_is_said(
    small_net: nn.Module, small_data: tuple[TensorDataset, TensorDataset]
) -> None:
    study = searched(small_net, small_data)
    own = study.evaluator
    assert shared_bytes(own) > sum(p.nbytes for p in small_net.parameters())
    locked = threading.Lock()
    own.objectives = [Objective(lambda *_: float(locked.locked()), name="locked")]
    with pytest.raises(UsageError, match="cannot be sent to workers"):
        shared_bytes(own)
