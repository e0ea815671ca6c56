"""Text is printed as it is: markup and emoji in names have no meaning."""

from __future__ import annotations

import pytest

from rankNAS.cli.output import print_table, progress_display

NAMES = ("[/red]", "[bold]", ":smile:", "layer[0]")


def test_names_that_look_like_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("of [/red]", ("[/blue]", "value"), [(name, 1) for name in NAMES])
    printed = capsys.readouterr().out
    assert all(text in printed for text in (*NAMES, "of [/red]", "[/blue]"))


def test_progress_with_names_that_look_like_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display(quiet=False) as progress:
        for name in NAMES:
            progress.stage(name, 1, 2, f"note {name}")
            progress.say(f"said {name}")
    printed = capsys.readouterr().err
    assert all(f"said {name}" in printed for name in NAMES)
    assert "note [/red]" in printed
