"""``ranknas export``: to other formats, each reloaded and compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from rankNAS.artifact import load
from rankNAS.cli.options import study_folder
from rankNAS.cli.output import print_json
from rankNAS.cli.results import answer_to, load_result
from rankNAS.exceptions import UnknownNameError, UsageError
from rankNAS.export import FORMATS, export
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
    artifact = folder / Path(answer_to(result, list(budget))["artifact"]).name
    factory = None
    if is_plugin(result["space"]):
        if space is None:
            raise UsageError(
                f"the study's model comes from {result['space']!r}, whose code would run; name it "
                "with --space if you trust it."
            )
        classes = result["num_classes"]

        def factory() -> object:
            return build_model(
                space, num_classes=classes, input_shape=tuple(result["input_shape"])
            )

    network = load(artifact, factory)  # type: ignore[arg-type]
    path = Path(output) if output else folder / f"{artifact.stem}-export.{format}"
    difference = export(network, path, format, tuple(result["input_shape"]))
    if as_json:
        print_json({"file": str(path), "format": format, "max_absolute_difference": difference})
    else:
        typer.echo(f"{path}: max absolute difference of outputs {difference:.3g}")
