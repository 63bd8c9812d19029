"""The finished trials of a study as arrays, and points as parameters: where samplers of our own meet Optuna."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from tvmerge.samplers.weight_prior import modes

__all__ = ["N_START", "Observations", "SearchSpace", "observe", "start_point"]

Floats = npt.NDArray[np.float64]
#: Trials that are of one weight for all, before anything else is tried.
N_START = 8
#: Where they are, as shares of the range, as far as the study gives none; then around the best weight so far.
START_GRID = (0.5, 0.25, 0.75, 0.375, 0.625)
START_STEPS = (0.0, 0.12, -0.12)


@dataclass(frozen=True)
class SearchSpace:
    """What is searched, on the scale on which it is modelled: weights as they are, temperatures by their logarithm."""

    names: tuple[str, ...]
    low: Floats  # (d,)
    high: Floats  # (d,)
    is_temperature: npt.NDArray[np.bool_]  # (d,)

    @classmethod
    def of(cls, ranges: Mapping[str, FloatDistribution]) -> SearchSpace:
        """That of Optuna's ranges."""
        ends = [(math.log(r.low), math.log(r.high)) if r.log else (r.low, r.high) for r in ranges.values()]
        return cls(
            names=tuple(ranges),
            low=np.array([low for low, _ in ends]),
            high=np.array([high for _, high in ends]),
            is_temperature=np.array([r.log for r in ranges.values()]),
        )

    @property
    def modes(self) -> Floats:
        """Those of the prior, `(d, m)`."""
        return modes(self.names, tuple(self.is_temperature.tolist()))

    def coordinates(self, point: Mapping[str, float]) -> Floats:
        """A point, `(d,)`."""
        values = np.array([point[name] for name in self.names], dtype=np.float64)
        values[self.is_temperature] = np.log(values[self.is_temperature])
        return values

    def point(self, x: Floats, ranges: Mapping[str, FloatDistribution]) -> dict[str, float]:
        """The nearest point of the ranges."""
        values = np.where(self.is_temperature, np.exp(np.where(self.is_temperature, x, 0.0)), x)
        inside = zip(ranges.items(), values.tolist(), strict=True)
        return {name: min(max(value, r.low), r.high) for (name, r), value in inside}

    def uniform(self, weight: float) -> Floats:
        """One weight for all, and temperatures of 1, as far as the ranges allow."""
        return np.clip(np.where(self.is_temperature, 0.0, weight), self.low, self.high)


@dataclass(frozen=True)
class Observations:
    """Scored trials, by number."""

    space: SearchSpace
    numbers: npt.NDArray[np.int64]  # (n,)
    x: Floats  # (n, d)
    scores: Floats  # (n,), the higher the better
    n_start: int  # trials of a lower number are the start
    ended: frozenset[int] = frozenset()  # numbers of the trials that were scored or have failed

    @functools.cached_property
    def uniform_weight(self) -> float:
        """The best weight for all, by a quadratic through those that were tried, near the best of them.

        Source: response surface methodology, Box and Wilson 1951; the fit's weights fall off over 0.45.
        """
        weights = self.x[:, ~self.space.is_temperature]
        if not weights.shape[1]:
            return 1.0
        start = (self.numbers < self.n_start) & (np.ptp(weights, axis=1) < 1e-9)
        low, high = self.weight_range
        if not start.any():
            return 0.5 * (low + high)
        u, y = weights[start, 0], self.scores[start]
        top = float(u[np.argmax(y)])
        peak = top
        if len(np.unique(u)) > 3:
            nearness = np.exp(-0.25 * ((u - top) / 0.45) ** 2)
            curvature, slope, _ = np.polyfit(u, y, 2, w=nearness)
            if curvature < -1e-3 * max(float(np.ptp(y)), 1e-9):
                peak = float(np.clip(-slope / (2 * curvature), top - 0.3, top + 0.3))
        return float(np.clip(peak, low, high))

    @property
    def weight_range(self) -> tuple[float, float]:
        """Least and greatest weight; those of temperatures if nothing else is searched."""
        first = int(np.argmin(self.space.is_temperature))
        return float(self.space.low[first]), float(self.space.high[first])

    @functools.cached_property
    def centre(self) -> Floats:
        """The best uniform point, `(d,)`."""
        return self.space.uniform(self.uniform_weight)

    def along(self, x: Floats, n_modes: int) -> Floats:
        """Coordinates `(n, n_modes)` of points `(n, d)` along the leading modes, in prior standard deviations."""
        basis = self.space.modes[:, :n_modes]
        z: Floats = (x - self.centre) @ (basis / (basis**2).sum(axis=0))
        return z

    def at(self, z: Floats) -> Floats:
        """The point `(d,)` at coordinates `(k,)` of the leading modes, inside of the ranges."""
        x = self.centre + self.space.modes[:, : len(z)] @ z
        return np.clip(x, self.space.low, self.space.high)


def observe(
    trials: Sequence[FrozenTrial], ranges: Mapping[str, FloatDistribution], *, n_first: int = 0, maximise: bool = True
) -> Observations:
    """The trials that were scored.

    A trial of a given point outside of the ranges has it as an attribute (study.py). Failed and running trials are
    left out: they have no score, and workers differ by their trials' numbers.

    Args:
        trials: of a study, in any order.
        ranges: name → range, in a stable order.
        n_first: how many trials the study gives the points of.
        maximise: whether a higher value is better.
    """
    space = SearchSpace.of(ranges)
    scored = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: t.number)
    points = [(t, t.user_attrs.get("weights", t.params)) for t in scored]
    known = [(t, point) for t, point in points if t.value is not None and set(ranges) <= set(point)]
    x = np.array([space.coordinates(point) for _, point in known]).reshape(-1, len(ranges))
    sign = 1.0 if maximise else -1.0
    return Observations(
        space=space,
        numbers=np.array([t.number for t, _ in known], dtype=np.int64),
        x=x,
        scores=np.array([sign * (t.value or 0.0) for t, _ in known], dtype=np.float64),
        n_start=max(n_first, N_START),
        ended=frozenset(t.number for t in trials if t.state.is_finished()),
    )


def start_point(seen: Observations, number: int) -> Floats | None:
    """The point of a trial of the start that the study gave none: one weight for all.

    Returns:
        `(d,)`, or None after the start.
    """
    if number >= seen.n_start:
        return None
    if number < len(START_GRID):
        share = START_GRID[number]
        low, high = seen.weight_range
        return seen.space.uniform(low + share * (high - low))
    # The last of the start is at the peak, as most studies give all points but that one.
    return seen.space.uniform(seen.uniform_weight + START_STEPS[(N_START - 1 - number) % len(START_STEPS)])
