"""``ranknas export``: to other formats, each reloaded and compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import typer

from rankNAS.cli.options import parsing_context, study_folder
from rankNAS.cli.output import print_json
from rankNAS.cli.results import load_result, solution_for
from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.models.artifact import load
from rankNAS.models.export import FORMATS, export
from rankNAS.plugins import is_plugin
from rankNAS.search_spaces.zoo import build_model

__all__ = ["run_export"]


def run_export(
    study: str,
    out: str,
    format: str,
    output: str | None,
    space: str | None,
    budget: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Write a study's network for a budget in a format, and print how far its outputs are off."""
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    folder = study_folder(study, out)
    result = load_result(folder)
    with parsing_context(folder / "result.json"):
        # Its name alone: wherever the folder is now, and nowhere else.
        artifact = folder / Path(solution_for(result, list(budget))["artifact"]).name
        searched = str(result["space"])
        classes, shape = int(result["num_classes"]), tuple(map(int, result["input_shape"]))
    factory = None
    if is_plugin(searched):
        if space is None:
            raise UsageError(
                f"the study's model comes from {searched!r}, whose code would run; name it "
                "with --space if you trust it."
            )
        factory = partial(build_model, space, num_classes=classes, input_shape=shape)
    network = load(artifact, factory)
    path = Path(output) if output else folder / f"{artifact.stem}-export.{format}"
    difference = export(network, path, format, shape)
    if as_json:
        print_json({"file": str(path), "format": format, "max_absolute_difference": difference})
    else:
        typer.echo(f"{path}: max absolute difference of outputs {difference:.3g}")
