"""Samplers that need no model: random, low-discrepancy points, and a plain genetic algorithm."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from tvmerge.samplers.observations import Observations, SearchSpace

__all__ = ["genetic", "low_discrepancy", "uniform"]

Floats = npt.NDArray[np.float64]

#: Trials of the genetic algorithm's population, the first of which are random.
POPULATION = 20
#: Probability of a weight to be drawn anew.
MUTATION_RATE = 0.05


def uniform(box: SearchSpace, generator: np.random.Generator) -> Floats:
    """A point `(d,)` anywhere in a box."""
    drawn: Floats = generator.uniform(box.low, box.high)
    return drawn


def genetic(seen: Observations, generator: np.random.Generator, *, number: int) -> Floats:
    """A child `(d,)` of two of the better half of a population.

    The population that truncation leaves after any number of generations is the best of all trials so far: no state is
    needed, and workers need not wait for each other.

    Source: Mühlenbein and Schlierkamp-Voosen 1993, Predictive Models for the Breeder Genetic Algorithm; Syswerda 1989,
    Uniform Crossover in Genetic Algorithms.
    """
    x, scores = seen.x[seen.in_box], seen.scores[seen.in_box]
    if number < seen.n_start + POPULATION or len(scores) < 4:
        return uniform(seen.box, generator)
    better = x[np.argsort(-scores, kind="stable")[: min(POPULATION, len(scores)) // 2]]
    mother, father = better[generator.choice(len(better), size=2, replace=False)]
    child = np.where(generator.random(len(mother)) < 0.5, mother, father)
    mutated = generator.random(len(mother)) < MUTATION_RATE
    return np.clip(np.where(mutated, uniform(seen.box, generator), child), seen.box.low, seen.box.high)


def low_discrepancy(box: SearchSpace, *, seed: int, index: int) -> Floats:
    """Point number `index` of a scrambled Sobol sequence over a box, `(d,)`.

    Source: Sobol 1967, On the distribution of points in a cube; Owen 1998, Scrambling Sobol and Niederreiter-Xing
    points.
    """
    return box.low + _sobol(len(box.low), seed, index) * (box.high - box.low)


@functools.lru_cache(maxsize=8)
def _sobol(d: int, seed: int, index: int) -> Floats:
    from scipy.stats import qmc

    sequence = qmc.Sobol(d, scramble=True, rng=seed)
    point: Floats = (sequence.fast_forward(index) if index else sequence).random(1)[0]
    return point
