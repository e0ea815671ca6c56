"""Sketches of outputs."""

from __future__ import annotations

import torch

from rankNAS.models.agreement import Sketches


def test_places_of_large_tensors_are_inside() -> None:
    """The last place is no float32; it rounds up to the length."""
    flat = torch.zeros(2**24 + 2**23, dtype=torch.float16)
    flat[-1] = 2.0
    entry = Sketches.of({"": flat}, 1e-3).to_json()[""]
    assert entry["values"][-1] == 2.0 and entry["norm"] == 2.0


def test_norms_leave_out_what_is_not_finite() -> None:
    entry = Sketches.of({"": torch.tensor([3.0, float("inf"), 4.0])}, 1e-3).to_json()[""]
    assert entry["norm"] == 5.0 and entry["shape"] == [3]
