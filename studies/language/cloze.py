"""Questions about a text: which of four words follows the beginning of a line?

    python studies/language/cloze.py TEXT/valid.txt cloze.jsonl --questions 200

The wrong words follow the beginnings of other lines. A line of the file has context, choices and
label.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

CHOICES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--words", type=int, default=16, help="of a beginning, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = cloze(args.text.read_text("utf-8"), args.questions, args.words, args.seed)
    args.out.write_text("".join(json.dumps(question) + "\n" for question in made), "utf-8")
    print(f"{len(made)} questions in {args.out}")


def cloze(text: str, count: int, words: int, seed: int) -> list[dict[str, object]]:
    """The questions of a text, at most `count`.

    Args:
        text: The text.
        count: The largest number of questions.
        words: The largest number of words of a beginning.
        seed: The random seed of lines, choices and their order.
    """
    order = random.Random(seed)
    lines = [line.split() for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 4]
    order.shuffle(lines)
    answers = [line[cut(line, words)] for line in lines]
    found: list[dict[str, object]] = []
    for line, answer in zip(lines[:count], answers, strict=False):
        others = sorted({*answers} - {answer})
        if len(others) < CHOICES - 1:
            raise SystemExit("the text has too few different words; give a longer one.")
        choices = [answer, *order.sample(others, CHOICES - 1)]
        order.shuffle(choices)
        context = " ".join(line[: cut(line, words)])
        found.append({"context": context, "choices": choices, "label": choices.index(answer)})
    return found


def cut(line: list[str], words: int) -> int:
    """The number of words of a line's beginning; what follows is not the full stop."""
    return min(words, len(line) - 2)


if __name__ == "__main__":
    main()
