"""Tasks of lm-eval as an objective of a search.

    python studies/language/cloze.py TEXT/valid.txt cloze.jsonl
    export HF_HUB_OFFLINE=1 HARNESS_TASK=cloze.jsonl HARNESS_TOKENIZER=FOLDER
    export OBJECTIVE=studies/language/harness.py:accuracy
    ranknas search --space hf:FOLDER --data text:TEXT --objective $OBJECTIVE --budget params=0.8

`HARNESS_TASK` is a file of questions, as `cloze.py` writes it, or the name of a task that lm-eval
finds, perhaps in the folder `HARNESS_TASKS` of YAML files. `HARNESS_LIMIT` is the largest number
of questions.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from rankNAS.exceptions import UsageError

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UsageError(
        f"lm-eval is not complete ({error}); run pip install 'lm-eval[hf]'."
    ) from None


def accuracy(network: nn.Module, data: Any) -> float:
    """The accuracy of a network in a task of lm-eval, from the environment (an objective)."""
    given = os.environ
    limit = int(given["HARNESS_LIMIT"]) if "HARNESS_LIMIT" in given else None
    return evaluate(
        network,
        given["HARNESS_TOKENIZER"],
        given["HARNESS_TASK"],
        given.get("HARNESS_TASKS"),
        limit,
    )


def evaluate(
    network: nn.Module,
    tokenizer: str,
    task: str,
    tasks: str | None = None,
    limit: int | None = None,
    metric: str = "acc,none",
) -> float:
    """A metric of a causal language model in a task of lm-eval.

    Args:
        network: A model of transformers, compressed or not.
        tokenizer: The folder of its tokenizer.
        task: A file of questions (``.jsonl``), or the name of a task.
        tasks: A folder of YAML files with more tasks.
        limit: The largest number of questions; None is all.
        metric: The name of the metric in lm-eval's results.
    """
    own = task.endswith(".jsonl")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=network, tokenizer=tokenizer, batch_size=16),
        tasks=[questions(task) if own else task],
        # Reading the thousands of tasks of lm-eval itself takes a minute.
        task_manager=TaskManager(include_path=tasks, include_defaults=not own and tasks is None),
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    (results,) = found["results"].values()
    return float(results[metric])


def questions(file: str) -> dict[str, Any]:
    """The task of a file of questions: context, choices, and the number of the right one."""
    return {
        "task": Path(file).stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(file).resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
    }
