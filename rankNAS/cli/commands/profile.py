"""``ranknas profile``: measure this machine; validate predictions on whole networks."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import typer

from rankNAS.allocation import Allocation, Choice
from rankNAS.cli.loading import image_side, rank_policy
from rankNAS.cli.options.common import OutputOptions
from rankNAS.cli.options.profile import ProfileOptions
from rankNAS.cli.options.stored import parsing_context, study_folder
from rankNAS.cli.output import print_json, print_table, progress_display
from rankNAS.cli.results import load_result
from rankNAS.exceptions import StudyError, UsageError
from rankNAS.hw_models import (
    Agreement,
    Host,
    agreement,
    compile_latency,
    make_hardware,
    validate,
)
from rankNAS.hw_models.networks import random_allocations
from rankNAS.hw_models.tokens import first_tokens
from rankNAS.io.files import save_atomically
from rankNAS.search_spaces.base import SearchSpace
from rankNAS.search_spaces.compiler import compile_space
from rankNAS.search_spaces.plain_layers import with_plain_layers
from rankNAS.search_spaces.zoo import build_model
from rankNAS.search_spaces.zoo.huggingface import example_inputs, is_huggingface
from rankNAS.settings import check_device
from rankNAS.tasks import METRICS
from rankNAS.trees import Inputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run_profile"]

BEST = 10  # allocations of a study


def run_profile(options: ProfileOptions, control: OutputOptions) -> None:
    """Measure, predict, and optionally validate."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    policy = rank_policy(options)
    check_device(options.device)
    size = image_side(options.space, options.image_size)
    shape = (3, size, size)
    model = build_model(options.space, num_classes=options.num_classes, input_shape=shape)
    model = with_plain_layers(model).to(options.device).eval()
    inputs: Any = torch.randn(1, *shape, device=options.device)
    if is_huggingface(options.space):
        inputs = example_inputs(model, options.image_size)
    inputs = first_tokens(model, Inputs.of(inputs), options.tokens)
    space = compile_space(model, inputs, policy=policy, exclude=options.exclude)
    space = space.at_batch(options.batch)
    allocations = _allocations(options, space)
    hardware = make_hardware(options.hw)
    if isinstance(hardware, Host) and hardware.measures:
        hardware = replace(
            hardware,
            device=options.device,
            shapes=options.shapes,
            general=options.general,
            file=None if options.out is None else Path(options.out),
            seed=options.seed + 1,  # differ from the validation allocations
        )
    rows, interrupted = None, False

    def on_rows(so_far: pd.DataFrame) -> None:
        nonlocal rows
        rows = so_far

    with progress_display(control.quiet) as progress:
        try:
            hardware = hardware.bind(model, space, inputs, partial(progress.stage, "measure"))
            tables = compile_latency(hardware, space)
            if allocations:
                validate(
                    tables,
                    model,
                    inputs,
                    allocations,
                    batch=options.batch,
                    device=options.device,
                    seconds=options.seconds,
                    seed=options.seed,
                    on_progress=partial(progress.stage, "validate"),
                    on_rows=on_rows,
                )
        except KeyboardInterrupt:
            progress.say("interrupted; what was measured is kept. The same command goes on.")
            if rows is None:
                sys.exit(130)
            interrupted = True
    dense = tables.predict(space.dense)
    document: dict[str, Any] = {"predicted_dense": dense[0], "predicted_dense_std": dense[1]}
    if isinstance(hardware, Host) and hardware.profile is not None:
        document["file"] = str(hardware.path)
        document["shapes_measured"] = len(hardware.profile.stages)
    if rows is not None:
        timed = hardware.fit.timed if isinstance(hardware, Host) else math.nan
        document |= _write(rows, agreement(rows, timed), options)
    _print(document, rows, options, control.json)
    if interrupted:
        sys.exit(130)


def _allocations(options: ProfileOptions, space: SearchSpace) -> dict[str, Allocation]:
    found = random_allocations(space, options.validate, options.seed)
    named = {f"random {i}": allocation for i, allocation in enumerate(found)}
    if options.study is not None:
        for name, allocation in _best_of(study_folder(options.study, options.studies)):
            try:
                space.check(allocation)
            except UsageError as error:
                raise StudyError(
                    f"study {options.study!r} has another space than {options.space!r}: {error}"
                ) from None
            named[name] = allocation
    return named


def _best_of(folder: Path) -> list[tuple[str, Allocation]]:
    """The best trials of a study in its main metric, by name."""
    result = load_result(folder)
    with parsing_context(folder / "result.json"):
        complete = [t for t in result["trials"] if t["state"] == "complete" and not t["probe"]]
        name, sign = result["metrics"][0], _sign(result)
        complete.sort(key=lambda t: -sign * t["metrics"].get(name, -sign * math.inf))
        return [
            (
                f"trial {t['number']}",
                Allocation.of({n: Choice.parse(label) for n, label in t["allocation"].items()}),
            )
            for t in complete[:BEST]
        ]


def _sign(result: Mapping[str, Any]) -> int:
    """1 if the main metric of a study is maximised, -1 if it is minimised."""
    known = {name: direction for name, (direction, _) in METRICS.items()}
    known |= dict(zip(result["objectives"], result["directions"], strict=True))
    return -1 if known.get(result["metrics"][0]) == "minimize" else 1


def _write(rows: pd.DataFrame, found: Agreement, options: ProfileOptions) -> dict[str, Any]:
    """Write rows and plot beside the device file, or in the current folder; return the numbers."""
    stem = Path(options.out).with_suffix("") if options.out else Path("ranknas-profile")
    table, picture = (stem.with_name(f"{stem.name}-validation.{x}") for x in ("csv", "png"))
    save_atomically(table, lambda path: rows.to_csv(path, index=False))
    figure = draw(rows)
    save_atomically(picture, lambda path: figure.savefig(path, format="png"))
    return {"validation": asdict(found), "rows": str(table), "picture": str(picture)}


def draw(rows: pd.DataFrame) -> Figure:
    """Plot of measured against predicted latency with a 10 % band; the dense network is marked."""
    from matplotlib.figure import Figure

    figure = Figure((4.6, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    dense, others = rows.iloc[:2], rows.iloc[2:]
    high = 1.08e3 * float(rows[["predicted", "measured"]].to_numpy().max())
    axes.fill_between([0, high], [0, 0.9 * high], [0, 1.1 * high], color="0.92", label="± 10 %")
    axes.plot([0, high], [0, high], color="0.6", linewidth=0.8)
    for part, label, colour in ((others, "allocations", "C0"), (dense, "dense", "C3")):
        axes.errorbar(
            1e3 * part.predicted,
            1e3 * part.measured,
            xerr=1e3 * part.sigma,
            yerr=1.96e3 * part.deviation,
            fmt="o",
            markersize=4,
            elinewidth=0.6,
            color=colour,
            label=label,
        )
    low = 0.9e3 * float(rows[["predicted", "measured"]].to_numpy().min())
    axes.set(xlim=(low, high), ylim=(low, high), xlabel="predicted, ms", ylabel="measured, ms")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _at_least(perfect: tuple[float, float]) -> str:
    low, median = perfect
    if math.isnan(median):
        return "unknown"
    return f"{median:.3f}, at least {low:.3f} in 19 of 20"


def _print(
    document: dict[str, Any], rows: pd.DataFrame | None, options: ProfileOptions, as_json: bool
) -> None:
    if as_json:
        print_json(json.loads(pd.Series(document).to_json()))
        return
    lines: list[tuple[str, str]] = []
    if "file" in document:
        lines.append(("shapes measured", str(document["shapes_measured"])))
    seconds, sigma = document["predicted_dense"], document["predicted_dense_std"]
    lines.append(("dense network, predicted", f"{1e3 * seconds:.3g} ± {1e3 * sigma:.2g} ms"))
    if rows is not None:
        found = document["validation"]
        lines += [
            ("dense network, measured", f"{1e3 * rows.measured.iloc[:2].mean():.3g} ms"),
            ("allocations within 10 %", f"{100 * found['within']:.1f} % of {len(rows) - 2}"),
        ]
        if not math.isnan(found["slowness"]):
            lines += [
                ("dense network, now against profiled", f"{found['slowness']:.3f}"),
                ("within 10 % at the profile's speed", f"{100 * found['matched']:.1f} %"),
            ]
        lines += [
            ("within 10 % relative to dense", f"{100 * found['relative']:.1f} %"),
            ("mean absolute error", f"{100 * found['mape']:.2g} %"),
            ("bias", f"{100 * found['bias']:+.2g} %"),
            ("rank correlation", f"{found['spearman']:.3f}"),
            ("the same, of a perfect prediction", _at_least(found["perfect"])),
            ("noise: dense against itself", f"{100 * found['floor']:.2g} %"),
            ("noise: 95 % interval", f"± {100 * found['uncertainty']:.2g} %"),
        ]
    title = f"{options.space} on {options.hw}, batch size {options.batch}"
    print_table(title, ("", "value"), lines)
    for name in ("file", "rows", "picture"):
        if name in document:
            typer.echo(document[name])
