"""The report of a search: a self-contained HTML file that needs no network.

The file contains Plotly's library. Its content security policy allows only its own two scripts and
no requests; user-defined names are also escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rankNAS.decompositions.shapes import LAYER_COSTS
from rankNAS.reporting import figures
from rankNAS.reporting.metrics import metric_name, metric_text, quality_names

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["render"]

Document = Mapping[str, Any]


def render(result: Document, options: Mapping[str, Any], command: str = "") -> str:
    """The report as HTML.

    Args:
        result: The result document, as in ``result.json``; for an unfinished search, ``solutions``
            and ``dense`` may be empty.
        options: The options of the search by name, without passwords.
        command: The command that reproduces the study.

    Raises:
        KeyError: The document lacks a required entry.
    """
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    library, script = _Script(get_plotlyjs()), _Script(_resource("report.js"))
    trials, solutions = result["trials"], result["solutions"]
    labels = [a["budget_key"] if a["budget"] else "no budget" for a in solutions]
    return page.from_string(_resource("report.html")).render(
        result=result,
        hashes=f"'{library.hash}' '{script.hash}'",
        about=_about(result),
        figures=_Figures(),
        summary={"labels": labels, "rows": _summary(result), "note": _summary_note(result)},
        progress=figures.progress(result),
        lost=[{"reason": "", **t} for t in trials if t["state"] != "complete"],
        pareto=figures.pareto(result),
        pareto_note=_pareto_note(result),
        labels=labels,
        ranks=[figures.ranks(solution) for solution in solutions],
        latency=figures.latency(result),
        latency_note=_latency_note(result, options),
        options=options,
        command=command,
        made_with=_made_with(result),
        plotly=library,
        script=script,
    )


@dataclass(frozen=True)
class _Script:
    """One of our scripts, inserted into the page without escaping."""

    text: str

    def __html__(self) -> str:
        return self.text

    @property
    def hash(self) -> str:
        """The script's hash in the form of a content security policy."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return f"sha256-{base64.b64encode(digest).decode()}"


@dataclass(frozen=True)
class _Figures:
    """The figures of the page, in order."""

    found: list[str] = field(default_factory=list)

    def add(self, figure: Figure) -> int:
        self.found.append(figure.to_json())
        return len(self.found) - 1

    def json(self) -> _Script:
        """The figures as JSON that is safe in a script element: it contains no ``<``."""
        return _Script(f"[{','.join(self.found)}]".replace("<", "\\u003c"))


def _resource(name: str) -> str:
    return files("rankNAS.reporting").joinpath(name).read_text(encoding="utf-8")


def _about(result: Document) -> str:
    trials = result["trials"]
    probes = sum(t["probe"] for t in trials)
    lost = sum(t["state"] != "complete" for t in trials)
    parts = [f"{len(trials) - probes} trials"]
    parts += [f"{probes} probes"] * bool(probes) + [f"{lost} failed or pruned"] * bool(lost)
    parts += [f"{result['seconds']:,.0f} s"] if "seconds" in result else []
    return f"{result['space']}, searched by {result['strategy']}: {', '.join(parts)}"


def _summary(result: Document) -> list[dict[str, Any]]:
    """Rows of the summary: a name, and a cell for the dense network and each solution."""
    solutions = result["solutions"]
    if not solutions:
        return []
    networks = [result["dense"], *(a["best"] for a in solutions)]
    names = quality_names(result)
    rows = [_row(metric_name(name), networks, name, metric_text) for name in names]
    bounded = {name for a in solutions for name in a["budget"]}
    costs = {n: t for n, t in figures.NAMES.items() if n not in LAYER_COSTS or n in bounded}
    tuned: list[Document] = [{}, *(a.get("finetuned", {}) for a in solutions)]
    rows += [_row(f"{metric_name(name)}, fine-tuned", tuned, name, metric_text) for name in names]
    rows += [_row(title, networks, key, "{:,.0f}".format, True) for key, title in costs.items()]
    rows.append(_row("predicted latency", networks, "predicted_latency", _milliseconds, True))
    measured = [
        {"seconds": n["measured_latency"]["seconds"]} if "measured_latency" in n else {}
        for n in networks
    ]
    rows.append(_row("measured latency", measured, "seconds", _milliseconds, True))
    shown = {*names, *costs, "predicted_latency"}
    rows += [
        _row(name.replace("_", " "), networks, name, "{:.5g}".format)
        for name in result["objectives"]
        if name not in shown
    ]
    return [row for row in rows if any(cell["main"] for cell in row["cells"])]


def _summary_note(result: Document) -> str:
    """What the numbers of the summary are."""
    note = "A share is what is kept of the dense network's."
    if not result["solutions"]:
        return note
    main, *tested = map(metric_name, quality_names(result))
    note += f" {main[0].upper()}{main[1:]} is on the validation samples, which the search sees"
    return note + "".join(f"; {n} on the test samples, which it never sees" for n in tested) + "."


def _row(
    name: str, networks: Sequence[Document], key: str, form: Any, cost: bool = False
) -> dict[str, Any]:
    """A row of the summary; a cost is shown as the fraction kept, with both numbers."""
    whole = networks[0].get(key)
    cells = []
    for network in networks:
        value = network.get(key)
        if value is None:
            cells.append({"main": "", "detail": ""})
        elif cost and whole and network is not networks[0]:
            share = f"{100 * value / whole:.1f} %"
            cells.append({"main": share, "detail": f"{form(value)} of {form(whole)}"})
        else:
            cells.append({"main": form(value), "detail": ""})
    return {"name": name, "cells": cells}


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def _pareto_note(result: Document) -> str:
    if len(result["objectives"]) == 1:
        return (
            "No trial on the line is worse than another one in both; it is that of all trials "
            "that succeeded, whatever the budget."
        )
    volumes = [
        f"{a['budget_key']}: {a['hypervolume']:.5g}"
        for a in result["solutions"]
        if "hypervolume" in a
    ]
    note = "No trial on a line is dominated by another one within the budget."
    return note + (f" Hypervolume: {'; '.join(volumes)}." if volumes else "")


def _latency_note(result: Document, options: Mapping[str, Any]) -> str:
    dense = result["dense"]
    predicted = "predicted_latency" in dense
    found = dense.get("measured_latency")
    notes = [
        f"Predicted for {options.get('hardware', 'the hardware')}, whole network."
        if predicted
        else "Latency was not predicted: no budget or objective asked for it."
    ]
    notes.append(
        f"Measured on the machine of the search, end to end, the networks in turns over "
        f"{found['rounds']} rounds: medians, with the standard deviation of the median."
        if found
        else "Not measured."
    )
    return " ".join(notes)


def _made_with(result: Document) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items())
    machine = result.get("machine")
    parts = [f"Made with {versions}."] if versions else []
    if machine:
        parts.append(
            f"{machine['system']} on {machine['architecture']}, {machine['processors']} "
            f"processors, {machine['threads']} threads."
        )
    return " ".join(parts)
