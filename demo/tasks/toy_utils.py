"""Loads the questions of the toy tasks from the JSONL files beside this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

LABELS = {"entailment": 0, "contradiction": 1, "neutral": 2, "positive": 0, "negative": 1}


def load(task: str) -> dict[str, Dataset]:
    """Reads the questions of a task as its test split.

    Args:
        task: The task's name.

    Returns:
        The split.
    """
    path = Path(__file__).parent / "data" / f"{task}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def load_jcommonsenseqa(**_: Any) -> dict[str, Dataset]:
    """Reads the choice questions; lm-eval hands over the task's metadata, which no toy task needs."""
    return load("toy_jcommonsenseqa")


def load_jnli(**_: Any) -> dict[str, Dataset]:
    """Reads the sentence pairs."""
    return load("toy_jnli")


def load_marc_ja(**_: Any) -> dict[str, Dataset]:
    """Reads the reviews."""
    return load("toy_marc_ja")


def load_jsquad(**_: Any) -> dict[str, Dataset]:
    """Reads the passages with their questions."""
    return load("toy_jsquad")


def label_index(document: dict[str, Any]) -> int:
    """Returns the index of a document's label among the choices of its task."""
    return LABELS[document["label"]]
