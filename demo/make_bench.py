"""Rewrites `benchmarks/toy/question.jsonl`: questions of the demo's tasks, which its tiny models can answer.

`python demo/make_bench.py` takes no arguments; what it writes depends on the demo's question files alone.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import world

DEMO = Path(__file__).resolve().parent
BENCH = DEMO.parent / "benchmarks" / "toy"
QUESTIONS_PER_TASK = 60
#: The tasks in the order in which the bench takes turns with them, and what it calls them.
CATEGORIES = {
    "toy_jcommonsenseqa": "choice",
    "toy_jnli": "pair",
    "toy_marc_ja": "sentiment",
    "toy_jsquad": "extraction",
}


def read_records(task: str) -> list[world.Record]:
    """Reads the first questions of a task of the demo."""
    with (DEMO / "tasks" / "data" / f"{task}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, QUESTIONS_PER_TASK)]


def make_questions() -> list[world.Record]:
    """Makes the questions of the bench, one of each category in turn."""
    tasks = {task: read_records(task) for task in CATEGORIES}
    questions: list[world.Record] = []
    for row in range(QUESTIONS_PER_TASK):
        for task, category in CATEGORIES.items():
            prompt, answer = world.prompt_and_answer(task, tasks[task][row])
            questions.append(
                {
                    "question_id": len(questions) + 1,
                    "category": category,
                    "turns": [prompt],
                    "reference": [answer],
                    "required_temperature": 0.0,
                }
            )
    return questions


def to_lines(questions: list[world.Record]) -> str:
    """Returns the questions as the text of a JSON Lines file."""
    return "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)


if __name__ == "__main__":
    (BENCH / "question.jsonl").write_text(to_lines(make_questions()), encoding="utf-8", newline="\n")
