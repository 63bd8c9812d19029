"""The finished trials of a study as arrays, and points as parameters: where samplers of our own meet Optuna."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from tvmerge.samplers.weight_prior import modes

__all__ = ["N_START", "Observations", "Remembered", "SearchSpace", "observe", "start_point"]

Floats = npt.NDArray[np.float64]
#: Number of a trial → its point, and that on the modelled scale.
Remembered = MutableMapping[int, "tuple[Mapping[str, float], Floats]"]
#: Trials that are of one weight for all, before anything else is tried.
N_START = 8
#: Where they are, as shares of the range, as far as the study gives none; then around the best weight so far.
START_GRID = (0.5, 0.25, 0.75, 0.375, 0.625)
START_STEPS = (0.0, 0.12, -0.12)
#: Half the width of the box around the best uniform weight.
BOX = 0.8


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
    guided: bool = True  # whether the search is around the best uniform weight, or over the whole range
    values: Floats | None = None  # (n, m) of m objectives, the higher the better; None: the score is the only one
    ended: frozenset[int] = frozenset()  # numbers of the trials that were scored or have failed
    pruned: frozenset[int] = frozenset()  # and of those that were stopped before they had a score
    running: Mapping[int, Floats] = field(default_factory=dict)  # number → point (d,) that another worker tries
    n_workers: int = 1  # that ran the start

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
        """The best uniform point `(d,)`, or the middle of the ranges."""
        return self.space.uniform(self.uniform_weight) if self.guided else 0.5 * (self.space.low + self.space.high)

    @functools.cached_property
    def box(self) -> SearchSpace:
        """Where samplers search that have no prior of their own: around the best uniform point, or everywhere."""
        if not self.guided:
            return self.space
        low = np.maximum(self.space.low, self.centre - BOX)
        return replace(self.space, low=low, high=np.minimum(self.space.high, self.centre + BOX))

    @functools.cached_property
    def in_box(self) -> npt.NDArray[np.bool_]:
        """Which trials `(n,)` are in the box, up to rounding."""
        above, below = self.x > self.box.low - 1e-9, self.x < self.box.high + 1e-9
        inside: npt.NDArray[np.bool_] = np.logical_and.reduce(above & below, axis=1)
        return inside

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
    trials: Sequence[FrozenTrial],
    ranges: Mapping[str, FloatDistribution],
    *,
    n_first: int = 0,
    n_objectives: int = 1,
    maximise: bool = True,
    guided: bool = True,
    remembered: Remembered | None = None,
) -> Observations:
    """The trials that were scored, and what else is known of a study.

    A trial of a given point outside of the ranges has it as an attribute (study.py), and so has one of several
    objectives its score. Failed and pruned trials have no score.

    Args:
        trials: of a study, in any order.
        ranges: name → range, in a stable order.
        n_first: how many trials the study gives the points of.
        n_objectives: how many values a trial has; one of another number of values has no score.
        maximise: whether a higher value is better.
        guided: whether the search starts with one weight for all.
        remembered: points that were read before, so that a thousand trials of a thousand weights are read once.
    """
    space, sign = SearchSpace.of(ranges), 1.0 if maximise else -1.0
    n_start = max(n_first, N_START) if guided else n_first
    ordered = sorted(trials, key=lambda t: t.number)
    points = {} if remembered is None else remembered
    read = [(t, _coordinates(t, space, points)) for t in ordered]
    scores = [(t, x, _score(t, n_objectives)) for t, x in read if x is not None]
    known = [(t, x, score) for t, x, score in scores if score is not None]
    return Observations(
        space=space,
        numbers=np.array([t.number for t, _, _ in known], dtype=np.int64),
        x=np.array([x for _, x, _ in known]).reshape(-1, len(ranges)),
        scores=sign * np.array([score for _, _, score in known], dtype=np.float64),
        n_start=n_start,
        guided=guided,
        values=np.array([t.values for t, _, _ in known]).reshape(-1, n_objectives) if n_objectives > 1 else None,
        ended=frozenset(t.number for t in ordered if t.state.is_finished()),
        pruned=frozenset(t.number for t in ordered if t.state == TrialState.PRUNED),
        running={t.number: x for t, x in read if x is not None and t.state == TrialState.RUNNING},
        n_workers=max(len({t.user_attrs.get("worker") for t in ordered if t.number < n_start}), 1),
    )


def _coordinates(trial: FrozenTrial, space: SearchSpace, remembered: Remembered) -> Floats | None:
    """Of a trial that has a point, and has or will have a score."""
    if trial.state not in (TrialState.COMPLETE, TrialState.RUNNING):
        return None
    point = trial.user_attrs.get("weights", trial.params)
    known = remembered.get(trial.number)
    # The same object most of the time, which is compared at once.
    if known is not None and (known[0] is point or known[0] == point):
        return known[1]
    if not all(name in point for name in space.names):
        return None
    x = space.coordinates(point)
    if not np.isfinite(x).all():
        return None
    remembered[trial.number] = (point, x)
    return x


def _score(trial: FrozenTrial, n_objectives: int) -> float | None:
    """Of a scored trial; of several objectives the one number that the study made of them."""
    if trial.state != TrialState.COMPLETE or len(trial.values or ()) != n_objectives:
        return None
    score = trial.values[0] if n_objectives == 1 else trial.user_attrs.get("score", math.fsum(trial.values))
    return float(score) if all(math.isfinite(each) for each in (score, *trial.values)) else None


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
