"""Evaluators: a list of questions, and a score for each of them. One file per kind of benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Evaluator", "Progress", "QuestionScore", "mean_score", "task_scores"]

#: Called with the number of questions that have just been done.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class QuestionScore:
    """What a model got for one question."""

    task: str
    question: int  # index in the task's questions, the same in every run
    score: float | None  # None: unscored, which is neither right nor wrong


class Evaluator(Protocol):
    """Questions, ready to be put to a live model."""

    @property
    def n_questions(self) -> int:
        """How many questions one call of `score` scores."""

    @property
    def fingerprint(self) -> str:
        """A digest of everything that a model is asked."""

    def score(self, model: Any, progress: Progress) -> Sequence[QuestionScore]:
        """Score every question once, always in the same order."""


def task_scores(scores: Iterable[QuestionScore]) -> dict[str, float | None]:
    """Mean over the scored questions of each task, in order of first appearance; None if none was scored."""
    values: dict[str, list[float]] = {}
    for question in scores:
        scored = values.setdefault(question.task, [])
        if question.score is not None:
            scored.append(question.score)
    return {task: math.fsum(scored) / len(scored) if scored else None for task, scored in values.items()}


def mean_score(scores: Iterable[QuestionScore]) -> float | None:
    """Mean over tasks of each task's mean; None if a task has no scored question."""
    means = task_scores(scores).values()
    known = [mean for mean in means if mean is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(means) else None
