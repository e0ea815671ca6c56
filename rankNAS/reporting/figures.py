"""Interactive Plotly figures of a search, from its result document (``result.json``).

Figures set no colours of paper and axes, so they fit a light page and a dark one. User-defined
names are escaped, as Plotly's labels interpret some HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from rankNAS.solver.pareto import non_dominated

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["latency", "pareto", "progress", "ranks"]

Document = Mapping[str, Any]
#: The Okabe-Ito palette, which is safe for colour blindness.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
OPERATOR_COLOURS = dict(zip(("svd", "spatial_svd", "tucker2", "group_svd"), COLOURS, strict=False))
GREY = "#8C8C8C"
COSTS = {"latency": "predicted_latency"}  # metric by budgeted cost, where names differ
NAMES = {
    "macs": "MACs",
    "params": "parameters",
    "weight_bytes": "bytes of weights",
    "layer_macs": "MACs of the layers",
    "layer_params": "parameters of the layers",
}
LONGEST = 24  # maximum characters of a layer's name beside its bar
ROW = 21  # pixels per layer


def progress(result: Document) -> Figure:
    """Figure of the first objective of each trial, with the running best within each budget."""
    name, sign = result["objectives"][0], _signs(result)[0]
    complete = [t for t in result["trials"] if t["state"] == "complete"]
    lost = [t for t in result["trials"] if t["state"] != "complete"]
    values = [t["values"][0] for t in complete]
    figure = _figure("trial", _name(name))
    for i, target in enumerate(_targets(result)):
        for probe in (False, True):
            some = [t for t in complete if t["budget_key"] == target and t["probe"] == probe]
            kind = "probes" if probe else "trials"
            style = {"symbol": "circle-open" if probe else "circle", "size": 6 if probe else 7}
            colour = GREY if probe else _colour(i)
            numbers, heights = [t["number"] for t in some], [t["values"][0] for t in some]
            _points(
                figure, result, some, numbers, heights, f"{_label(target)}, {kind}", colour, style
            )
    for i, solution in enumerate(result["solutions"]):
        steps = _running_best(result, solution, sign)
        figure.add_scatter(
            x=[number for number, _ in steps],
            y=[value for _, value in steps],
            mode="lines",
            line={"shape": "hv", "width": 1.5, "color": _colour(i)},
            name=f"best so far, {_label(solution['budget_key'])}",
            hovertemplate="%{y:.5g} after trial %{x}<extra></extra>",
        )
    if (dense := result["dense"].get(name)) is not None:
        figure.add_hline(dense, line={"dash": "dot", "width": 1, "color": GREY})
        values = [*values, dense]
    for state in dict.fromkeys(t["state"] for t in lost):
        some = [t for t in lost if t["state"] == state]
        floor = [(min(values) if values else 0.0) for _ in some]
        symbol, edge = ("x-thin", "#C0392B") if state == "failed" else ("line-ns", GREY)
        cross = {"symbol": symbol, "size": 8, "line": {"width": 2, "color": edge}}
        _points(figure, result, some, [t["number"] for t in some], floor, state, GREY, cross)
    return figure


def pareto(result: Document) -> list[Figure]:
    """Figures of the first objective against each other one, or against the budgeted cost.

    The cost is used if there is only one objective. Lines are Pareto fronts: within each budget
    for several objectives, of all successful trials for one.
    """
    others = list(result["objectives"][1:])
    return [_against(result, name) for name in others] or [_against(result, None)]


def ranks(solution: Document) -> Figure:
    """Figure of the MACs kept per layer of a solution, with break-even and full rank."""
    from plotly.subplots import make_subplots

    layers = solution["layers"]
    shown = {name: escape(_short(name)) for name in layers}
    figure = make_subplots(
        cols=2, shared_yaxes=True, column_widths=[0.62, 0.38], horizontal_spacing=0.03
    )
    rows = list(range(len(layers)))
    for operator in dict.fromkeys(_operator(layer) for layer in layers.values()):
        some = [i for i, layer in enumerate(layers.values()) if _operator(layer) == operator]
        chosen = [list(layers.items())[i] for i in some]
        figure.add_bar(
            y=some,
            x=[layer["best_macs"] / layer["macs"] for _, layer in chosen],
            orientation="h",
            width=0.68,
            marker={"color": OPERATOR_COLOURS.get(operator, GREY)},
            name=escape(operator),
            text=[escape("x".join(map(str, layer.get("rank") or ()))) for _, layer in chosen],
            textposition="auto",
            textangle=0,
            insidetextanchor="end",
            hovertext=[_layer_hover(solution, name, layer) for name, layer in chosen],
            hovertemplate="%{hovertext}<extra></extra>",
            col=1,
            row=1,
        )
    full = [
        (i, layer["full_macs"] / layer["macs"])
        for i, layer in enumerate(layers.values())
        if layer.get("full_macs")
    ]
    figure.add_scatter(
        y=[i for i, _ in full],
        x=[share for _, share in full],
        mode="markers",
        marker={"symbol": "line-ns", "size": 11, "line": {"width": 2, "color": GREY}},
        name="full rank",
        hovertemplate="full rank: %{x:.2f} times the dense layer's MACs<extra></extra>",
        col=1,
        row=1,
    )
    figure.add_vline(1.0, line={"dash": "dot", "width": 1.2, "color": GREY}, col=1, row=1)
    for name, key, colour in (
        ("dense MACs", "macs", "rgba(140,140,140,0.35)"),
        ("kept MACs", "best_macs", "#4C5A67"),
    ):
        figure.add_bar(
            y=rows,
            x=[layer[key] for layer in layers.values()],
            orientation="h",
            width=0.68 if key == "macs" else 0.34,
            marker={"color": colour},
            name=name,
            hovertemplate="%{x:,} " + name + "<extra></extra>",
            col=2,
            row=1,
        )
    figure.update_layout(
        _layout(ROW * len(layers) + 150, top=52),
        barmode="overlay",
        hovermode="closest",
    )
    figure.update_yaxes(
        tickmode="array",
        tickvals=rows,
        ticktext=list(shown.values()),
        range=[len(layers) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    figure.update_xaxes(showgrid=True, zeroline=False)
    figure.update_xaxes(
        title="MACs over the dense layer's; 1 is break-even", rangemode="tozero", col=1
    )
    figure.update_xaxes(title="MACs of the layer", col=2)
    return figure


def latency(result: Document) -> Figure | None:
    """Figure of the predicted and measured milliseconds of the networks; None without data."""
    networks = {"dense": result["dense"]}
    networks |= {
        _label(solution["budget_key"]): solution["best"] for solution in result["solutions"]
    }
    sources = {
        "predicted": ("predicted_latency", "predicted_latency_std"),
        "measured": ("measured_latency", None),
    }
    figure = _figure("", "milliseconds")
    for i, (source, (key, spread)) in enumerate(sources.items()):
        known = {name: n for name, n in networks.items() if n.get(key) is not None}
        if not known:
            continue
        pairs = [
            (n[key]["seconds"], n[key]["spread"]) if spread is None else (n[key], n.get(spread, 0))
            for n in known.values()
        ]
        figure.add_bar(
            x=list(known),
            y=[1e3 * seconds for seconds, _ in pairs],
            error_y={"array": [1e3 * (sigma or 0.0) for _, sigma in pairs], "thickness": 1.2},
            name=source,
            marker={"color": _colour(i)},
            hovertemplate="%{x}, " + source + ": %{y:.4g} ms<extra></extra>",
        )
    if not figure.data:
        return None
    figure.update_layout(barmode="group", bargap=0.45, height=300, hovermode="closest")
    figure.update_yaxes(rangemode="tozero")
    return figure


def _against(result: Document, other: str | None) -> Figure:
    """Figure of the first objective against another one, or against the cost if None."""
    objectives = result["objectives"]
    name, cost = objectives[0], COSTS.get(result["cost"], result["cost"])
    fraction = other is None and bool(result["dense"].get(cost))

    def across(trial: Document) -> float | None:
        if other is not None:
            return float(trial["values"][objectives.index(other)])
        value = trial["metrics"].get(cost)
        return None if value is None else value / (result["dense"][cost] if fraction else 1.0)

    title = _name(other or result["cost"]) + (" kept, of the dense network's" if fraction else "")
    figure = _figure(title, _name(name))
    complete = [t for t in result["trials"] if t["state"] == "complete" and across(t) is not None]
    for i, target in enumerate(_targets(result)):
        for probe in (False, True):
            some = [t for t in complete if t["budget_key"] == target and t["probe"] == probe]
            style = {"symbol": "circle-open" if probe else "circle", "size": 7, "opacity": 0.75}
            colour = GREY if probe else _colour(i)
            label = f"{_label(target)}, {'probes' if probe else 'trials'}"
            _points(
                figure,
                result,
                some,
                [across(t) for t in some],
                [t["values"][0] for t in some],
                label,
                colour,
                style,
            )
    for i, (label, front) in enumerate(_fronts(result, other, complete, across)):
        figure.add_scatter(
            x=[across(t) for t in front],
            y=[t["values"][0] for t in front],
            mode="lines+markers",
            line={"width": 1.5, "color": _colour(i), "shape": "hv"},
            marker={"symbol": "circle", "size": 10, "line": {"width": 2, "color": "#777"}},
            name=label,
            hovertext=[_trial_hover(result, t) for t in front],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    dense = result["dense"]
    where = 1.0 if fraction else dense.get(other or cost)
    if dense.get(name) is not None and where is not None:
        figure.add_scatter(
            x=[where],
            y=[dense[name]],
            mode="markers",
            marker={"symbol": "diamond", "size": 11, "color": GREY},
            name="dense network",
            hovertemplate="dense network: %{y:.5g}<extra></extra>",
        )
    if fraction:
        figure.update_xaxes(tickformat=".0%")
    return figure


def _fronts(
    result: Document, other: str | None, complete: Sequence[Document], across: Any
) -> list[tuple[str, list[Document]]]:
    """The fronts with their names, each sorted along the horizontal axis."""
    trials = {t["number"]: t for t in complete}
    if other is not None and result["solutions"]:
        several = len(result["solutions"]) > 1
        found = [
            (
                "Pareto front" + (f", {_label(a['budget_key'])}" if several else ""),
                [trials[n] for n in a["pareto_front"] if n in trials],
            )
            for a in result["solutions"]
        ]
    elif complete:
        signs = _signs(result)
        rows = [
            [s * v for s, v in zip(signs, t["values"], strict=True)]
            + ([] if other is not None else [-across(t)])
            for t in complete
        ]
        keep = non_dominated(np.array(rows))
        found = [("Pareto front", [t for t, k in zip(complete, keep, strict=True) if k])]
    else:
        found = []
    return [(label, sorted(front, key=across)) for label, front in found if front]


def _running_best(result: Document, solution: Document, sign: float) -> list[tuple[int, float]]:
    """(number, best value so far) of the trials within the budget of a solution."""
    trials = {t["number"]: t["values"][0] for t in result["trials"] if t["values"]}
    steps: list[tuple[int, float]] = []
    for number in sorted(n for n in solution["feasible"] if n in trials):
        value = trials[number]
        best = value if not steps or sign * value > sign * steps[-1][1] else steps[-1][1]
        steps.append((number, best))
    return steps


def _points(
    figure: Figure,
    result: Document,
    trials: Sequence[Document],
    x: Sequence[float | None],
    y: Sequence[float],
    name: str,
    colour: str,
    style: Mapping[str, Any],
) -> None:
    """Add one point per trial to a figure."""
    if not trials:
        return
    figure.add_scatter(
        x=list(x),
        y=list(y),
        mode="markers",
        marker={"color": colour, **style},
        name=name,
        hovertext=[_trial_hover(result, t) for t in trials],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _trial_hover(result: Document, trial: Document) -> str:
    """Hover text of a trial: its number, state and metrics."""
    lines = [f"<b>trial {trial['number']}</b>" + (" (probe)" if trial["probe"] else "")]
    if trial["state"] != "complete":
        lines.append(escape(f"{trial['state']}: {trial.get('reason', '')}"[:160]))
    for name, value in trial["metrics"].items():
        kept = result["dense"].get(name) if name in NAMES else None
        share = f" ({100 * value / kept:.1f} % kept)" if kept else ""
        lines.append(f"{_name(name)} {value:,.5g}{share}")
    return "<br>".join(lines)


def _layer_hover(solution: Document, name: str, layer: Document) -> str:
    label = solution["best"]["allocation"][name]
    lines = [f"<b>{escape(name)}</b>", escape(" ".join(layer.get("roles", ())))]
    lines += [escape(str(layer.get("shape", ""))), escape(label)]
    for title, key in (("break-even rank", "break_even_rank"), ("full rank", "full_rank")):
        if layer.get(key):
            lines.append(f"{title} {'x'.join(map(str, layer[key]))}")
    lines.append(
        f"{layer['best_macs']:,} of {layer['macs']:,} MACs "
        f"({100 * layer['best_macs'] / layer['macs']:.1f} %)"
    )
    if "predicted_latency" in layer:
        lines.append(
            f"predicted {1e3 * layer['best_predicted_latency']:.4g} ms, dense "
            f"{1e3 * layer['predicted_latency']:.4g} ms"
        )
    return "<br>".join(line for line in lines if line)


def _figure(x: str, y: str) -> Figure:
    from plotly.graph_objects import Figure

    figure = Figure(layout=_layout(400))
    figure.update_xaxes(title=x, zeroline=False, automargin=True)
    figure.update_yaxes(title=y, zeroline=False, automargin=True)
    return figure


def _layout(height: int, top: int = 16) -> dict[str, Any]:
    return {
        "template": {},  # Plotly's default sets colours, and takes 7 kB
        "height": height,
        "margin": {"l": 12, "r": 36, "t": top, "b": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12},
        "legend": {
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "font": {"size": 11},
        },
        "hoverlabel": {"align": "left"},
        "modebar": {"orientation": "v", "bgcolor": "rgba(0,0,0,0)", "color": GREY},
    }


def _signs(result: Document) -> list[float]:
    return [1.0 if d == "maximize" else -1.0 for d in result["directions"]]


def _targets(result: Document) -> list[str]:
    """The labels of the budgets, those of the solutions first."""
    answered = [solution["budget_key"] for solution in result["solutions"]]
    return list(dict.fromkeys([*answered, *(t["budget_key"] for t in result["trials"])]))


def _operator(layer: Document) -> str:
    return str(layer.get("operator", "choice"))


def _label(label: str) -> str:
    return escape(label or "no budget")


def _name(name: str) -> str:
    return escape(NAMES.get(name, name.replace("_", " ")))


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
