"""The tables of a comparison in LaTeX."""

from __future__ import annotations

import re

import pandas as pd

from rankNAS.reporting.comparison import labels_note, noise_note, tables

__all__ = ["latex"]

#: Characters that LaTeX reads as commands, and symbols that its fonts lack.
ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<=": r"$\leq$",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "†": r"$\dagger$",
}
PATTERN = re.compile("|".join(map(re.escape, sorted(ESCAPES, key=len, reverse=True))))


def latex(rows: pd.DataFrame, differences: pd.DataFrame | None = None) -> str:
    """One ``table`` for each budget; it needs no package.

    Args:
        rows: Rows from `rankNAS.comparison.compare`.
        differences: From `rankNAS.reporting.significance.differences`; None leaves them out.
    """
    noise = "" if differences is None else noise_note(differences)
    note = " ".join(filter(None, [noise, labels_note(rows)]))
    lines: list[str] = []
    for budget, (columns, body) in tables(rows, differences).items():
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{_text(budget)}. {_text(note)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\hline"]
        lines += [_line(columns), r"\hline", *map(_line, body), r"\hline"]
        lines += [r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return " & ".join(map(_text, cells)) + r" \\"


def _text(text: str) -> str:
    r"""A text whose characters LaTeX prints.

    >>> print(_text("macs<=0.5, ± 3 %"))
    macs$\leq$0.5, $\pm$ 3 \%
    """
    return PATTERN.sub(lambda found: ESCAPES[found[0]], text)
