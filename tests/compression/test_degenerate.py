"""Dead inputs and repeated rows are counted exactly and named once."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankNAS.compression.calibration import calibrate
from rankNAS.compression.degenerate import dead_inputs, redundant_rows
from rankNAS.compression.factorisation import factorise
from rankNAS.search_spaces.compiler import compile_space


@given(
    rows=st.lists(st.lists(st.integers(-1, 1), min_size=3, max_size=3), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_rows_are_counted_as_by_comparing_all_pairs(
    rows: list[list[int]], dtype: torch.dtype
) -> None:
    weight = torch.tensor([rows], dtype=dtype)
    distinct = {tuple(row) for row in rows if any(row)}
    assert redundant_rows(weight) == len(rows) - len(distinct)
    assert redundant_rows(-weight) == redundant_rows(weight)  # with negative zeros


def test_rows_of_different_groups_are_no_repetition() -> None:
    row = torch.randn(1, 1, 5)
    assert redundant_rows(torch.cat([row, row], 0)) == 0
    assert redundant_rows(torch.cat([row, row], 1)) == 1


def test_a_channel_is_dead_if_all_of_its_positions_are() -> None:
    moment = torch.eye(6).unsqueeze(0)
    moment[0, 0, 0] = moment[0, 4, 4] = moment[0, 5, 5] = 0
    assert dead_inputs(moment, 3) == 1  # the channels have two positions each
    assert dead_inputs(moment, 6) == 3


def test_a_search_names_layers_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(5)))
    for layer in model:
        assert isinstance(layer, nn.Linear)
        layer.weight.data[3] = layer.weight.data[7]
    x = torch.randn(40, 12)
    x[:, :2] = 0
    space = compile_space(model, x[:1], min_weights=1)
    with caplog.at_level(logging.WARNING):
        factorise(model, space, calibrate(model, space, x, norm="input"), norm="input")
    dead, redundant = (record.getMessage() for record in caplog.records)
    assert "'0' (2 of 12);" in dead and "'1'" not in dead
    assert "'0' (1 of 12), '1' (1 of 12), '2' (1 of 12) and 1 more layers" in redundant


def test_ordinary_layers_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4)), torch.randn(30, 6)
    space = compile_space(model, x[:1], min_weights=1)
    with caplog.at_level(logging.WARNING):
        factorise(model, space, calibrate(model, space, x, norm="fisher"), norm="fisher")
    assert not caplog.records
