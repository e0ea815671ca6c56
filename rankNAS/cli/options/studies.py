"""The options of the commands that read a study: show, export, report and dashboard."""

from __future__ import annotations

from dataclasses import dataclass

from rankNAS.cli.options.common import JsonOptions, StudyOptions, TrustOptions
from rankNAS.cli.options.fields import GOAL, MODEL, OUTPUT, RUNNING, option

__all__ = ["DashboardOptions", "ExportOptions", "ReportOptions", "ShowOptions"]


@dataclass(frozen=True, kw_only=True)
class ShowOptions(JsonOptions, StudyOptions):
    """A study to show."""

    top: int = option(10, "Number of trials to list.", OUTPUT)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(JsonOptions, StudyOptions):
    """A network to export."""

    format: str = option(
        "safetensors",
        "Format: safetensors, onnx or pt2 (a file); hf (a folder for transformers); peft (a base "
        "as large as the dense model with zeros in place of decomposed weights, and LoRA adapters "
        "that are the factors: for training them; operator svd alone).",
        OUTPUT,
    )
    output: str | None = option(
        None,
        "File or folder to write. For hf and peft, --out names it too if it has no such study.",
        OUTPUT,
    )
    dtype: str | None = option(
        None,
        "Type of the stored weights: float32, bfloat16, float16 or float64. Default: as they are.",
        OUTPUT,
    )
    shard_size: str = option(
        "5GB", "Largest size of a safetensors shard, for hf and peft.", OUTPUT
    )
    space: str | None = option(
        None,
        "file.py:factory of the model, for a study of a model of your own; or hf:FOLDER with the "
        "tokenizer to copy, if the study's folder has moved.",
        MODEL,
    )
    budget: list[str] = option(
        [], "Budget whose network is exported. Default: the study's first.", GOAL
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(JsonOptions, TrustOptions, StudyOptions):
    """A study to report on."""

    output: str | None = option(
        None, "File to write. Default: report.html in the study's folder.", OUTPUT
    )


@dataclass(frozen=True, kw_only=True)
class DashboardOptions(TrustOptions, StudyOptions):
    """A study to serve."""

    host: str = option(
        "127.0.0.1",
        "Bind address. Anything but 127.0.0.1 exposes the dashboard to the network.",
        RUNNING,
    )
    port: int = option(8080, "Port; 0 selects a free one.", RUNNING, min=0, max=65535)
