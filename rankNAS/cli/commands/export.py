"""``ranknas export``: to other formats, each reloaded and compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from rankNAS.allocation import Allocation
from rankNAS.cli.options.command import reproduction
from rankNAS.cli.options.common import STUDIES
from rankNAS.cli.options.stored import parsing_context, read_options, study_folder
from rankNAS.cli.options.studies import ExportOptions
from rankNAS.cli.output import print_json
from rankNAS.cli.results import load_result, solution_for
from rankNAS.exceptions import StudyError, UnknownNameError, UsageError
from rankNAS.models.artifact import is_configured, load, read_inputs, read_metadata
from rankNAS.models.dtypes import converted
from rankNAS.models.export import FORMATS, export
from rankNAS.models.huggingface.exporting import FOLDERS, export_folder
from rankNAS.models.huggingface.files import Source, parse_size
from rankNAS.models.inputs import InputSpec
from rankNAS.plugins import is_plugin
from rankNAS.search_spaces.zoo import build_model
from rankNAS.search_spaces.zoo.huggingface import PREFIX, is_huggingface
from rankNAS.trees import Inputs, tree_map

__all__ = ["run_export"]


@dataclass(frozen=True, eq=False)
class _Solution:
    """A study's network for a budget, in its file.

    Args:
        folder: The study's folder.
        result: The study's result.
        solution: The entry of the result for the budget.
        artifact: The file of the network.
        output: The file or folder to write; None for one in the study's folder.
    """

    folder: Path
    result: dict[str, Any]
    solution: dict[str, Any]
    artifact: Path
    output: str | None

    @classmethod
    def of(cls, options: ExportOptions) -> _Solution:
        folder, output = _places(options)
        result = load_result(folder)
        with parsing_context(folder / "result.json"):
            solution = solution_for(result, options.budget)
            # Only the file name: the folder may have moved, and no other folder is read.
            artifact = folder / Path(solution["artifact"]).name
        return cls(folder, result, solution, artifact, output)


def run_export(options: ExportOptions) -> None:
    """Export a study's network for a budget, and print the deviation of its outputs."""
    if options.format not in (*FORMATS, *FOLDERS):
        raise UnknownNameError("format", options.format, (*FORMATS, *FOLDERS))
    shard_bytes = parse_size(options.shard_size)
    found = _Solution.of(options)
    with parsing_context(found.folder / "result.json"):
        space = str(found.result["space"])
        classes, sizes = found.result["num_classes"], found.result["input_shape"]
        classes = None if classes is None else int(classes)
        shape = None if sizes is None else tuple(map(int, sizes))
    factory = None
    if is_plugin(space) and not is_configured(found.artifact):
        factory = _factory(options, space, classes, shape)
    network = load(found.artifact, factory)
    if options.dtype is not None:
        converted(network, options.dtype)
    missing: list[str] = []
    if options.format in FOLDERS:
        path = Path(found.output or found.folder / f"{found.artifact.stem}-{options.format}")
        own = options.space or space
        source = Source(_folder_of(own), shard_bytes)
        difference, missing = _export_folder(options, found, network, path, source)
    else:
        suffix = f"-export.{options.format}"
        path = Path(found.output or found.folder / f"{found.artifact.stem}{suffix}")
        difference = export(network, path, options.format, _inputs(found, shape, options.dtype))
    _print(options, path, difference, missing)


def _places(options: ExportOptions) -> tuple[Path, str | None]:
    """The study's folder, and the file or folder to write."""
    if options.format in FOLDERS and options.output is None and options.out != STUDIES:
        with suppress(StudyError):
            return study_folder(options.study, options.out), None
        return study_folder(options.study, STUDIES), options.out
    return study_folder(options.study, options.out), options.output


def _factory(
    options: ExportOptions, space: str, classes: int | None, shape: tuple[int, ...] | None
) -> Callable[[], nn.Module]:
    """The factory of a user's model."""
    if options.space is None:
        raise UsageError(
            f"the study's model comes from {space!r}, whose code would run; name it "
            "with --space if you trust it."
        )
    return partial(build_model, options.space, num_classes=classes, input_shape=shape)


def _inputs(found: _Solution, shape: tuple[int, ...] | None, dtype: str | None) -> Inputs:
    """Random arguments of the network; floating-point tensors have the type of its weights."""
    spec = read_inputs(found.artifact)
    if spec is None and shape is not None:
        spec = InputSpec.of_shape(shape)
    if spec is None:
        raise UsageError(
            f"{str(found.artifact)!r} does not say what inputs its model takes; export it in "
            "Python: rankNAS.models.export.export(network, path, format, inputs)."
        )

    def typed(tensor: Tensor) -> Tensor:
        return tensor.to(getattr(torch, str(dtype))) if tensor.is_floating_point() else tensor

    given = spec.random()
    inputs: Inputs = given if dtype is None else tree_map(typed, given)
    return inputs


def _export_folder(
    options: ExportOptions, found: _Solution, network: nn.Module, path: Path, source: Source
) -> tuple[float | None, list[str]]:
    allocation = Allocation.from_json(read_metadata(found.artifact)["allocation"])
    return export_folder(
        network,
        allocation,
        path,
        options.format,
        inputs=read_inputs(found.artifact),
        source=source,
        dense=found.result["dense"],
        measured=found.solution.get("finetuned") or found.solution["best"],
        command=reproduction(read_options(found.folder)),
        dtype=options.dtype,
    )


def _folder_of(space: str) -> Path | None:
    """The folder of ``hf:FOLDER``, which may have gone; None for any other space."""
    if not is_huggingface(space):
        return None
    return Path(space.removeprefix(PREFIX).partition("?")[0]).expanduser()


def _print(
    options: ExportOptions, path: Path, difference: float | None, missing: list[str]
) -> None:
    for words in missing:
        typer.echo(words, err=True)
    if options.json:
        found = {"file": str(path), "format": options.format}
        print_json(found | {"max_absolute_difference": difference})
    elif difference is None:
        typer.echo(f"{path}: written, not loaded again")
    else:
        typer.echo(f"{path}: max absolute difference of outputs {difference:.3g}")
