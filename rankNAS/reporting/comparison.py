"""Summary and figure of a comparison, from its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rankNAS.reporting.environment import machine, versions
from rankNAS.reporting.metrics import metric_name, metric_text
from rankNAS.reporting.rows import DENSE_MODEL, OK, summarise
from rankNAS.tasks import SHARES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "markdown", "noise_note", "tables"]

#: Before a difference that is 0 within the noise.
LABELS = " †"  # of strategies whose search has seen labels
EQUAL = "≈ "
#: The colours of tab20, first the saturated, then the pale ones.
COLOURS = [*range(0, 20, 2), *range(1, 20, 2)]
MARKERS = "os^Dv<>PXp*hd8H"


@dataclass(frozen=True)
class _Columns:
    """The measured columns of a summary, and how to show them.

    Attributes:
        metric: Name of the main metric.
        sign: 1 if it is maximised, -1 if it is minimised.
        tested: Whether there are test data.
        tuned: Whether there was fine-tuning.
    """

    metric: str
    sign: int
    tested: bool
    tuned: bool

    @classmethod
    def of(cls, table: pd.DataFrame) -> _Columns:
        sign = -1 if (table.direction == "minimize").any() else 1
        tested, tuned = (bool(table[c].notna().any()) for c in ("test", "finetuned_test"))
        return cls(str(table.metric.iloc[0]) if len(table) else "", sign, tested, tuned)

    @property
    def scale(self) -> float:
        """100 for a metric in percent, else 1."""
        return 100.0 if self.metric in SHARES else 1.0

    @property
    def main(self) -> str:
        """The column that ranks the strategies before fine-tuning."""
        return "test" if self.tested else "validation"

    @property
    def shown(self) -> dict[str, str]:
        """The columns that a figure shows, with their titles."""
        name = f"{self.main} {metric_name(self.metric)}"
        titles = {self.main: self.title(name)}
        return titles | (
            {"finetuned_test": self.title(f"{name} after fine-tuning")} if self.tuned else {}
        )

    def title(self, text: str) -> str:
        """A title with the unit of the metric."""
        return f"{text}, %" if self.metric in SHARES else text

    def value(self, row: Any, column: str) -> str:
        """Mean and deviation of the metric in a column."""
        mean, spread = self.scale * row[column], self.scale * row[f"{column}_std"]
        if self.metric in SHARES:
            return _mean(f"{mean:.2f}", spread, f"{spread:.2f}")
        return _mean(metric_text(mean), spread, f"{spread:.2g}")


def tables(
    rows: pd.DataFrame, differences: pd.DataFrame | None = None
) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Header and lines of a table of strategies by budget, the best strategy first.

    Args:
        rows: Rows from `rankNAS.comparison.compare`.
        differences: From `rankNAS.reporting.significance.differences`; None leaves them out.
    """
    table = summarise(rows)
    compared = _compared(differences)
    known = _Columns.of(table)
    columns = ["strategy", known.title(f"{known.main} {metric_name(known.metric)}")]
    columns += [known.title("fine-tuned")] if known.tuned else []
    columns += ["divergence", known.title("validation")] if known.tested else []
    columns += [f"{quantity} to the best" for quantity in compared]
    columns += ["MACs, %", "params, %", "evaluations", "search, s", "seeds"]
    found: dict[str, tuple[list[str], list[list[str]]]] = {}
    for row in table.to_dict("records"):
        if row["strategy"] == DENSE_MODEL:
            continue
        marked = LABELS * bool(row["labels"])
        line = [f"{row['strategy']}{marked}", known.value(row, known.main)]
        line += [known.value(row, "finetuned_test")] if known.tuned else []
        line += [_divergence(row), known.value(row, "validation")] if known.tested else []
        key = str(row["budget"]), str(row["strategy"])
        line += [texts.get(key, "") for texts in compared.values()]
        line += [f"{100 * row[c]:.2f}" for c in ("macs_fraction", "params_fraction")]
        line += [
            f"{row['evaluations']:.5g}",
            f"{_seconds(row['search_seconds'])}",
            str(row["seeds"]),
        ]
        found.setdefault(str(row["budget"]), (columns, []))[1].append(line)
    return found


def _compared(differences: pd.DataFrame | None) -> dict[str, dict[tuple[str, str], str]]:
    """By quantity, then by budget and strategy: the difference from the best and its interval."""
    found: dict[str, dict[tuple[str, str], str]] = {}
    if differences is None:
        return found
    for row in differences.to_dict("records"):
        quantity = str(row["quantity"])
        share = quantity.removeprefix("finetuned ") in SHARES
        low, high, middle = (
            f"{100 * row[name]:+.2f}" if share else f"{row[name]:+.3g}"
            for name in ("low", "high", "difference")
        )
        text = f"{EQUAL * bool(row['equal'])}{middle} [{low}, {high}]"
        if row["strategy"] == row["best"]:
            text = "best"
        name = metric_name(quantity) + ", %" * share
        found.setdefault(name, {})[row["budget"], row["strategy"]] = text
    return found


def noise_note(differences: pd.DataFrame) -> str:
    """How the intervals of the differences were made."""
    if not len(differences):
        return ""
    items, seeds = int(differences.block_items.max()), int(differences.seeds.max())
    blocks = int(differences.blocks.max())
    units = "single test items" if items == 1 else f"blocks of {items} test items"
    return (
        f"To the best: the difference from the best strategy of the column at the budget and its "
        f"95 % interval, from a paired bootstrap over {units} ({blocks}) and "
        + (f"{seeds} seeds" if seeds > 1 else "nothing else, as there is one seed")
        + f"; {EQUAL.strip()} marks differences that are equal to 0 within this noise. Intervals "
        "hold one by one; they are not corrected for the number of strategies."
    )


def _divergence(row: Any) -> str:
    mean, spread = row["test_divergence"], row["test_divergence_std"]
    return _mean(f"{mean:.4f}", spread, f"{spread:.4f}")


def _mean(mean: str, spread: float, deviation: str) -> str:
    """Mean and standard deviation; empty without a mean, the mean alone for one seed."""
    if mean == "nan":
        return ""
    return mean if np.isnan(spread) else f"{mean} ± {deviation}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def markdown(
    rows: pd.DataFrame, command: str, about: str, differences: pd.DataFrame | None = None
) -> str:
    """The summary of a comparison in Markdown.

    Args:
        rows: Rows from `rankNAS.comparison.compare`.
        command: The command that was run.
        about: A sentence on the model, the data and the number of trials.
        differences: As for `tables`.
    """
    table = summarise(rows)
    known = _Columns.of(table)
    lines = ["# Strategies compared", "", f"    {command}", "", about]
    for row in table[table.strategy == DENSE_MODEL].to_dict("records"):
        unit = " %" if known.metric in SHARES else ""
        name = f"{known.main} {metric_name(known.metric)}"
        lines[-1] += f" Dense {name}: {known.value(row, known.main)}{unit}"
        if not math.isnan(row["finetuned_test"]):
            lines[-1] += f"; trained alike: {known.value(row, 'finetuned_test')}{unit}"
        lines[-1] += "."
        lines[-1] += (
            f" Setup, shared by all strategies: {_seconds(row['setup_seconds'])} s a seed."
        )
    for budget, (columns, body) in tables(rows, differences).items():
        lines += ["", f"## {budget}", "", *_pipes([columns, ["---"] * len(columns), *body])]
    failed = rows[rows.status != OK].groupby(["strategy", "status"], sort=False)
    if len(failed):
        lines += ["", "## Without an answer", "", "| strategy | budgets | why |", "|---|---|---|"]
        for (strategy, status), group in failed:
            budgets = ", ".join(group.budget.unique())
            lines += _pipes([[str(strategy), budgets, str(status).replace("|", "\\|")]])
    cut = rows[rows.note != ""]
    if len(cut):
        lines += ["", "## Ended by the time limit", "", "| strategy | budget | seed | |"]
        lines += ["|---|---|---|---|"]
        lines += _pipes(
            [
                [*(str(row[name]) for name in ("strategy", "budget", "seed", "note"))]
                for row in cut.to_dict("records")
            ]
        )
    noise = [] if differences is None else [noise_note(differences)]
    texts = [NOTES, labels_note(rows), *noise]
    lines += ["", *(f"{text}\n" for text in texts if text), _versions()]
    return "\n".join(lines) + "\n"


def labels_note(rows: pd.DataFrame) -> str:
    """What the mark of strategies that have seen labels means; empty if there are none."""
    if not (rows.labels > 0).any():
        return ""
    return f"{LABELS.strip()} marks strategies whose search has trained on the labels."


NOTES = (
    "Mean ± sample standard deviation over seeds, the best strategy first (after fine-tuning, if "
    "there is any). Divergence: of the dense model's predictions on the test data from the "
    "solution's; Kullback-Leibler, in nats, for classes and tokens, else the squared distance "
    "relative to the variance. MACs and params: what is kept of the dense model's. Each "
    "strategy answers the budgets in one study, in the order above; evaluations (probes "
    "included) and search seconds are those of the study so far, so the last budget shows its "
    "totals. Testing and fine-tuning are not in them."
)


def _pipes(lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in lines]


def _versions() -> str:
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    found = machine()
    return (
        f"{packages}; {found['architecture']}, {found['processors']} processors, "
        f"{found['threads']} threads."
    )


def draw(rows: pd.DataFrame) -> Figure:
    """Figure of the main metric at each budget and the search time of each strategy.

    Points are means over seeds, error bars one standard deviation. The time is that of the whole
    study, over all budgets.

    Args:
        rows: Rows from `rankNAS.comparison.compare`, at least one of a strategy that is ``ok``.
    """
    import matplotlib
    from matplotlib.figure import Figure

    table = summarise(rows)
    dense, table = table[table.strategy == DENSE_MODEL], table[table.strategy != DENSE_MODEL]
    known = _Columns.of(table)
    shown = known.shown
    means = table.groupby("strategy")[list(shown)[-1]].mean()
    order = means.sort_values(ascending=known.sign > 0).index.tolist()
    budgets = list(table.budget.unique())
    width = max(4.0, 0.11 * len(order) * len(budgets) + 0.8)
    height = max(2.8, 0.24 * len(order) + 1.2)
    widths = [width] * len(shown) + [3.4]
    figure = Figure((sum(widths), height + 0.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    palette = matplotlib.colormaps["tab20"]
    # A strategy's position in the rows sets its style, so that figures of equal rows agree.
    looks = zip(rows.strategy.unique(), cycle(COLOURS), cycle(MARKERS), strict=False)
    given = {name: {"color": palette(i), "marker": marker} for name, i, marker in looks}
    styles = {name: given[name] for name in order}
    for axes, (column, title) in zip(panels, shown.items(), strict=False):
        _draw_quality(axes, table, column, known.scale, budgets, styles)
        axes.set_title(title, fontsize=10)
        if len(dense):
            tuned = dense[column].iloc[0]
            value = known.scale * (dense[known.main].iloc[0] if math.isnan(tuned) else tuned)
            axes.axhline(value, color="0.4", linestyle="--", label="dense")
    _draw_seconds(panels[-1], table, styles)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = max(1, int(sum(widths) / 1.5))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    return figure


def _draw_quality(
    axes: Any,
    table: pd.DataFrame,
    column: str,
    scale: float,
    budgets: list[str],
    styles: dict[str, Any],
) -> None:
    """Draw the points of each budget side by side, so that they do not overlap."""
    for i, (name, style) in enumerate(styles.items()):
        rows = table[table.strategy == name]
        shift = 0.8 * ((i + 0.5) / len(styles) - 0.5)
        axes.errorbar(
            [budgets.index(b) + shift for b in rows.budget],
            scale * rows[column],
            scale * rows[f"{column}_std"].fillna(0.0),
            linestyle="none",
            markersize=6,
            markeredgecolor="0.2",
            markeredgewidth=0.5,
            capsize=2,
            label=name,
            **style,
        )
    for i in range(0, len(budgets), 2):
        axes.axvspan(i - 0.5, i + 0.5, color="0.95", zorder=0)
    axes.set_xlim(-0.5, len(budgets) - 0.5)
    ticks, title = _ticks(budgets)
    axes.set_xticks(range(len(budgets)), ticks)
    axes.set_xlabel(title)
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(budgets: Sequence[str]) -> tuple[list[str], str]:
    """Tick labels (the differing parts of the budgets), and their common part."""
    pairs = [budget.partition("<=") for budget in budgets]
    if len({name for name, _, _ in pairs}) > 1 or not all(p.count("<=") == 1 for p in budgets):
        return [budget.replace(",", ",\n") for budget in budgets], "budget"
    return [fraction for *_, fraction in pairs], f"{pairs[0][0]} kept, at most"


def _draw_seconds(axes: Any, table: pd.DataFrame, styles: dict[str, Any]) -> None:
    """Draw bars on a logarithmic scale, with the number of evaluations at their ends."""
    totals = table.groupby("strategy")[["search_seconds", "evaluations"]].max()
    seconds = [float(totals.search_seconds[name]) for name in styles]
    axes.barh(range(len(styles)), seconds, color=[style["color"] for style in styles.values()])
    axes.set_xscale("log")
    axes.set_xlim(min(seconds) / 2, max(seconds) * 12)  # room for the numbers
    axes.set_yticks(range(len(styles)), list(styles), fontsize=8)
    for i, (name, value) in enumerate(zip(styles, seconds, strict=True)):
        text = f" {_seconds(value)} s, {totals.evaluations[name]:.4g}"
        axes.annotate(text, (value, i), va="center", fontsize=7)
    axes.set_title("search time and evaluations, all budgets", fontsize=10)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
