"""Evaluators: a list of questions, and a score for each of them. One file per kind of benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Evaluator", "Goals", "Progress", "QuestionScore", "TaskGoal", "mean_score", "task_scores", "task_shares"]

#: Called with the number of questions that have just been done.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class QuestionScore:
    """What a model got for one question."""

    task: str
    question: int  # index in the task's questions, the same in every run
    score: float | None  # None: unscored, which is neither right nor wrong


@dataclass(frozen=True)
class TaskGoal:
    """How the scores of a task enter the score of a model."""

    metric: str = "acc,none"  # metric and filter, as lm-eval spells them
    higher_is_better: bool = True
    weight: float = 1.0  # at least 0; 0: shown, and no part of the score
    logarithmic: bool = False  # the scores' mean is the logarithm of the metric, as for a perplexity

    def shown(self, mean: float) -> float:
        """The metric itself, of the mean of the questions' scores."""
        return _exp(mean) if self.logarithmic else mean


#: Task → its goal. A task that is not named has a goal of weight 1 and is to be maximised.
Goals = Mapping[str, TaskGoal]


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


def task_shares(tasks: Iterable[str], goals: Goals) -> dict[str, float]:
    """What the mean of each task is multiplied by in the score of a model.

    Returns:
        Numbers whose magnitudes sum to 1; negative where a lower mean is better, 0 where the weight is.
    """
    known = {task: goals.get(task, TaskGoal()) for task in tasks}
    total = math.fsum(goal.weight for goal in known.values())
    return {
        task: (1 if goal.higher_is_better else -1) * goal.weight / total if total else 0.0
        for task, goal in known.items()
    }


def mean_score(scores: Iterable[QuestionScore], goals: Goals | None = None) -> float | None:
    """The score of a model: the weighted mean over tasks of each task's mean; the higher, the better.

    Returns:
        None if a task that has a weight has no scored question, or if none has a weight.
    """
    means = task_scores(scores)
    shares = {task: share for task, share in task_shares(means, goals or {}).items() if share}
    terms = [(shares[task], means[task]) for task in shares]
    known = [share * mean for share, mean in terms if mean is not None]
    return math.fsum(known) if known and len(known) == len(terms) else None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
