"""CMA-ES that starts right: at the best uniform weight, and with what is believed of the weights as its covariance.

It runs in the coordinates of the prior's modes. CMA-ES is invariant under linear maps, so that the identity there is
the prior covariance over the weights; and there are at most MAX_MODES of them, so that 1,164 weights take milliseconds.
Separable, or without a guide, it runs over the weights themselves. Its state is not stored: it is told all finished
generations again.

Source: Hansen 2016, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772; with learning rates adapted to the
noise, Nomura et al. 2023, arXiv:2304.03473; separable, Ros and Hansen 2008, A Simple Modification in CMA-ES Achieving
Linear Time and Space Complexity.
"""

from __future__ import annotations

import copy
import hashlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tvmerge.samplers.observations import Observations
from tvmerge.samplers.weight_prior import LOG_TEMPERATURE_SD, WEIGHT_SD

if TYPE_CHECKING:
    from cmaes import CMA, SepCMA

__all__ = ["evolved", "mean_point", "propose"]

Floats = npt.NDArray[np.float64]
Generation = list[tuple[Floats, float]]

#: Standard deviation of the first generation's weights; over the whole range a share of it.
SIGMA, FLAT_SIGMA = 0.2, 1 / 6

#: The last state of each kind, by what it was told: of many weights a generation takes a second to be told.
_last: dict[tuple[int, bool, bool, int], tuple[list[bytes], CMA | SepCMA]] = {}


def _scale(seen: Observations) -> Floats:
    """What is one unit of each weight `(d,)` where modes are not searched."""
    if seen.guided:
        return np.where(seen.space.is_temperature, LOG_TEMPERATURE_SD, WEIGHT_SD)
    return np.maximum(seen.space.high - seen.space.low, 1e-12)


def _has_modes(seen: Observations, *, separable: bool) -> bool:
    return seen.guided and not separable


def _to(seen: Observations, *, separable: bool) -> Floats:
    """The trials in the coordinates that it runs in, `(n, m)`."""
    if _has_modes(seen, separable=separable):
        return seen.along(seen.x, seen.space.modes.shape[1])
    return (seen.x - seen.centre) / _scale(seen)


def _from(seen: Observations, z: Floats, *, separable: bool) -> Floats:
    """A point `(d,)`, perhaps outside of the ranges."""
    moved: Floats = seen.space.modes @ z if _has_modes(seen, separable=separable) else _scale(seen) * z
    return seen.centre + moved


def evolved(seen: Observations, *, separable: bool = False) -> CMA | SepCMA:
    """The state after all complete generations.

    A generation is a block of consecutive trials after the start, those left out that were pruned. It is told as soon
    as each of them has ended; one that failed counts as the worst of its generation. What workers try meanwhile
    belongs to the next one. Its size is rounded up to a multiple of the workers that ran the start.
    """
    points = _to(seen, separable=separable)
    first = _new(seen, points.shape[1], separable=separable)
    place = {int(number): i for i, number in enumerate(seen.numbers)}
    generations: list[Generation] = []
    block: list[int] = []
    number = seen.n_start
    while number in seen.ended:
        if number not in seen.pruned:
            block.append(number)
        number += 1
        if len(block) < first.population_size:
            continue
        told = [(points[place[n]], -float(seen.scores[place[n]])) for n in block if n in place]
        if told:
            worst = max(told, key=lambda solution: solution[1])
            generations.append(told + [worst] * (len(block) - len(told)))
        block = []
    return _told(first, generations, key=(points.shape[1], separable, seen.guided, first.population_size))


def _new(seen: Observations, n_dim: int, *, separable: bool) -> CMA | SepCMA:
    # cmaes imports scipy.stats, which takes most of a second.
    from cmaes import CMA, SepCMA

    size = 4 + int(3 * np.log(n_dim))
    size = -(-size // seen.n_workers) * seen.n_workers
    sigma = SIGMA / WEIGHT_SD if seen.guided else FLAT_SIGMA
    if separable and n_dim > 1:
        return SepCMA(mean=np.zeros(n_dim), sigma=sigma, population_size=size)
    return CMA(mean=np.zeros(n_dim), sigma=sigma, population_size=size, lr_adapt=seen.guided)


def _told(cma: CMA | SepCMA, generations: list[Generation], *, key: tuple[int, bool, bool, int]) -> CMA | SepCMA:
    """The state after generations; those that were told before are not told again."""
    digests = [_digest(generation) for generation in generations]
    # Taken out, so that two threads never tell one state.
    known, state = _last.pop(key, ([], cma))
    if known != digests[: len(known)]:
        known, state = [], cma
    for generation in generations[len(known) :]:
        before = copy.deepcopy(state)
        with np.errstate(divide="ignore", invalid="ignore"):
            state.tell(generation)
        # The best of a generation may be at its mean, in a corner for one: adapted learning rates divide by the step.
        if not np.isfinite(state.mean).all():
            state = before
    state.ask()  # which decomposes the covariance
    _last[key] = (digests, state)
    return copy.deepcopy(state)


def _digest(generation: Generation) -> bytes:
    digest = hashlib.sha256()
    for z, loss in generation:
        digest.update(z.tobytes())
        digest.update(np.float64(loss).tobytes())
    return digest.digest()


def propose(seen: Observations, generator: np.random.Generator, *, separable: bool = False) -> Floats:
    """A point `(d,)` of the next generation.

    A weight outside of its range is mirrored at the end of it. Set to the end, several trials would be one point, which
    tells no direction.
    """
    cma = evolved(seen, separable=separable)
    cma.reseed_rng(int(generator.integers(1 << 32)))
    low = seen.space.low
    width = np.maximum(seen.space.high - low, 1e-12)
    above = np.mod(_from(seen, cma.ask(), separable=separable) - low, 2 * width)
    mirrored: Floats = low + np.minimum(above, 2 * width - above)
    return mirrored


def mean_point(seen: Observations, *, separable: bool = False) -> Floats:
    """The mean of the distribution `(d,)`, which is better than the best point that was drawn from it."""
    mean = _from(seen, evolved(seen, separable=separable).mean, separable=separable)
    return np.clip(mean, seen.space.low, seen.space.high)
