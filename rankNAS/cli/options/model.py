"""The options that ``ranknas search`` and ``ranknas compare`` share."""

from __future__ import annotations

from dataclasses import dataclass

from rankNAS.budget import parse_budgets
from rankNAS.cli.options.common import SpaceOptions
from rankNAS.cli.options.fields import (
    EVALUATION,
    GOAL,
    HARDWARE,
    MODEL,
    RANKS,
    RUNNING,
    SEARCH,
    TRAINING,
    option,
)
from rankNAS.renamed import OBJECTIVES

__all__ = ["ModelOptions"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(SpaceOptions):
    """A dense model, its data, the goal of a search and the measurement of candidates."""

    budget: list[str] = option(
        [],
        "Fraction kept of the dense MACs, or COST=FRACTION; COST is macs, params, weight_bytes, "
        "latency, layer_macs or layer_params. Repeat for joint constraints. A comma-separated "
        "list runs one search per budget.",
        GOAL,
    )
    cost: str = option(
        "macs",
        "Cost that a bare --budget bounds: macs, params, weight_bytes, layer_macs, layer_params "
        "or latency.",
        GOAL,
        hidden=True,
    )
    objective: list[str] = option(
        [],
        "Objective: a name (see `ranknas objectives`) or file.py:function[=minimize]. Default: "
        "the task's first metric. Repeatable.",
        GOAL,
        renamed_values=OBJECTIVES,
    )
    data: str = option(
        "digits",
        "Data: digits, parquet:DIR, imagefolder:DIR, cifar10:DIR, text:PATH, jsonl:PATH, "
        "tokens:DIR, datasets:DIR or file.py:factory.",
        MODEL,
    )
    context: int | None = option(
        None, "Tokens of a window of text. Default: at most 1024.", MODEL, min=2
    )
    stride: int | None = option(
        None,
        "Begin the windows of validation and test text so many tokens after each other; only new "
        "tokens count. Default: the context.",
        MODEL,
        min=1,
        hidden=True,
    )
    task: str | None = option(
        None,
        "Task: a name (see `ranknas tasks`) or file.py:function. Default: inferred.",
        MODEL,
    )
    normalize: str | None = option(
        None,
        "Normalisation of images: imagenet, cifar10 or MEAN,STD. Default: the weights' metadata, "
        "else imagenet.",
        MODEL,
        hidden=True,
    )
    weights: str | None = option(
        None,
        "Weights: a safetensors or state-dict file, or 'pretrained'. Default: train first.",
        MODEL,
    )
    trials: int = option(
        40, "Total number of trials per budget; probes are not counted.", SEARCH, min=1
    )
    refine: bool = option(
        False,
        "Refine each chosen network block by block towards the dense one; reads no labels.",
        TRAINING,
    )
    refine_steps: int | None = option(
        None,
        "Refine, with so many steps for two neighbouring blocks (one, if blocks are streamed). "
        "Default of --refine: 300.",
        TRAINING,
        min=1,
        hidden=True,
    )
    finetune: int = option(
        0,
        "Epochs of fine-tuning of each chosen network: --recover plain:epochs=N.",
        TRAINING,
        min=0,
        hidden=True,
    )
    recover: str | None = option(
        None,
        "Train each chosen network by a recipe, NAME:key=value,…, such as plain:epochs=5; see "
        "`ranknas recipes`.",
        TRAINING,
    )
    distill: float = option(
        0.5, "Weight of distillation from the dense model.", TRAINING, hidden=True
    )
    learning_rate: float = option(0.01, "Peak learning rate.", TRAINING, hidden=True)
    norm: str | None = option(
        None,
        "Norm of the decomposition error: fisher, input, pooled, asvd or weight. Default: that "
        "of the method, if it was published with one, else fisher.",
        RANKS,
    )
    calibration: int | None = option(
        None,
        "Training samples for layer statistics. Default: 1024, or 32768 tokens.",
        EVALUATION,
        min=1,
    )
    validation: int | None = option(
        None,
        "Samples for the objectives. Default: 1024, or 16384 tokens.",
        EVALUATION,
        min=1,
    )
    batch_norm: bool = option(
        True,
        "Correct batch-norm statistics after truncation.",
        EVALUATION,
        hidden=True,
        negatable=True,
    )
    sequential: bool = option(
        True,
        "Refit layers sequentially to compressed activations.",
        EVALUATION,
        hidden=True,
        negatable=True,
    )
    hardware: str = option(
        "host",
        "Latency model: a name (see `ranknas hardware`), a device file (.toml, .json), a table of "
        "measured layers (.csv) or file.py:function(layer, choice) -> seconds.",
        HARDWARE,
    )
    latency_batch: int = option(
        1, "Batch size of the forward pass whose latency counts.", HARDWARE, min=1, hidden=True
    )
    latency_tokens: int | None = option(
        None,
        "Tokens of each sample whose latency counts, 1 for decoding. Default: all.",
        HARDWARE,
        min=1,
        hidden=True,
    )
    strict_hw: bool = option(
        False, "Fail where a table lacks a layer or choice.", HARDWARE, hidden=True
    )
    latency_tolerance: float | None = option(
        None,
        "Drop ranks dominated in latency: a larger rank takes at most (1+x) times as long.",
        HARDWARE,
        min=0,
        hidden=True,
    )
    require_speedup: bool = option(
        False, "Drop choices that are not faster than the dense layer.", HARDWARE, hidden=True
    )
    device: str = option("cpu", "Device, for example cuda.", RUNNING)

    @property
    def budgets(self) -> list[dict[str, float]]:
        """The budgets, each a mapping from cost name to the fraction kept.

        Raises:
            BudgetError: They are malformed.
        """
        return parse_budgets(self.budget, self.cost)
