"""``ranknas resume``."""

from __future__ import annotations

from dataclasses import replace

from rankNAS.cli.commands.search import run_search
from rankNAS.cli.options.search import ResumeOptions, SearchControl, check_trusted
from rankNAS.cli.options.stored import read_options, study_folder

__all__ = ["run_resume"]


def run_resume(options: ResumeOptions) -> None:
    """Continue a study with the options in its folder, some of them changed.

    Changed budgets must bound the same costs.
    """
    stored, changes = read_options(study_folder(options.study, options.out)), options.changes
    if not options.trust_study:
        # A storage given on the command line replaces that of the file.
        check_trusted(replace(stored, storage=None) if "storage" in changes else stored)
    control = SearchControl(
        resume=True, json=options.json, quiet=options.quiet, time_limit=options.time_limit
    )
    run_search(replace(stored, **changes), control)
