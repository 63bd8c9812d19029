"""A task whose own code waits while a gate is closed, sleeps when it is told to, and writes down who asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CODE = """
import json
import os
import random
import time
from pathlib import Path

import datasets

HERE = Path(__file__).parent


def load(**_):
    generator = random.Random(1)
    letters = "abcdefghij"
    rows = [
        {
            "question": "".join(generator.choices(letters, k=5)),
            "choices": ["".join(generator.choices(letters, k=k)) for k in (1, 2, 3)],
            "label": i % 3,
        }
        for i in range(20)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def score(doc, results):
    likelihoods = [likelihood for likelihood, _ in results]
    if set(likelihoods) == {-1.0}:  # made up, to try this code
        return {"acc": 0.0}
    with (HERE / "asked").open("a") as file:
        file.write(f"{os.getpid()} {os.getppid()}" + chr(10))
    while (HERE / "gate").exists():
        time.sleep(0.02)
    if (HERE / "broken").exists():
        raise ValueError("this task is broken")
    try:
        seconds = float((HERE / "sleep").read_text())
        (HERE / "sleep").unlink()
        time.sleep(seconds)
    except FileNotFoundError:
        pass
    return {"acc": float(likelihoods.index(max(likelihoods)) == doc["label"])}
"""
TASK = """task: gated
custom_dataset: !function gated_code.load
process_results: !function gated_code.score
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
N_QUESTIONS = 6


@dataclass(frozen=True)
class Gated:
    """Its folder."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Gated:
        folder.mkdir()
        (folder / "gated.yaml").write_text(TASK)
        (folder / "gated_code.py").write_text(CODE)
        return cls(folder)

    def flags(self) -> list[str]:
        return ["--jglue_tasks", "gated", "--task_dir", str(self.folder), "--jglue_limit", str(N_QUESTIONS)]

    def shut(self) -> None:
        (self.folder / "gate").touch()

    def open(self) -> None:
        (self.folder / "gate").unlink()

    def sleep(self, seconds: float) -> None:
        """Let the next question take so long."""
        whole = self.folder / ".sleep"
        whole.write_text(str(seconds))
        whole.rename(self.folder / "sleep")

    def child_of(self, parent: int) -> int | None:
        """The process of a parent that asked last; None if none has."""
        asked = self.folder / "asked"
        lines = [line.split() for line in asked.read_text().splitlines()] if asked.exists() else []
        return next((int(child) for child, its in reversed(lines) if int(its) == parent), None)
