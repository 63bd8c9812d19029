"""RSM: a quadratic response surface over the modes of the prior, searched by Thompson draws.

A trial is the highest point of one surface drawn from the posterior. As long as little is known draws are far apart,
and they gather where the score is high; workers that draw at once differ by their trials' numbers and need not wait.

Scores that are no quadratic are noticed: the evidence of a surface is the product of its one-step-ahead predictions
(Dawid 1984, Statistical theory: the prequential approach), and if it predicts worse than one whose rest depends on the
place, the rest is no noise. Then a surface of the neighbourhood of the best is searched (a trust region), and if the
misfit is plain CMA-ES goes on, which leaves the leading modes. Whether it is plain is asked at a few numbers of trials
and the answer stays, as a search that changes its mind is told by half of its trials what the other half looked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvmerge.samplers import cma_es
from tvmerge.samplers.observations import Observations
from tvmerge.samplers.surface import RADIUS, Surface, fit, highest, misfit, squared_distances

__all__ = ["Belief", "believe", "cautious", "propose"]

Floats = npt.NDArray[np.float64]

#: How many modes are searched. More than the first need two trials for each coefficient, and of 15 modes, with 136
#: coefficients, the highest point was one that no trial was near.
N_MODES = (5, 7, 10)
#: A surface of more modes is taken unless the logarithm of its evidence is less by that.
EVIDENCE = 2.0
#: Logarithms of the Bayes factor against a surface from which a trust region, and CMA-ES, take over.
DOUBT, DISBELIEF = 4.0, 7.0
#: Half the width of the trust region, in prior standard deviations, and how far trials are counted in it.
TRUST, NEAR = 1.0, 2.0
#: Fewer scored trials tell no surface.
FEWEST_TRIALS = 3
#: Standard deviations that the gain of what is recommended is believed to be above.
CAUTION = 1.0
#: After how many scored trials it is asked whether CMA-ES takes over, and how much later again.
FIRST_LOOK, LATER = 24, 2**0.5


@dataclass(frozen=True)
class Belief:
    """What the finished trials say."""

    model: str  # "surface", "trust region" or "CMA-ES"
    surface: Surface
    low: Floats  # (k,), the box that is searched
    high: Floats  # (k,)
    top: Floats  # (k,), the highest point of the mean surface
    x: Floats  # (d,), the recommended point


def propose(seen: Observations, generator: np.random.Generator, *, noise: float | None = None) -> Floats:
    """The point `(d,)` of a trial.

    Args:
        seen: the scored trials.
        generator: of the trial.
        noise: standard deviation of a trial's score, if it is known.
    """
    n_modes = min(N_MODES[0], seen.space.modes.shape[1])
    belief = believe(seen, noise=noise)
    if belief is None:
        return seen.at(0.5 * generator.standard_normal(n_modes))
    if belief.model == "CMA-ES":
        return cma_es.propose(seen, generator)
    surface = belief.surface
    starts = np.vstack([belief.top, generator.standard_normal((3, surface.k))])
    z = highest(surface.draw(generator), low=belief.low, high=belief.high, starts=starts)
    x = seen.at(z)
    for _ in range(10):
        if (np.abs(seen.x - x).max(axis=1) > 1e-9).all():
            break
        # A corner of the box that was tried: its neighbourhood says more.
        z = z + 0.2 * generator.standard_normal(surface.k)
        x = seen.at(z)
    return x


def believe(seen: Observations, *, noise: float | None = None) -> Belief | None:
    """What the scored trials say; None if they are too few to say anything."""
    if len(seen.scores) < FEWEST_TRIALS:
        return None
    z = seen.along(seen.x, min(N_MODES[-1], seen.space.modes.shape[1]))
    hands_over = _hands_over(z, seen.scores, noise)
    surface, doubt = _surface(z, seen.scores, noise)
    z = z[:, : surface.k]
    if doubt <= DOUBT and not hands_over:
        low, high = _box(z, seen.scores)
        top = _top(surface, low, high)
        return Belief("surface", surface, low, high, top, seen.at(top))
    # Near the best there are fewer trials, which bear fewer modes.
    z = z[:, : N_MODES[0]]
    centre = z[int(np.argmax(_smoothed(z, seen.scores)))]
    nearness = np.exp(-0.5 * ((z - centre) ** 2).sum(axis=1) / NEAR**2)
    local = fit(z, seen.scores, noise=noise, nearness=np.maximum(nearness, 1e-6))
    low, high = centre - TRUST, centre + TRUST
    top = _top(local, low, high)
    if hands_over:
        return Belief("CMA-ES", local, low, high, top, cma_es.mean_point(seen))
    return Belief("trust region", local, low, high, top, seen.at(top))


def _hands_over(z: Floats, scores: Floats, noise: float | None) -> bool:
    """Whether the misfit was plain at any number of trials that it was looked at."""
    look = float(FIRST_LOOK)
    while look <= len(scores):
        n = int(look)
        if _doubt_of(z[:n].tobytes(), scores[:n].tobytes(), z.shape[1], noise) > DISBELIEF:
            return True
        look *= LATER
    return False


@functools.lru_cache(maxsize=256)
def _doubt_of(z: bytes, scores: bytes, k: int, noise: float | None) -> float:
    """As arrays cannot be looked up: what was found at each look is asked for in every trial."""
    return _surface(np.frombuffer(z).reshape(-1, k), np.frombuffer(scores), noise)[1]


def _surface(z: Floats, scores: Floats, noise: float | None) -> tuple[Surface, float]:
    """The surface of as many of the modes `(n, m)` as the trials bear, and its misfit."""
    fitted: list[Surface] = []
    for wanted in N_MODES:
        k = min(wanted, z.shape[1])
        n_coefficients = 1 + 2 * k + k * (k - 1) // 2
        if not fitted or (k == wanted and 2 * n_coefficients <= len(scores)):
            fitted.append(fit(z[:, :k], scores, noise=noise))
    top = max(surface.evidence for surface in fitted)
    surface = next(surface for surface in reversed(fitted) if surface.evidence >= top - EVIDENCE)
    return surface, misfit(surface, z[:, : surface.k], scores)


def _box(z: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """Where a surface is searched: up to RADIUS, and past it on the side to which the best quarter of the trials is."""
    best = z[np.argsort(-scores, kind="stable")[: max(len(scores) // 4, 1)]].mean(axis=0)
    return np.minimum(-RADIUS, best - 1), np.maximum(RADIUS, best + 1)


def cautious(belief: Belief) -> Floats:
    """The point `(k,)` between the best uniform one and the top that is most surely better than the former.

    It is the highest lower bound of the gain, one standard deviation below its mean: after a few trials the top is
    where the surface is steep by chance, and the more is known the nearer it is to the top.
    """
    surface, z = belief.surface, np.linspace(0, 1, 21)[:, None] * belief.top
    mean, sd = surface.differences(z)
    best: Floats = z[int(np.argmax(mean - CAUTION * sd))]
    return best


def _top(surface: Surface, low: Floats, high: Floats) -> Floats:
    starts = np.vstack([np.zeros(surface.k), np.eye(surface.k), -np.eye(surface.k)])
    return highest(surface.mean, low=low, high=high, starts=starts)


def _smoothed(z: Floats, scores: Floats) -> Floats:
    """Each trial's score as the mean over its neighbourhood, drawn to the mean of all as if one more trial had it."""
    near = np.exp(-0.5 * squared_distances(z))
    smoothed: Floats = (near @ scores + scores.mean()) / (near.sum(axis=1) + 1)
    return smoothed
