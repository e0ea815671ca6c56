"""``ranknas report``: one HTML file about a study."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path

import typer

from rankNAS.cli.documents import study_document, without_passwords
from rankNAS.cli.options import SearchOptions, parsing_context, read_options, study_folder
from rankNAS.cli.output import print_json
from rankNAS.exceptions import UsageError
from rankNAS.io.files import save_atomically
from rankNAS.reporting.html import render
from rankNAS.storage.redaction import redacted

__all__ = ["reproduction", "run_report"]


def run_report(
    study: str, out: str, output: str | None, *, trust_study: bool, as_json: bool
) -> None:
    """Write the report of a study and print where it is.

    Raises:
        UsageError: The file cannot be written.
    """
    options = read_options(study_folder(study, out))
    path = Path(output) if output else options.folder / "report.html"
    given = without_passwords({k: v for k, v in options.to_json().items() if k != "out"})
    shown = {name.replace("_", " "): _words(value) for name, value in given.items()}
    with parsing_context(options.folder / "result.json"):
        document = without_passwords(study_document(options, trust=trust_study))
        text = render(document, shown, redacted(reproduction(options)))
    try:
        save_atomically(path, lambda temporary: _write(temporary, text))
    except OSError as error:
        raise UsageError(
            f"the report {str(path)!r} cannot be written ({error.strerror}); give another "
            "--output."
        ) from None
    if as_json:
        print_json({"file": str(path), "bytes": len(text.encode())})
    else:
        typer.echo(path)


def reproduction(options: SearchOptions) -> str:
    """The command that begins the same search: the options that are not the default ones."""
    words = ["ranknas", "search"]
    for field in fields(options):
        value, name = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        default = getattr(SearchOptions(), field.name)
        if field.name in ("out", "study") or (value == default and field.name != "space"):
            continue
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
            continue
        for item in value if isinstance(value, list) else [value]:
            words += [name, shlex.quote(str(item))]
    return " ".join(words)


def _words(value: object) -> str:
    """An option's value to read."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
