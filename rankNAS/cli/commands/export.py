"""``ranknas export``: to other formats, each reloaded and compared."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import typer

from rankNAS.cli.options.stored import parsing_context, study_folder
from rankNAS.cli.options.studies import ExportOptions
from rankNAS.cli.output import print_json
from rankNAS.cli.results import load_result, solution_for
from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.models.artifact import load, read_inputs
from rankNAS.models.export import FORMATS, export
from rankNAS.plugins import is_plugin
from rankNAS.search_spaces.zoo import build_model

__all__ = ["run_export"]


def run_export(options: ExportOptions) -> None:
    """Export a study's network for a budget, and print the deviation of its outputs."""
    if options.format not in FORMATS:
        raise UnknownNameError("format", options.format, FORMATS)
    folder = study_folder(options.study, options.out)
    result = load_result(folder)
    with parsing_context(folder / "result.json"):
        # Only the file name: the folder may have moved, and no other folder is read.
        artifact = folder / Path(solution_for(result, options.budget)["artifact"]).name
        searched = str(result["space"])
        classes, sizes = result["num_classes"], result["input_shape"]
        classes = None if classes is None else int(classes)
        shape = None if sizes is None else tuple(map(int, sizes))
    factory = None
    if is_plugin(searched):
        if options.space is None:
            raise UsageError(
                f"the study's model comes from {searched!r}, whose code would run; name it "
                "with --space if you trust it."
            )
        factory = partial(build_model, options.space, num_classes=classes, input_shape=shape)
    network = load(artifact, factory)
    suffix = f"-export.{options.format}"
    path = Path(options.output) if options.output else folder / f"{artifact.stem}{suffix}"
    inputs = read_inputs(artifact) or shape
    if inputs is None:
        raise UsageError(
            f"{str(artifact)!r} does not say what inputs its model takes; export it in Python: "
            "rankNAS.models.export.export(network, path, format, inputs)."
        )
    difference = export(network, path, options.format, inputs)
    if options.json:
        found = {"file": str(path), "format": options.format}
        print_json(found | {"max_absolute_difference": difference})
    else:
        typer.echo(f"{path}: max absolute difference of outputs {difference:.3g}")
