"""Evaluators: a list of questions, and a score for each of them. One file per kind of benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tvmerge.models.batching import TokenBudget
    from tvmerge.models.transformers import TransformersModel

__all__ = [
    "MAX_UNSCORED",
    "AfterStage",
    "Evaluator",
    "Goals",
    "Progress",
    "QuestionScore",
    "Questions",
    "Scored",
    "ScoredModel",
    "TaskGoal",
    "mean_score",
    "score_range",
    "task_scores",
    "task_shares",
    "unscored_questions",
]

#: Greatest share of questions without a score with which a model has a score.
MAX_UNSCORED = 0.1

#: Called with the number of questions that have just been done.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class QuestionScore:
    """What a model got for one question."""

    task: str
    question: int  # index in the task's questions, the same in every run
    score: float | None  # None: unscored, which is neither right nor wrong
    turn: int = 1  # of a conversation
    choice: int = 0  # which of several answers


@dataclass(frozen=True)
class Scored:
    """What a model got for all questions."""

    scores: Sequence[QuestionScore]  # always in the same order
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else is to be kept with a trial, as plain JSON values


#: Called after each stage of a trial but the last, with its number from 0 and all that was scored so far; it may raise
#: to end the trial, whose further questions are then not asked.
AfterStage = Callable[[int, Scored], None]


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
        """How many questions a model is asked."""

    @property
    def n_scores(self) -> int:
        """How many scores one call of `score` gives: more than questions if these have several turns."""

    @property
    def fingerprint(self) -> str:
        """A digest of everything that a model is asked."""

    def score(self, model: Any, progress: Progress, *, name: str, after_stage: AfterStage | None = None) -> Scored:
        """Score every question once.

        Args:
            model: to ask.
            progress: told how many of the scores are there.
            name: what the model is called where its answers are kept.
            after_stage: told what is scored so far, by an evaluator that was made with stages.

        Raises:
            RunError: it cannot be scored.
        """


class ScoredModel(Protocol):
    """A live model, as evaluators ask it."""

    budget: TokenBudget

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of how it is asked."""


class Questions(Protocol):
    """The questions of a run."""

    @property
    def search(self) -> Evaluator:
        """Those that the search sees."""

    @property
    def heldout(self) -> Evaluator | None:
        """Those that the best model is judged on; None: none is held out."""

    @property
    def goals(self) -> Goals:
        """How scores make the score of a model."""

    @property
    def scoring(self) -> Mapping[str, str]:
        """Task → what its scores mean."""

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of them."""

    @property
    def explanation(self) -> str:
        """What a reader of the scores should know of them, in a sentence; empty: nothing."""

    @property
    def categories(self) -> Mapping[str, Sequence[str]]:
        """Task → the category of each of its questions, of those tasks that have categories."""

    def open_model(self, model: TransformersModel, *, tokens: int | None) -> ScoredModel:
        """Make a live model ready to be asked, and all questions ready for it.

        Args:
            model: with the weights of any real model of its kind.
            tokens: how many of a batch an earlier process has found to fit.

        Raises:
            TaskError: a question that the model cannot take.
        """

    def resume(self, finished: Collection[int]) -> None:
        """Take up a run of which these trials are finished."""

    def cost(self) -> str:
        """What was spent so far, in a few words; empty if asking is free."""


def task_scores(scores: Iterable[QuestionScore]) -> dict[str, float | None]:
    """Mean over the scored questions of each task, in order of first appearance; None if none was scored."""
    values: dict[str, list[float]] = {}
    for question in scores:
        scored = values.setdefault(question.task, [])
        if question.score is not None:
            scored.append(question.score)
    return {task: math.fsum(scored) / len(scored) if scored else None for task, scored in values.items()}


def unscored_questions(scores: Iterable[QuestionScore]) -> tuple[int, int]:
    """How many questions lack a score, of any turn or choice, and how many there are."""
    scores = list(scores)
    unscored = {(score.task, score.question) for score in scores if score.score is None}
    return len(unscored), len({(score.task, score.question) for score in scores})


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


def score_range(scores: Iterable[QuestionScore], goals: Goals | None = None) -> tuple[float, float] | None:
    """The least and the greatest score of models whose questions score no worse and no better than these.

    Returns:
        None if none of a task that has a weight is scored.
    """
    by_task: dict[str, list[float]] = {}
    for each in scores:
        if each.score is not None:
            by_task.setdefault(each.task, []).append(each.score)
    shares = task_shares(by_task, goals or {})
    ends = [(share * min(by_task[task]), share * max(by_task[task])) for task, share in shares.items() if share]
    return (math.fsum(map(min, ends)), math.fsum(map(max, ends))) if ends else None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
