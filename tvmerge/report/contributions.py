"""What each group of weights does to the score, as far as the trials tell.

A linear regression of the scores on the weights' deviations from their mean, with the sampler's prior over weights
(weight_prior.py): neighbouring layers do alike unless trials say otherwise, and what no trial told stays as wide as
the prior. The mean weight and its square are left to themselves, as scores have a peak along it. It is Bayesian linear
regression (Bishop 2006, Pattern Recognition and Machine Learning, section 3.3) after restriction to contrasts
(Patterson and Thompson 1971, Recovery of inter-block information when block sizes are unequal, Biometrika 58); what
share of the scores' spread is signal is not known, so that effects are averaged over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tvmerge.report.grid import Grid, make_grid, scored_trials, searched_names
from tvmerge.report.style import COLOURS, Drawn, heading, intervals, new_figure, shorten
from tvmerge.report.weights import columns_of
from tvmerge.results import Results
from tvmerge.samplers.recommend import student95
from tvmerge.samplers.weight_prior import correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Effects", "contributions", "effects"]

Floats = npt.NDArray[np.float64]

#: Trials of weights that differ among themselves, below which nothing is drawn; and the last that are looked at.
FEWEST, RECENT = 10, 400
#: Of more weights the covariance takes seconds.
MAX_WEIGHTS = 2000
#: By how much the weights of a group are raised.
STEP = 0.1
#: Variance of the signal over that of the noise, tried in turn with equal prior probability.
SIGNALS = np.geomspace(0.01, 30.0, 12)
#: More groups than that are not named one by one.
MAX_NAMED = 30


@dataclass(frozen=True)
class Effects:
    """What the score gains if groups of weights are raised by STEP and all others are lowered to the same mean."""

    mean: Floats  # (g,)
    half: Floats  # (g,), of the 95% interval's width

    @property
    def n_clear(self) -> int:
        """How many are not 0 with 95% probability."""
        return int((np.abs(self.mean) > self.half).sum())


def effects(x: Floats, scores: Floats, names: Sequence[str], groups: Floats) -> Effects:
    """The effects of groups of weights.

    Args:
        x: `(n, d)`, weights of trials.
        scores: `(n,)`.
        names: of the weights.
        groups: `(g, d)`, 1 where a weight belongs to a group, else 0.
    """
    n = len(x)
    mean = x.mean(axis=1)
    plain = np.stack([np.ones(n), mean, mean**2], axis=1)
    # The contrasts: whatever is orthogonal to what the mean weight explains.
    u, s, _ = np.linalg.svd(plain)
    q = u[:, int((s > 1e-8 * s[0]).sum()) :]
    # Raised at the same mean.
    raised = STEP * (groups - groups.mean(axis=1, keepdims=True))
    prior = correlation(names)
    deviations = q.T @ (x - mean[:, None])  # (m, d)
    cross = deviations @ prior
    values, vectors = np.linalg.eigh(cross @ deviations.T)
    values, z = np.maximum(values, 0.0), vectors.T @ (q.T @ scores)
    of_groups = vectors.T @ cross @ raised.T  # (m, g)
    own = np.einsum("gd,de,ge->g", raised, prior, raised, optimize=True)
    m, scale = len(z), max(float(values.mean()), 1e-300)
    logs, means, variances = [], [], []
    for signal in SIGNALS / scale:
        known = 1 + signal * values
        noise = max(float((z**2 / known).mean()), 1e-300)
        logs.append(-0.5 * (m * np.log(noise) + np.log(known).sum()))
        means.append(signal * of_groups.T @ (z / known))
        variances.append(noise * np.maximum(signal * own - signal**2 * (of_groups.T**2 @ (1 / known)), 0.0))
    chance = np.exp(np.array(logs) - max(logs))
    chance /= chance.sum()
    average = chance @ np.array(means)
    variance = chance @ (np.array(variances) + (np.array(means) - average) ** 2)
    return Effects(average, student95(max(m, 3)) * np.sqrt(variance))


def contributions(results: Results) -> Drawn | None:
    """What layers, kinds of tensors, experts and task vectors contribute."""
    names, _ = searched_names(results)
    if len(names) < 2:
        return None
    if len(names) > MAX_WEIGHTS:
        return Drawn(None, f"What each group contributes is not computed for more than {MAX_WEIGHTS} weights.")
    trials = scored_trials(results)[-RECENT:]
    x = np.array([[trial.weights.get(name, np.nan) for name in names] for trial in trials]).reshape(-1, len(names))
    told = int((np.ptp(x, axis=1) > 1e-9).sum())
    if told < FEWEST:
        return Drawn(None, f"What each group contributes {told} trials of unequal weights cannot tell; {FEWEST} may.")
    scores = np.array([trial.score for trial in trials], dtype=np.float64)
    grid = make_grid(names)
    parts = _parts(grid)
    found = {what: effects(x, scores, names, groups) for what, (_, groups) in parts.items()}
    narrow = [what for what in parts if what != "layer"]
    heights = [2.7] if "layer" in parts else []
    heights += [0.8 + 0.19 * max(len(parts[what][0]) for what in narrow)] if narrow else []
    figure = new_figure(min(sum(heights) + 0.4, 11.0))
    sub = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if "layer" in parts:
        _upright(sub[0].add_subplot(), grid, found["layer"])
    if narrow:
        for axes, what in zip(sub[-1].subplots(1, len(narrow), squeeze=False)[0], narrow, strict=True):
            _level(axes, parts[what][0], found[what], what)
    n, clear = sum(len(each.mean) for each in found.values()), sum(each.n_clear for each in found.values())
    return Drawn(figure, _said(n, clear, len(trials)))


def _parts(grid: Grid) -> dict[str, tuple[list[str], Floats]]:
    """What is looked at → labels, and a row for each that says which weights it has."""
    row, column = grid.places.T
    kinds, groups = grid.kinds, grid.groups
    kind_of = np.array([kinds.index(kind) for _, kind in grid.rows])[row]
    group_of = np.array([groups.index(group) for group, _ in grid.rows])[row]
    wanted = {
        "layer": (list(grid.columns), column),
        "kind of tensor": (kinds, kind_of),
        "expert or task vector": (groups, group_of),
    }
    return {
        what: (labels, (np.arange(len(labels))[:, None] == of).astype(np.float64))
        for what, (labels, of) in wanted.items()
        if len(labels) > 1
    }


def _colours(found: Effects) -> list[str]:
    clear = np.abs(found.mean) > found.half
    return [
        COLOURS["best" if up else "second"][0] if one else COLOURS["other"][0]
        for one, up in zip(clear, found.mean > 0, strict=True)
    ]


def _upright(axes: Axes, grid: Grid, found: Effects) -> None:
    axes.axhline(0, color=COLOURS["muted"][0], linewidth=0.8)
    at, colours = np.arange(len(found.mean)), _colours(found)
    axes.vlines(at, found.mean - found.half, found.mean + found.half, colors=colours, linewidth=1.2)
    axes.scatter(at, found.mean, s=14, color=colours, linewidths=0, zorder=3)
    columns_of(axes, grid)
    axes.set_ylabel(f"gain in score, weights +{STEP}")
    heading(axes, "by layer" if any(grid.layers) else "by weight")


def _level(axes: Axes, labels: Sequence[str], found: Effects, what: str) -> None:
    axes.axvline(0, color=COLOURS["muted"][0], linewidth=0.8)
    ends = list(zip(found.mean - found.half, found.mean + found.half, strict=True))
    intervals(axes, range(len(labels)), found.mean.tolist(), ends, _colours(found))
    step = -(-len(labels) // MAX_NAMED)
    axes.set_yticks(range(0, len(labels), step), [shorten(label or "whole layers", 24) for label in labels[::step]])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel(f"gain in score, weights +{STEP}")
    axes.locator_params(axis="x", nbins=4)
    heading(axes, f"by {what}")


def _said(n: int, clear: int, trials: int) -> str:
    said = (
        f"What the score gains if the weights of a group are raised by {STEP} and all others lowered to the same mean, "
        f"with 95% intervals, by a linear regression over {trials} trials. "
    )
    if not clear:
        return said + "No group's effect can be told from 0 yet."
    chance = max(round(n * 0.05), 1)
    return said + f"{clear} of {n} intervals, in colour, are without 0; about {chance} would be by chance."
