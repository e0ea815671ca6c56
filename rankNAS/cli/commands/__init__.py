"""The table of commands: their summaries and options. Each command has a module that runs it."""

from __future__ import annotations

from rankNAS.cli.options.common import JsonOptions, OutputOptions
from rankNAS.cli.options.compare import CompareControl, CompareOptions
from rankNAS.cli.options.fields import Options
from rankNAS.cli.options.profile import CompileOptions, ProfileOptions
from rankNAS.cli.options.search import ResumeOptions, SearchControl, SearchOptions
from rankNAS.cli.options.studies import (
    DashboardOptions,
    ExportOptions,
    ReportOptions,
    ShowOptions,
)

__all__ = ["COMMANDS"]

#: By name of the command: its target, its summary, and its options.
COMMANDS: dict[str, tuple[str, str, tuple[type[Options], ...]]] = {
    "search": (
        "search:run_search",
        "Search the ranks of a network under one budget or several, and keep the result.\n\n"
        "Further options: `ranknas search --print-config`.",
        (SearchOptions, SearchControl),
    ),
    "compare": (
        "compare:run_compare",
        "Compare strategies on equal terms, over budgets and seeds.\n\n"
        "Writes results.csv, differences.csv, summary.md, summary.tex and comparison.png. "
        "Further options: `ranknas compare --print-config`.",
        (CompareOptions, CompareControl),
    ),
    "resume": (
        "resume:run_resume",
        "Continue a study with the options it was started with, or with another budget.",
        (ResumeOptions,),
    ),
    "show": (
        "show:run_show",
        "Show a study: its result, its best trials and the chosen ranks.",
        (ShowOptions,),
    ),
    "compile": (
        "compile:run_compile",
        "Print the search space of a model: layers, choices, costs, and why layers stay dense.",
        (CompileOptions,),
    ),
    "export": (
        "export:run_export",
        "Export the network of a study, reload it and compare outputs.",
        (ExportOptions,),
    ),
    "report": (
        "report:run_report",
        "Write one self-contained HTML file about a study: tables, figures, configuration.",
        (ReportOptions,),
    ),
    "dashboard": (
        "dashboard:run_dashboard",
        "Open a study in optuna-dashboard (needs the extra `dashboard`).",
        (DashboardOptions,),
    ),
    "profile": (
        "profile:run_profile",
        "Measure the layers of a space on this machine; validate predictions on whole networks.",
        (ProfileOptions, OutputOptions),
    ),
    "spaces": ("lists:run_spaces", "List the built-in search spaces.", (JsonOptions,)),
    "strategies": ("lists:run_strategies", "List the strategies.", (JsonOptions,)),
    "recipes": ("recipes:run_recipes", "List the recipes of --recover.", (JsonOptions,)),
    "tasks": ("lists:run_tasks", "List the tasks: what a network is for.", (JsonOptions,)),
    "objectives": ("lists:run_objectives", "List the objectives.", (JsonOptions,)),
    "hardware": (
        "lists:run_hardware",
        "List the hardware models and devices for latency prediction.",
        (JsonOptions,),
    ),
}
