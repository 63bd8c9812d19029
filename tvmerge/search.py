"""What to try first, and what was found: baselines, the winner, and its gain on questions that no search saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    paired differences' mean, times the square of the task's share. The turns of a question are not independent, so it
    is questions that are counted.

    Returns:
        None if there is nothing to pair in some task that has a weight.
    """
    known = {_key(s): s.score for s in reference if s.score is not None}
    pairs = [(s, known[_key(s)]) for s in model if s.score is not None and _key(s) in known]
    differences = [replace(s, score=s.score - r) for s, r in pairs if s.score is not None]
    shares = task_shares(dict.fromkeys(s.task for s in model), goals or {})
    paired = {s.task for s in differences}
    # Over the tasks that can be paired the shares would be other ones.
    mean = mean_score(differences, goals) if all(task in paired for task, share in shares.items() if share) else None
    if mean is None:
        return None
    variance = math.fsum(
        share**2 * _variance_of_mean([d for d in differences if d.task == task])
        for task, share in shares.items()
        if share
    )
    return Gain(mean=mean, standard_error=math.sqrt(variance))


def _key(score: QuestionScore) -> tuple[str, int, int, int]:
    return score.task, score.question, score.turn, score.choice


def _variance_of_mean(differences: Sequence[QuestionScore]) -> float:
    """Variance of the mean of differences, of which those of one question go together.

    Source: clustered standard errors, Miller 2024, Adding Error Bars to Evals, arXiv:2411.00640, section 2.2, times
    n/(n-1), so that for questions of one score each it is the variance of a plain mean.
    """
    mean = math.fsum(d.score or 0.0 for d in differences) / len(differences)
    residuals: dict[int, float] = {}
    for d in differences:
        residuals[d.question] = residuals.get(d.question, 0.0) + (d.score or 0.0) - mean
    n = len(residuals)
    if n < 2:
        return math.inf
    return n / (n - 1) * math.fsum(residual**2 for residual in residuals.values()) / len(differences) ** 2
