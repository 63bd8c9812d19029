"""Questions for the tests, small enough for a random model."""

import random
from typing import Any

import datasets

LETTERS = "abcdefghij"


def load_choice(**_: Any) -> dict[str, datasets.Dataset]:
    """60 questions with three choices of different length."""
    generator = random.Random(1)
    rows = []
    for i in range(60):
        choices = ["".join(generator.choices(LETTERS, k=k)) for k in (1, 2, 3)]
        rows.append({"question": "".join(generator.choices(LETTERS, k=5)), "choices": choices, "label": i % 3})
    return {"test": datasets.Dataset.from_list(rows)}


def load_extract(**_: Any) -> dict[str, datasets.Dataset]:
    """40 questions whose answer is their first letter."""
    generator = random.Random(2)
    rows = []
    for _i in range(40):
        question = "".join(generator.choices(LETTERS, k=6))
        rows.append({"question": question, "answer": question[0]})
    return {"test": datasets.Dataset.from_list(rows)}
