"""The summary and the picture of a comparison."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rankNAS.reporting.comparison import draw, markdown, tables
from rankNAS.reporting.rows import Row

BUDGETS = ["macs<=0.55", "macs<=0.5", "macs<=0.37"]


def made(strategies: int, budgets: int = 3, seeds: int = 2, tuned: bool = False) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    dense = Row("dense", "dense", 0, 0.9, 0.9, 0.0, 1.0, 1.0, 0.0, 3.0, metric="accuracy")
    rows = [replace(dense, seed=s) for s in range(seeds)]
    for i in range(strategies):
        for seed in range(seeds):
            for j, budget in enumerate(BUDGETS[:budgets]):
                accuracy = 0.5 + 0.01 * i + 0.001 * seed
                row = Row(f"strategy_{i}", budget, seed, 0.8, accuracy, 0.25, 0.5, 0.4)
                row = replace(row, search_seconds=(j + 1) * 10 ** rng.uniform(-1, 4))
                row = replace(row, evaluations=(j + 1) * 10, setup_seconds=3.0, metric="accuracy")
                rows.append(replace(row, finetuned_test=0.8) if tuned else row)
    return pd.DataFrame(map(asdict, rows))


def test_tables_have_a_line_a_strategy_the_most_accurate_first() -> None:
    found = tables(made(3))
    assert list(found) == BUDGETS
    columns, lines = found[BUDGETS[1]]
    assert [line[0] for line in lines] == ["strategy_2", "strategy_1", "strategy_0"]
    assert lines[0][columns.index("test accuracy, %")] == "52.05 ± 0.07"
    assert lines[0][columns.index("MACs, %")] == "50.00"
    assert lines[0][columns.index("divergence")] == "0.2500 ± 0.0000"
    assert lines[0][columns.index("evaluations")] == "20"
    assert lines[0][columns.index("seeds")] == "2"
    assert "fine-tuned, %" not in columns
    columns, lines = tables(made(2, tuned=True))[BUDGETS[0]]
    assert lines[0][columns.index("fine-tuned, %")] == "80.00 ± 0.00"


def test_one_seed_has_no_deviation() -> None:
    columns, lines = tables(made(1, seeds=1))[BUDGETS[0]]
    assert lines[0][columns.index("test accuracy, %")] == "50.00"


def test_the_summary_has_the_command_the_dense_model_and_the_reasons() -> None:
    rows = made(2)
    refused = Row("picky", BUDGETS[0], 0, status="needs a|b")
    text = markdown(pd.concat([rows, pd.DataFrame([asdict(refused)])]), "ranknas compare", "Nets.")
    assert "    ranknas compare\n" in text
    assert "Nets. Dense test accuracy: 90.00 ± 0.00 %. Setup" in text and " 3 s a seed." in text
    assert "| picky | macs<=0.55 | needs a\\|b |" in text
    assert [line[3:] for line in text.splitlines() if line.startswith("## macs")] == BUDGETS
    assert "picky" not in text.split("## Without an answer")[0]
    assert "torch" in text.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategies", "budgets", "tuned"), [(17, 3, True), (17, 1, False), (1, 1, False)]
)
def test_the_picture_shows_every_strategy_and_nothing_overlaps(
    strategies: int, budgets: int, tuned: bool, tmp_path: Path
) -> None:
    figure = draw(made(strategies, budgets, tuned=tuned))
    path = tmp_path / "comparison.png"
    figure.savefig(path)
    assert np.asarray(Image.open(path).convert("L")).std() > 5
    *left, right = figure.axes
    assert len(left) == 1 + tuned
    assert right.get_xscale() == "log"
    names = {f"strategy_{i}" for i in range(strategies)}
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == names | {"dense"}
    assert {text.get_text() for text in right.get_yticklabels()} == names
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    inside = figure.bbox
    texts = [*right.texts, *right.get_yticklabels(), *legend.get_texts()]
    boxes = [text.get_window_extent() for text in texts]
    assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 for b in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_looks_differ_and_stay_with_their_strategy() -> None:
    def looks(rows: pd.DataFrame) -> dict[str, tuple[object, object]]:
        axes = draw(rows).axes[0]
        bars = {c.get_label(): c.lines[0] for c in axes.containers}
        return {str(k): (line.get_color(), line.get_marker()) for k, line in bars.items()}

    rows = made(17)
    first = looks(rows)
    assert len(set(first.values())) == 17
    assert len({colour for colour, _ in first.values()}) == 17
    reversed_ranking = rows.assign(test=1 - rows.test)
    assert looks(reversed_ranking) == first


def test_metrics_that_are_no_shares_are_plain_numbers() -> None:
    rows = made(3).assign(metric="mae", direction="minimize")
    columns, lines = tables(rows)[BUDGETS[0]]
    assert [line[0] for line in lines] == ["strategy_0", "strategy_1", "strategy_2"]
    assert lines[0][columns.index("test mae")] == "0.5005 ± 0.00071"
    assert lines[0][columns.index("validation")] == "0.8000 ± 0"
    assert "Dense test mae: 0.9000 ± 0. Setup" in markdown(rows, "ranknas compare", "Nets.")
    axes = draw(rows).axes
    assert axes[0].get_title() == "test mae"
    assert [t.get_text() for t in axes[-1].get_yticklabels()] == [
        "strategy_2",
        "strategy_1",
        "strategy_0",
    ]


def test_without_test_data_the_validation_is_shown() -> None:
    rows = made(2).assign(test=np.nan, test_divergence=np.nan)
    columns, lines = tables(rows)[BUDGETS[0]]
    assert columns[:3] == ["strategy", "validation accuracy, %", "MACs, %"]
    assert lines[0][1] == "80.00 ± 0.00"
    assert "Dense validation accuracy: 90.00 ± 0.00 %." in markdown(rows, "x", "Nets.")
    assert draw(rows).axes[0].get_title() == "validation accuracy, %"
