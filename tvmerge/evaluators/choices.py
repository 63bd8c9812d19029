"""Multiple choice, scored for all questions of a task at once.

lm-eval's own code scores one question in the time that a small model needs to answer it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from lm_eval.api.task import ConfigurableTask, Task

from tvmerge.evaluators.measure import Measure

__all__ = ["NotPlainError", "PlainChoices", "is_plain_choice"]

#: Metric → what a choice's log-likelihood is divided by, as in lm-eval.
NORMS: dict[str, Callable[[str], int]] = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}


def is_plain_choice(task: Task, measure: Measure) -> bool:
    """Whether a task is scored by which of its choices is the likeliest, and by nothing of its own."""
    return bool(
        isinstance(task, ConfigurableTask)
        and type(task).process_results is ConfigurableTask.process_results
        and not callable(task.config.process_results)
        and task.OUTPUT_TYPE == "multiple_choice"
        and task.config.filter_list is None
        and task.config.repeats == 1
        and measure.metric in NORMS
        and measure.is_mean
        and "acc_mutual_info" not in task.aggregation()
    )


class PlainChoices:
    """The questions of a task that `is_plain_choice` says yes to.

    Args:
        task: lm-eval's.
        measure: its metric.
        questions: of the task, in the order in which they are answered.

    Raises:
        NotPlainError: a question has no choices, or its right one is given otherwise than by its index or text.
    """

    def __init__(self, task: Task, measure: Measure, questions: Sequence[Any]) -> None:
        choices = [task.doc_to_choice(question) for question in questions]
        counts = np.array([len(each) for each in choices], np.int64)
        if not counts.all():
            raise NotPlainError
        shape = len(questions), int(counts.max(initial=0))
        self._filled = np.arange(shape[1]) < counts[:, None]
        self._norms = np.ones(shape)
        self._norms[self._filled] = [NORMS[measure.metric](choice) for each in choices for choice in each]
        target = task.doc_to_text if task.multiple_input else task.doc_to_target
        self._right = np.zeros(shape, bool)
        for row, (question, each) in enumerate(zip(questions, choices, strict=True)):
            for gold in _golds(target(question), each, several=bool(task.multiple_target)):
                self._right[row, gold] = True

    @property
    def n_without_answer(self) -> int:
        """How many questions have no right choice, so that every model is wrong."""
        return int((~self._right.any(axis=1)).sum())

    def scores(self, likelihoods: npt.NDArray[np.float64]) -> list[float | None]:
        """1 for each question whose likeliest choice is right, of equal ones the first, else 0.

        Args:
            likelihoods: of the choices of all questions, one after the other; a question with NaN is unscored.
        """
        table = np.full(self._filled.shape, -np.inf)
        table[self._filled] = likelihoods
        with np.errstate(divide="ignore"):  # a choice without a character, as in lm-eval
            chosen = (table / self._norms).argmax(axis=1)
        right = self._right[np.arange(len(table)), chosen]
        unscored = np.isnan(table).any(axis=1)
        return [None if no else float(yes) for no, yes in zip(unscored.tolist(), right.tolist(), strict=True)]


class NotPlainError(Exception):
    """A task's targets are of a kind that is left to lm-eval."""


def _golds(gold: Any, choices: Sequence[str], *, several: bool) -> list[int]:
    """The indices of the right choices, as lm-eval reads a target."""
    if several is not isinstance(gold, list):
        raise NotPlainError
    golds = gold if several else [choices.index(gold) if gold in choices else -1] if isinstance(gold, str) else [gold]
    if not all(isinstance(each, Integral) for each in golds):  # also those of numpy
        raise NotPlainError
    return [int(each) for each in golds if 0 <= each < len(choices)]
