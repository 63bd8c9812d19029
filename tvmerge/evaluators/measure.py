"""What a task's metrics say of each question.

lm-eval gives a metric for all questions of a task at once. A search, and a test of what it found, need a number for
each question, whose mean it is: that of `acc` is 0 or 1, that of a perplexity the negative log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.metrics import bits_per_byte, mean, nanmean, perplexity, weighted_perplexity
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import Task

from tvmerge.errors import TaskError
from tvmerge.evaluators import TaskGoal

__all__ = ["Measure", "choose_measure"]

#: The metric of a task whose metric nobody chose: the first of these that it has, else its first that can be one.
PREFERRED = ("acc", "exact_match")
MEANS = (mean, nanmean)
#: Their items are pairs of a log-likelihood and a number of words or bytes.
WEIGHTED = (weighted_perplexity, bits_per_byte)
#: Those of lm-eval's own aggregations that are a mean over questions of something.
BY_QUESTION = (*MEANS, *WEIGHTED, perplexity, AGGREGATION_REGISTRY["brier_score"])


@dataclass(frozen=True)
class Measure:
    """A metric of a task, and the numbers of its questions."""

    task: str
    metric: str
    filter: str  # of the model's answers
    higher_is_better: bool
    aggregate: Callable[[Sequence[Any]], float]  # lm-eval's

    @property
    def logarithmic(self) -> bool:
        """Whether the questions' mean is the metric's logarithm."""
        return self.aggregate in (perplexity, weighted_perplexity)

    @property
    def is_mean(self) -> bool:
        """Whether it is the plain mean of numbers."""
        return self.aggregate in MEANS

    def goal(self, *, weight: float) -> TaskGoal:
        """The goal of the task; a negative weight turns the metric's direction around."""
        return TaskGoal(
            metric=f"{self.metric},{self.filter}",
            higher_is_better=self.higher_is_better if weight >= 0 else not self.higher_is_better,
            weight=abs(weight),
            logarithmic=self.logarithmic,
        )

    @property
    def is_weighted(self) -> bool:
        """Whether long questions count more."""
        return self.aggregate in WEIGHTED

    def unit(self, items: Sequence[Any]) -> float:
        """The mean of words or bytes of questions, if long ones count more; NaN of none."""
        known = [size for item in items if item is not None for size in [float(item[1])]]
        return math.fsum(known) / len(known) if known else math.nan

    def values(self, items: Sequence[Any], *, unit: float | None = None) -> list[float | None]:
        """The number of each question.

        Args:
            items: what the task's `process_results` gave for the metric; None if it gave nothing.
            unit: of all questions, if these are some of them; None: they are all.

        Returns:
            None where it gave nothing, or what is no finite number. The mean of the others is the metric, or its
            logarithm.

        Raises:
            TaskError: an item is nothing that the metric can be computed of.
        """
        if self.is_weighted:
            return self._shares(items, self.unit(items) if unit is None else unit)
        return [None if item is None else _finite(self._value(item)) for item in items]

    def check(self, items: Sequence[Any]) -> None:
        """Check that the metric is the mean over questions that `values` takes it for.

        Raises:
            TaskError: it is not.
        """
        known = [item for item in items if item is not None]
        if self.aggregate in BY_QUESTION or not known:
            return
        try:
            whole = float(self.aggregate(known))
        except Exception as error:
            raise self._refusal() from error
        values = [self._value(item) for item in known]
        if not math.isclose(whole, math.fsum(values) / len(values), rel_tol=1e-6, abs_tol=1e-9):
            raise self._refusal()

    def _value(self, item: Any) -> float:
        if self.aggregate is perplexity:
            return -float(item)
        try:
            return float(item) if self.is_mean else float(self.aggregate([item]))
        except Exception as error:
            if self.is_mean:
                what = f"task {self.task}: its metric {self.metric} is {item!r} for a question, which is no number"
                raise TaskError(what) from error
            raise self._refusal() from error

    def _shares(self, items: Sequence[Any], unit: float) -> list[float | None]:
        """-log-likelihood of each question, over the mean of words or bytes of all questions."""
        scale = unit * (math.log(2) if self.aggregate is bits_per_byte else 1)
        return [None if item is None or not scale else _finite(-float(item[0]) / scale) for item in items]

    def _refusal(self) -> TaskError:
        return TaskError(
            f"task {self.task}: its metric {self.metric} is computed over all questions at once, and gives none of "
            f"them a score: choose another one with --task_metric {self.task}=METRIC"
        )


def choose_measure(name: str, task: Task, wanted: str | None = None) -> Measure:
    """Choose the metric that scores a task.

    Args:
        name: the task's.
        task: lm-eval's.
        wanted: a metric, or a metric and a filter as lm-eval spells them, `exact_match,flexible-extract`; None for the
            first of PREFERRED that it has, else its first that can be one.

    Raises:
        TaskError: it has no such metric, or none that gives each question a score.
    """
    aggregations = task.aggregation()
    filters = [each.name for each in task._filters]
    metric, _, chosen = (wanted or "").partition(",")
    usable = [key for key, aggregate in aggregations.items() if _is_usable(aggregate)]
    if not wanted:
        if not usable:
            listed = ", ".join(map(str, aggregations)) or "no metric at all"
            raise TaskError(f"task {name}: has no metric that gives each question a score, only {listed}")
        metric = next((key for key in PREFERRED if key in usable), usable[0])
    if metric not in aggregations or (chosen and chosen not in filters):
        known = f"its metrics are {', '.join(map(str, aggregations))}, its filters {', '.join(filters)}"
        raise TaskError(f"task {name}: has no metric {wanted!r}, {known}")
    higher = task.higher_is_better().get(metric)
    if not isinstance(higher, bool):  # lm-eval takes null for false, and text for true
        raise TaskError(
            f"task {name}: does not say whether a higher {metric} is better: add higher_is_better: true or false to it "
            "in the metric_list of its file"
        )
    measure = Measure(
        task=name,
        metric=metric,
        filter=chosen or filters[0],
        higher_is_better=bool(higher),
        aggregate=aggregations[metric],
    )
    if metric not in usable:
        raise measure._refusal()
    return measure


def _is_usable(aggregate: Callable[..., Any]) -> bool:
    """Whether an aggregation can be a mean over questions; one of the task's own code is found out when it is used."""
    return aggregate in BY_QUESTION or aggregate not in AGGREGATION_REGISTRY.values()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
