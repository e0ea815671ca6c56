"""Tasks: what a model is for. `TASKS` lists the built-in ones.

A task reads the batches of the data and the outputs of the model; nothing else does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankNAS.lazy import exports

if TYPE_CHECKING:
    from rankNAS.tasks.base import Prediction, Task
    from rankNAS.tasks.classification import Classification, MultiLabel
    from rankNAS.tasks.custom import Custom
    from rankNAS.tasks.infer import infer_task, make_task
    from rankNAS.tasks.language import LanguageModelling
    from rankNAS.tasks.layout import Layout
    from rankNAS.tasks.matching import Matching
    from rankNAS.tasks.regression import Regression
    from rankNAS.tasks.segmentation import Segmentation

__all__ = [
    "METRICS",
    "SHARES",
    "TASKS",
    "Classification",
    "Custom",
    "LanguageModelling",
    "Layout",
    "Matching",
    "MultiLabel",
    "Prediction",
    "Regression",
    "Segmentation",
    "Task",
    "infer_task",
    "make_task",
]

#: Name to (class, description). Listing imports nothing.
TASKS: dict[str, tuple[str, str]] = {
    "classification": (
        "rankNAS.tasks.classification:Classification",
        "One class a sample; logits (N, C), or (N,) and (N, 1) for two classes.",
    ),
    "multilabel": (
        "rankNAS.tasks.classification:MultiLabel",
        "Several labels a sample; logits (N, L), targets (N, L) in [0, 1].",
    ),
    "regression": (
        "rankNAS.tasks.regression:Regression",
        "Real-valued targets; outputs and targets (N,) or (N, ...).",
    ),
    "segmentation": (
        "rankNAS.tasks.segmentation:Segmentation",
        "A class a position; logits (N, C, ...), targets (N, ...).",
    ),
    "causal_lm": (
        "rankNAS.tasks.language:CausalLanguageModelling",
        "The next token at each position; logits (N, T, C), tokens (N, T).",
    ),
    "masked_lm": (
        "rankNAS.tasks.language:MaskedLanguageModelling",
        "A token at each masked position; logits (N, T, C), labels (N, T), -100 elsewhere.",
    ),
    "matching": (
        "rankNAS.tasks.matching:Matching",
        "No labels: the distance from the dense model's own outputs.",
    ),
}

#: Name of a metric to (direction, description), over all built-in tasks.
METRICS: dict[str, tuple[str, str]] = {
    "accuracy": ("maximize", "Share of correct classes, tokens or pixels, in [0, 1]."),
    "f1": ("maximize", "F1 score over all labels of all samples (micro average), in [0, 1]."),
    "miou": ("maximize", "Mean intersection over union of the classes that occur, in [0, 1]."),
    "r2": ("maximize", "Coefficient of determination, the mean over outputs; at most 1."),
    "mae": ("minimize", "Mean absolute error, in the units of the targets."),
    "perplexity": ("minimize", "exp of the mean loss of a token."),
    "loss": ("minimize", "The task's own loss: cross entropy in nats, or mean squared error."),
    "kl_divergence": (
        "minimize",
        "Divergence from the dense model's predictions, KL(dense || compressed) in nats.",
    ),
    "reverse_kl": (
        "minimize",
        "Divergence from the dense model's predictions, KL(compressed || dense) in nats.",
    ),
    "distance": (
        "minimize",
        "Squared distance from the dense model's outputs, relative to their variance.",
    ),
}

#: Metrics that are shares in [0, 1], which tables may show in percent.
SHARES = frozenset({"accuracy", "f1", "miou"})

_CLASSES = {home.partition(":")[2]: home.partition(":")[0] for home, _ in TASKS.values()}
__getattr__ = exports(
    __name__,
    {
        **_CLASSES,
        "Custom": "rankNAS.tasks.custom",
        "Layout": "rankNAS.tasks.layout",
        "Prediction": "rankNAS.tasks.base",
        "Task": "rankNAS.tasks.base",
        "infer_task": "rankNAS.tasks.infer",
        "make_task": "rankNAS.tasks.infer",
    },
)
