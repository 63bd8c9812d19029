"""CMA-ES that starts right: at the best uniform weight, and with what is believed of the weights as its covariance.

It runs in the coordinates of the prior's modes. CMA-ES is invariant under linear maps, so that the identity there is
the prior covariance over the weights; and there are at most MAX_MODES of them, so that 1,164 weights take milliseconds.
Its state is not stored: it is told all finished generations again for each draw.

Source: Hansen 2016, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772; with learning rates adapted to the
noise, Nomura et al. 2023, arXiv:2304.03473.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cmaes import CMA

from tvmerge.samplers.observations import Observations
from tvmerge.samplers.weight_prior import WEIGHT_SD

__all__ = ["evolved", "mean_point", "propose"]

Floats = npt.NDArray[np.float64]

#: Standard deviation of the first generation's weights.
SIGMA = 0.2


def evolved(seen: Observations) -> CMA:
    """The state after all complete generations.

    A generation is a block of consecutive trials after the start. It is told as soon as each of them has ended; one
    that failed counts as the worst of its generation. What workers try meanwhile belongs to the next one.
    """
    n_modes = seen.space.modes.shape[1]
    cma = CMA(mean=np.zeros(n_modes), sigma=SIGMA / WEIGHT_SD, lr_adapt=True)
    z = seen.along(seen.x, n_modes)
    place = {int(number): i for i, number in enumerate(seen.numbers)}
    first = seen.n_start
    while all(number in seen.ended for number in range(first, first + cma.population_size)):
        scored = [place[n] for n in range(first, first + cma.population_size) if n in place]
        first += cma.population_size
        if not scored:
            continue
        told = [(z[i], -float(seen.scores[i])) for i in scored]
        worst = max(told, key=lambda solution: solution[1])
        cma.tell(told + [worst] * (cma.population_size - len(told)))
    return cma


def propose(seen: Observations, generator: np.random.Generator) -> Floats:
    """A point `(d,)` of the next generation.

    A weight outside of its range is mirrored at the end of it. Set to the end, several trials would be one point, which
    tells no direction.
    """
    cma = evolved(seen)
    cma.reseed_rng(int(generator.integers(1 << 32)))
    low = seen.space.low
    width = np.maximum(seen.space.high - low, 1e-12)
    above = np.mod(seen.centre + seen.space.modes @ cma.ask() - low, 2 * width)
    mirrored: Floats = low + np.minimum(above, 2 * width - above)
    return mirrored


def mean_point(seen: Observations) -> Floats:
    """The mean of the distribution `(d,)`, which is better than the best point that was drawn from it."""
    return seen.at(evolved(seen).mean)
