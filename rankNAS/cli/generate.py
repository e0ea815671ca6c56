"""Generates typer command functions from option dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankNAS.cli.options.common import ConfigurableOptions
from rankNAS.cli.options.fields import (
    OUTPUT,
    PANELS,
    Options,
    Spec,
    flag,
    specs,
    with_current_names,
)
from rankNAS.cli.options.toml_file import read_toml, to_toml
from rankNAS.lazy import load

__all__ = ["make_command"]

#: Names of types in the help; a flag takes no value.
METAVARS = {str: "TEXT", int: "INT", float: "NUMBER", bool: " "}


def make_command(summary: str, target: str, *groups: type[Options]) -> Callable[..., None]:
    """A function whose parameters are the options of dataclasses.

    Args:
        summary: Summary of the command for its help.
        target: ``module:function`` that runs the command, imported at run time. It receives one
            object of each dataclass.
        groups: The dataclasses. If one of them has the option ``--config``, the file contains
            options of the first.
    """

    def command(ctx: typer.Context, **values: Any) -> None:
        given = {name: value for name, value in values.items() if _is_given(ctx, name)}
        made = _made(groups, given)
        if any(getattr(options, "print_config", False) for options in made):
            typer.echo(to_toml(made[0]), nl=False)
        else:
            load(target)(*made)

    parameters = [_CONTEXT, *_parameters(groups), _HELP]
    command.__doc__ = summary
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _made(groups: Sequence[type[Options]], given: dict[str, Any]) -> list[Options]:
    """Option objects; values come from the command line, else the file, else the defaults."""
    made = []
    for cls in groups:
        known = {spec.name for spec in specs(cls)}
        known |= {old for spec in specs(cls) for old in spec.old_names}
        own = {name: value for name, value in given.items() if name in known}
        made.append(with_current_names(cls, own, flag))
    for cls, own in zip(groups, made, strict=True):
        if issubclass(cls, ConfigurableOptions) and own.get("config") is not None:
            made[0] = read_toml(Path(own["config"]), groups[0]) | made[0]
    return [cls(**own) for cls, own in zip(groups, made, strict=True)]


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parameters(groups: Sequence[type[Options]]) -> list[inspect.Parameter]:
    """Parameters of all options, in the order of the panels of the help."""
    every = [spec for cls in groups for spec in specs(cls)]
    every.sort(key=lambda spec: PANELS.index(spec.option.panel))
    named = [_parameter(spec) for spec in every]
    return named + [_parameter(spec, old) for spec in every for old in spec.old_names]


def _parameter(spec: Spec, old: str | None = None) -> inspect.Parameter:
    """The parameter of an option, or of its earlier name, which is hidden in the help."""
    name, option = old or spec.name, spec.option
    if option.positional:
        info = typer.Argument(help=option.help, metavar=name.upper())
        return _named(name, Annotated[spec.kind, info], inspect.Parameter.empty)
    forms = [flag(name)]
    if spec.kind is bool and option.negatable:
        forms = [f"{flag(name)}/{flag('no_' + name)}"]
    info = typer.Option(
        *forms,
        help=option.help,
        hidden=option.hidden or old is not None,
        metavar=METAVARS.get(spec.plain_kind, "TEXT"),
        rich_help_panel=option.panel,
        show_default=spec.default is not False,
    )
    return _named(name, Annotated[spec.kind, info], spec.default)


def _named(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def _show_help(ctx: typer.Context, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        typer.echo(ctx.get_help(), color=ctx.color)
        raise typer.Exit


_CONTEXT = _named("ctx", typer.Context, inspect.Parameter.empty)
#: Shown in the last panel; typer's own help option would be in the first.
_HELP = _named(
    "help",
    Annotated[
        bool,
        typer.Option(
            "--help",
            "-h",
            callback=_show_help,
            is_eager=True,
            help="Show this message and exit.",
            metavar=METAVARS[bool],
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ],
    False,
)
