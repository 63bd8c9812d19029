"""What a study recommends, which is not its best trial: of many noisy scores the best is a lucky one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from tvmerge.samplers import cma_es
from tvmerge.samplers.observations import Observations, observe
from tvmerge.samplers.rsm import Belief, believe, cautious

__all__ = ["Recommendation", "pareto_front", "recommend"]

Floats = npt.NDArray[np.float64]

#: Of a normal distribution's middle 95%.
Z95 = 1.959964


@dataclass(frozen=True)
class Recommendation:
    """A point, and what its score is believed to be."""

    point: Mapping[str, float]
    by: str  # the model that chose it: "surface", "trust region", "CMA-ES"; "best observed" of fewer than 3 trials
    score: float | None  # predicted on the questions of the search, without a trial's noise; None: no prediction
    interval: tuple[float, float] | None  # that holds it with 95% probability, if the surface is right

    def within(self, low: float, high: float) -> Recommendation:
        """The same, with a prediction that can be true: a surface knows no ends."""
        if self.score is None or self.interval is None:
            return self
        score, *ends = (min(max(each, low), high) for each in (self.score, *self.interval))
        return replace(self, score=score, interval=(ends[0], ends[1]))


def recommend(
    trials: Sequence[FrozenTrial],
    ranges: Mapping[str, FloatDistribution],
    *,
    n_first: int = 0,
    n_objectives: int = 1,
    maximise: bool = True,
    noise: float | None = None,
) -> Recommendation | None:
    """The point that is believed to be the best, whatever sampler chose the trials.

    Args:
        trials: of a study, in any order.
        ranges: name → range, in a stable order.
        n_first: how many trials the study gave the points of.
        n_objectives: how many values a trial has; of several their score counts.
        maximise: whether a higher value is better.
        noise: standard deviation of a trial's score, if it is known.

    Returns:
        None if no trial was scored.
    """
    seen = observe(trials, ranges, n_first=n_first, n_objectives=n_objectives, maximise=maximise)
    if not len(seen.scores):
        return None
    believed = _of_models(seen, noise)
    if believed is None:
        best = seen.x[int(np.argmax(seen.scores))]
        return Recommendation(seen.space.point(best, ranges), "best observed", None, None)
    x, found = believed
    found = replace(found, point=seen.space.point(x, ranges))
    if maximise or found.score is None or found.interval is None:
        return found
    low, high = found.interval
    return replace(found, score=-found.score, interval=(-high, -low))


def pareto_front(trials: Sequence[FrozenTrial]) -> list[int]:
    """The numbers of the scored trials that no other one is better than in all objectives, all of them maximised.

    Of trials of the same values all are on the front. Those that were pruned, or have failed, are not.
    """
    scored = [t for t in trials if t.state == TrialState.COMPLETE and np.isfinite(t.values).all()]
    values = np.array([t.values for t in scored])
    return sorted(
        t.number
        for t, own in zip(scored, values, strict=True)
        if not ((values >= own).all(axis=1) & (values > own).any(axis=1)).any()
    )


def _of_models(seen: Observations, noise: float | None) -> tuple[Floats, Recommendation] | None:
    """Between what a surface and what CMA-ES make of the trials, whoever chose them.

    A surface is soon right where it fits and goes wrong where it does not, the mean of CMA-ES is slow and goes wrong
    nowhere: perf/README.md has what each of them finds, alone and together.
    """
    belief = believe(seen, noise=noise)
    if belief is None:
        return None
    z, evolved = cautious(belief), cma_es.evolved(seen)
    share = 0.5 if evolved.generation else _signal(belief, z)
    x = share * seen.at(z) + (1 - share) * cma_es.mean_point(seen)
    mean, sd = (float(each[0]) for each in belief.surface.predict(seen.along(x[None], belief.surface.k)))
    sd *= student95(max(len(seen.scores) - len(belief.surface.mean), 3))
    return x, Recommendation({}, belief.model, mean, (mean - sd, mean + sd))


def _signal(belief: Belief, z: Floats) -> float:
    """The share of what a surface says of a point `(k,)` that is no noise, at least a half.

    Until CMA-ES has ended a generation its mean is the best uniform weight, and to go a share of the way from there is
    to shrink: of a gain of t standard deviations 1 − 1/t² is signal (Efron and Morris 1973, Stein's estimation rule and
    its competitors).
    """
    mean, sd = (float(each[0]) for each in belief.surface.differences(z[None]))
    return max(0.5, 1 - (sd / mean) ** 2) if mean > 0 else 0.5


def student95(freedom: int) -> float:
    """Half the width of the middle 95% of Student's t, within 2% from 4 degrees of freedom on.

    Noise and scale are fitted to the trials, which leaves as many degrees of freedom as there are more trials than
    coefficients.

    Source: Abramowitz and Stegun 1964, equation 26.7.5.
    """
    z = Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
