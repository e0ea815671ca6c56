"""``ranknas report``: one HTML file about a study."""

from __future__ import annotations

from pathlib import Path

import typer

from rankNAS.cli.documents import study_document, without_passwords
from rankNAS.cli.options.command import reproduction
from rankNAS.cli.options.stored import parsing_context, read_options, study_folder
from rankNAS.cli.options.studies import ReportOptions
from rankNAS.cli.output import print_json
from rankNAS.exceptions import UsageError
from rankNAS.io.files import save_atomically
from rankNAS.reporting.html import render
from rankNAS.storage.redaction import redacted

__all__ = ["run_report"]


def run_report(options: ReportOptions) -> None:
    """Write the report of a study and print its path.

    Raises:
        UsageError: The file cannot be written.
    """
    searched = read_options(study_folder(options.study, options.out))
    path = Path(options.output) if options.output else searched.folder / "report.html"
    given = without_passwords({k: v for k, v in searched.to_json().items() if k != "out"})
    shown = {name.replace("_", " "): _words(value) for name, value in given.items()}
    with parsing_context(searched.folder / "result.json"):
        document = without_passwords(study_document(searched, trust=options.trust_study))
        text = render(document, shown, redacted(reproduction(searched)))
    try:
        save_atomically(path, lambda temporary: _write(temporary, text))
    except OSError as error:
        raise UsageError(
            f"the report {str(path)!r} cannot be written ({error.strerror}); give another "
            "--output."
        ) from None
    if options.json:
        print_json({"file": str(path), "bytes": len(text.encode())})
    else:
        typer.echo(path)


def _words(value: object) -> str:
    """An option's value as readable text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
