"""The study with lm-eval as an objective: a search on questions about a local text."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from language import text, text_folder, tiny_llama, tokenizer_folder

import rankNAS
from rankNAS.exceptions import UsageError
from rankNAS.objectives import make_objective
from rankNAS.plugins import load_callable

STUDY = Path(__file__).parents[2] / "studies" / "language"
pytestmark = pytest.mark.skipif(not STUDY.is_dir(), reason="not in a checkout")
HARNESS = f"{STUDY}/harness.py:accuracy"


def _complete() -> bool:
    """Whether lm-eval is here with all that it imports."""
    found = importlib.util.find_spec("lm_eval") is not None
    return found and all(importlib.util.find_spec(name) for name in ("sacrebleu", "evaluate"))


def _questions(folder: Path) -> Path:
    (folder / "valid.txt").write_text(text(60))
    file = folder / "cloze.jsonl"
    command = [
        sys.executable,
        f"{STUDY}/cloze.py",
        folder / "valid.txt",
        file,
        "--questions",
        "12",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return file


def test_questions_of_a_text(tmp_path: Path) -> None:
    made = [json.loads(line) for line in _questions(tmp_path).read_text().splitlines()]
    lines = [" ".join(line.split()) for line in text(60).splitlines()]
    assert len(made) == 12
    for question in made:
        assert len(set(question["choices"])) == 4
        answered = f"{question['context']} {question['choices'][question['label']]}"
        assert any(line.startswith(answered) for line in lines)


@pytest.mark.skipif(_complete(), reason="lm-eval is installed")
def test_without_the_package_one_line_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="pip install 'lm-eval") as raised:
        make_objective(HARNESS)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.skipif(not _complete(), reason="needs lm-eval")
@pytest.mark.filterwarnings("default")
def test_a_search_by_a_task_of_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_folder(tmp_path / "model")
    model = tiny_llama(vocabulary=32)
    model.save_pretrained(tokenizer)
    monkeypatch.setenv("HARNESS_TASK", str(_questions(tmp_path)))
    monkeypatch.setenv("HARNESS_TOKENIZER", str(tokenizer))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # HF_HUB_OFFLINE=1
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    folder = text_folder(tmp_path / "text")
    data = rankNAS.load_data(f"text:{folder}", tokenizer=str(tokenizer), context=16)
    study = rankNAS.search(
        f"hf:{tokenizer}",
        data,
        objectives=[HARNESS],
        budget={"layer_params": 0.6},
        strategy="random",
        n_trials=2,
    )
    found = study.best.metrics["accuracy"]
    assert 0 <= found <= 1 and round(12 * found) == pytest.approx(12 * found)
    evaluate = load_callable(f"{STUDY}/harness.py:evaluate")
    with torch.no_grad():
        again = evaluate(study.materialise(), str(tokenizer), str(tmp_path / "cloze.jsonl"))
    assert again == pytest.approx(found)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    questions = load_callable(f"{STUDY}/harness.py:questions")(str(tmp_path / "cloze.jsonl"))
    (tasks / "mine.yaml").write_text(json.dumps({**questions, "task": "mine"}))
    by_name = evaluate(study.materialise(), str(tokenizer), "mine", str(tasks))
    assert by_name == pytest.approx(found)
