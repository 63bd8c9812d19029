"""What to try first, and what was found: baselines, the winner, and its gain on questions that no search saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tvmerge.evaluators import Goals, QuestionScore, mean_score, task_shares

__all__ = ["BASELINES", "Gain", "paired_gain", "score_interval", "uniform_weights"]

Floats = npt.NDArray[np.float64]

#: One weight for all: the target itself, and the whole task vector. Scored first in every study.
BASELINES = (0.0, 1.0)
#: Other uniform weights, scored next: a searched merge must be better than the best of them to be worth the search.
UNIFORM_GRID = (0.5, 1.5, 0.75, 0.25, 1.25)

#: How often questions are drawn again, always from the same seed, and how many draws are in memory at a time.
RESAMPLES, BOOTSTRAP_SEED, CHUNK = 10_000, 0, 1_000_000
#: If fewer questions differ even the exact test by their signs (Fisher 1935) has p > 0.05 when all agree, 2·2⁻⁵ of 5,
#: while a bootstrap, which knows no question but these, would be sure: the interval then reaches to 0.
FEWEST_DIFFERENT = 6


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
    low: float = -math.inf  # of the 95% interval that holds it
    high: float = math.inf

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0: a gain or a loss, and no draw of the questions."""
        return self.low > 0 or self.high < 0


def paired_gain(
    model: Sequence[QuestionScore], reference: Sequence[QuestionScore], goals: Goals | None = None
) -> Gain | None:
    """The gain of a model over a reference, paired over the questions that both have a score for.

    The score is a weighted mean over tasks, so the variance of the gain is the sum over tasks of the variance of the
    paired differences' mean, times the square of the task's share. The turns of a question are not independent, so it
    is questions that are counted, and drawn again for the interval. The same scores always give the same interval,
    which is never without 0 if only a handful of questions differ.

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
    parts = {task: (shares[task], _Questions.of(differences, task)) for task in sorted(paired) if shares[task]}
    variance = math.fsum(share**2 * questions.variance_of_mean() for share, questions in parts.values())
    low, high = _interval(list(parts.values()))
    if sum(np.count_nonzero(questions.sums) for _, questions in parts.values()) < FEWEST_DIFFERENT:
        low, high = min(low, 0.0), max(high, 0.0)
    return Gain(mean=mean, standard_error=math.sqrt(variance), low=low, high=high)


def score_interval(scores: Sequence[QuestionScore], goals: Goals | None = None) -> tuple[float, float] | None:
    """The 95% interval of a model's score, by the same bootstrap.

    Returns:
        None if the model has no score.
    """
    scored = [score for score in scores if score.score is not None]
    if mean_score(scores, goals) is None:
        return None
    shares = task_shares(dict.fromkeys(s.task for s in scores), goals or {})
    return _interval([(share, _Questions.of(scored, task)) for task, share in sorted(shares.items()) if share])


def _key(score: QuestionScore) -> tuple[str, int, int, int]:
    return score.task, score.question, score.turn, score.choice


@dataclass(frozen=True)
class _Questions:
    """The questions of one task: of each the sum of its scores, of all turns and choices, and how many they are."""

    sums: Floats  # (n,)
    counts: Floats  # (n,)

    @classmethod
    def of(cls, scores: Sequence[QuestionScore], task: str) -> _Questions:
        """Those of a task, by number: their order in a file changes nothing."""
        sums: dict[int, list[float]] = {}
        for each in scores:
            if each.task == task and each.score is not None:
                sums.setdefault(each.question, []).append(each.score)
        known = [sums[question] for question in sorted(sums)]
        return cls(np.array([math.fsum(each) for each in known]), np.array([float(len(each)) for each in known]))

    def variance_of_mean(self) -> float:
        """Variance of the mean of scores, of which those of one question go together.

        Source: clustered standard errors, Miller 2024, Adding Error Bars to Evals, arXiv:2411.00640, section 2.2,
        times n/(n-1), so that for questions of one score each it is the variance of a plain mean.
        """
        n = len(self.sums)
        if n < 2:
            return math.inf
        residuals = self.sums - self.counts * (self.sums.sum() / self.counts.sum())
        return n / (n - 1) * math.fsum(residuals**2) / float(self.counts.sum()) ** 2

    def resampled_means(self, generator: np.random.Generator) -> Floats:
        """The mean score of so many questions drawn with replacement, RESAMPLES times."""
        n = len(self.sums)
        means = np.empty(RESAMPLES)
        rows = max(CHUNK // n, 1)
        for start in range(0, RESAMPLES, rows):
            drawn = generator.integers(n, size=(min(rows, RESAMPLES - start), n), dtype=np.int32)
            counts = self.counts[drawn].sum(axis=1) if np.ptp(self.counts) else n * self.counts[0]
            means[start : start + rows] = self.sums[drawn].sum(axis=1) / counts
        return means


def _interval(parts: Sequence[tuple[float, _Questions]]) -> tuple[float, float]:
    """The 95% interval of a weighted sum of tasks' means: percentiles of its bootstrap over each task's questions.

    Source: Efron 1979, Bootstrap Methods: Another Look at the Jackknife, Annals of Statistics 7.

    Args:
        parts: each task's share of the score, and its questions.
    """
    if any(len(questions.sums) < 2 for _, questions in parts):
        return -math.inf, math.inf  # one question says nothing of others
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    resampled = sum((share * questions.resampled_means(generator) for share, questions in parts), np.zeros(RESAMPLES))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)
