"""What to try first, and what was found: baselines, the winner, and its gain on questions that no search saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvmerge.evaluators import Goals, QuestionScore, mean_score, task_shares

__all__ = ["BASELINES", "Gain", "paired_gain", "uniform_weights"]

#: One weight for all: the target itself, and the whole task vector. Scored first in every study.
BASELINES = (0.0, 1.0)
#: Other uniform weights, scored next: a searched merge must be better than the best of them to be worth the search.
UNIFORM_GRID = (0.5, 1.5, 0.75, 0.25, 1.25)


def uniform_weights(*, weight_min: float, weight_max: float) -> list[float]:
    """The uniform weights that a study scores before its sampler draws, in order.

    Returns:
        Always 0 and 1, even outside of the range; then those of the grid that are inside of it.
    """
    return [*BASELINES, *(weight for weight in UNIFORM_GRID if weight_min <= weight <= weight_max)]


@dataclass(frozen=True)
class Gain:
    """How much better one model is than another on the same questions."""

    mean: float  # difference of the mean scores
    standard_error: float  # of that difference, paired over questions

    @property
    def is_clear(self) -> bool:
        """Whether it, a gain or a loss, is larger than two of its standard errors."""
        return abs(self.mean) > 2 * self.standard_error


def paired_gain(
    model: Sequence[QuestionScore], reference: Sequence[QuestionScore], goals: Goals | None = None
) -> Gain | None:
    """The gain of a model over a reference, paired over the questions that both have a score for.

    The score is a weighted mean over tasks, so the variance of the gain is the sum over tasks of the variance of the
    paired differences' mean, times the square of the task's share.

    Returns:
        None if there is nothing to pair in some task that has a weight.
    """
    known = {(s.task, s.question): s.score for s in reference if s.score is not None}
    pairs = [(s, known[s.task, s.question]) for s in model if s.score is not None and (s.task, s.question) in known]
    differences = [QuestionScore(s.task, s.question, s.score - r) for s, r in pairs if s.score is not None]
    shares = task_shares(dict.fromkeys(s.task for s in model), goals or {})
    paired = {s.task for s in differences}
    # Over the tasks that can be paired the shares would be other ones.
    mean = mean_score(differences, goals) if all(task in paired for task, share in shares.items() if share) else None
    if mean is None:
        return None
    variance = math.fsum(
        share**2 * _variance_of_mean([d.score or 0.0 for d in differences if d.task == task])
        for task, share in shares.items()
        if share
    )
    return Gain(mean=mean, standard_error=math.sqrt(variance))


def _variance_of_mean(values: Sequence[float]) -> float:
    n = len(values)
    if n < 2:
        return math.inf
    mean = math.fsum(values) / n
    return math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n
