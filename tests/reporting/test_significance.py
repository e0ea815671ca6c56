"""Confidence intervals of the differences between strategies."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from rankNAS.reporting.comparison import markdown, tables
from rankNAS.reporting.latex import latex
from rankNAS.reporting.rows import Row
from rankNAS.reporting.significance import BLOCKS, BlockSums, block_size, differences
from rankNAS.tasks.base import Sums
from rankNAS.tasks.classification import Classification

TASK = Classification()
BUDGET = "macs<=0.5"


def blocks_of(correct: Tensor, kl: Tensor, size: int) -> list[Sums]:
    """The sums of a classifier over blocks of items, from what it does with each item."""
    found = []
    for c, k in zip(correct.double().split(size), kl.double().split(size), strict=True):
        count = torch.tensor(float(len(c)), dtype=torch.float64)
        sums = {"count": count, "weight": count, "loss": k.sum(), "correct": c.sum()}
        found.append({**sums, "kl": k.sum(), "reverse_kl": k.sum()})
    return found


def compared(
    items: dict[tuple[str, int], Tensor],
    size: int = 1,
    folder: Path | None = None,
    draws: int = 300,
) -> pd.DataFrame:
    """The differences of strategies whose correct items (n,) are given by name and seed."""
    sums = BlockSums(folder)
    rows = []
    for (name, seed), correct in items.items():
        value = float(correct.double().mean())
        row = Row(name, BUDGET, seed, test=value, test_divergence=1 - value, metric="accuracy")
        sums.add(row.key, "test", blocks_of(correct, 1 - correct.double(), size), size)
        rows.append(row)
    return differences(pd.DataFrame(map(asdict, rows)), sums, TASK, draws=draws)


@pytest.mark.parametrize(("seeds", "size"), [(1, 1), (1, 8), (4, 8)])
def test_the_interval_covers_the_truth(seeds: int, size: int) -> None:
    """Two classifiers with common hard items, whose accuracies differ by 4 points and by seed."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        hard, items = rng.normal(size=400), {}
        for name, ability in (("a", 0.7), ("b", 0.58)):
            for seed in range(seeds):
                shift = 0.1 * rng.normal() if seeds > 1 else 0.0
                right = hard + rng.normal(size=400) < math.sqrt(2) * (ability + shift)
                items[name, seed] = torch.from_numpy(right)
        line = compared(items, size, draws=200).query("quantity == 'accuracy'")
        other = line[line.strategy != line.best].iloc[0]
        spread = math.sqrt(1 + (0.01 if seeds > 1 else 0.0))  # of the shift, averaged over it
        a, b = (0.5 * (1 + math.erf(x / spread / math.sqrt(2))) for x in (0.7, 0.58))
        truth = (b - a) if other.strategy == "b" else (a - b)
        covered += other.low <= truth <= other.high
    assert covered >= 34  # of 40, where 38 are expected


def test_equal_rows_are_equal_and_distant_ones_are_not() -> None:
    right = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.8
    found = compared(
        {("a", 0): right, ("b", 0): right, ("c", 0): right & (torch.arange(300) > 90)}
    )
    for quantity in ("accuracy", "kl_divergence"):
        lines = found[found.quantity == quantity].set_index("strategy")
        assert lines.best.tolist() == ["a"] * 3
        assert lines.loc["b", ["difference", "low", "high"]].tolist() == [0.0, 0.0, 0.0]
        assert lines.equal.tolist() == [True, True, False]
        sign = -1 if quantity == "accuracy" else 1
        assert sign * lines.difference["c"] > 0.15 and sign * lines.low["c"] > 0
    assert found.block_items.tolist() == [1] * 6 and set(found.blocks) == {300}


def test_pairs_are_compared_on_the_same_items() -> None:
    """Unpaired, the noise of the items would hide a difference of 3 items."""
    right = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.5
    worse = right.clone()
    worse[right.nonzero()[:9, 0]] = False
    found = compared({("a", 0): right, ("b", 0): worse}).query("quantity == 'accuracy'")
    assert not found.equal.iloc[1] and found.high.iloc[1] < 0
    assert found.high.iloc[1] - found.low.iloc[1] < 0.05


def test_equal_seeds_of_the_draws_give_equal_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    items = {(n, s): torch.rand(64, generator=generator) < 0.7 for n in "ab" for s in range(3)}
    pd.testing.assert_frame_equal(compared(items), compared(items))


def test_sums_are_found_again(tmp_path: Path) -> None:
    items = {("a", 0): torch.arange(9) > 2, ("b/c", 0): torch.arange(9) > 4}
    found = compared(items, 2, tmp_path)
    again = BlockSums(tmp_path)
    rows = pd.DataFrame([asdict(Row(n, BUDGET, s)) for n, s in items])
    pd.testing.assert_frame_equal(differences(rows, again, TASK, draws=300), found)
    for path in tmp_path.iterdir():
        path.write_bytes(b"nothing")
    assert not len(differences(rows, BlockSums(tmp_path), TASK))


def test_rows_without_sums_or_answers_are_left_out() -> None:
    rows = pd.DataFrame([asdict(Row("a", BUDGET, 0)), asdict(Row("b", BUDGET, 0, status="no"))])
    assert not len(differences(rows, BlockSums(), TASK))


def test_blocks_are_single_items_where_these_are_few() -> None:
    assert [block_size(n) for n in (1, BLOCKS, BLOCKS + 1, 10_000)] == [1, 1, 2, 40]


def test_the_tables_parse_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    items = {(n, s): torch.rand(64, generator=generator) < 0.7 for n in "ab" for s in range(2)}
    found = compared(items, 4)
    rows = pd.DataFrame(
        asdict(Row(n, BUDGET, s, 0.5, float(c.double().mean()), 0.1, 0.5, 0.5, 1.0, 1.0, 3))
        for (n, s), c in items.items()
    ).assign(metric="accuracy")
    columns, lines = tables(rows, found)[BUDGET]
    best = columns.index("accuracy, % to the best")
    assert [line[best] == "best" for line in lines].count(True) == 1
    pattern = r"(≈ )?[+-]\d+\.\d\d \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\]"
    assert all(line[best] == "best" or re.fullmatch(pattern, line[best]) for line in lines)
    text = markdown(rows, "ranknas compare", "Nets.", found)
    table = [line for line in text.split(f"## {BUDGET}")[1].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == columns and cells[2:] == lines
    assert "blocks of 4 test items (16) and 2 seeds" in text
    tex = latex(rows, found)
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 1
    body = [line.removesuffix(r" \\").split(" & ") for line in tex.splitlines() if " & " in line]
    assert [len(line) for line in body] == [len(columns)] * 3
    plain = [[cell.replace(r"\%", "%") for cell in line] for line in body]
    plain = [[c.replace(r"$\pm$", "±").replace(r"$\approx$", "≈") for c in x] for x in plain]
    assert plain == [columns, *lines]
    assert not re.search(r"(?<!\\)[%&_#](?! )", tex.replace(" & ", ""))
    found.to_csv(tmp_path / "differences.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "differences.csv"), found)
