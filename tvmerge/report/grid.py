"""Weights as a grid: kinds of tensors, experts and task vectors from top to bottom, layers from left to right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvmerge.mixture import GATE
from tvmerge.results import Results, TrialRow
from tvmerge.samplers.weight_prior import places, read_name

__all__ = ["Grid", "best_observed", "make_grid", "points", "scored_trials", "searched_names"]

Floats = npt.NDArray[np.float64]

#: What the rows of weights outside of the layers are called, where layers have several kinds.
OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Grid:
    """Where each weight is drawn."""

    names: Sequence[str]  # of the weights
    rows: Sequence[tuple[str, str]]  # expert and task vector; kind of tensor
    columns: Sequence[str]  # number of a layer or block, or name of what is outside of the layers
    layers: Sequence[bool]  # which columns are layers
    places: npt.NDArray[np.int64]  # (n, 2): row and column of each name

    @property
    def groups(self) -> list[str]:
        """Experts and task vectors, in order."""
        return list(dict.fromkeys(group for group, _ in self.rows))

    @property
    def kinds(self) -> list[str]:
        """Kinds of tensors, in order."""
        return list(dict.fromkeys(kind for _, kind in self.rows))

    def fill(self, weights: Mapping[str, float]) -> Floats:
        """Weights by `(row, column)`, NaN where there is none."""
        filled = np.full((len(self.rows), len(self.columns)), math.nan)
        for name, (row, column) in zip(self.names, self.places, strict=True):
            filled[row, column] = weights.get(name, math.nan)
        return filled


def make_grid(names: Sequence[str]) -> Grid:
    """The grid of weights, in the order of the model.

    Embeddings are left of the layers, what else is outside of them is right.
    """
    parts, found = [read_name(name) for name in names], places(names)
    several = len({each.stack for each in parts if each.number is not None}) > 1
    inside = [each.number is not None for each in parts]
    kinds = {place.kind for place, is_inside in zip(found, inside, strict=True) if is_inside}
    rest = "" if kinds <= {""} else OUTSIDE
    rows: dict[tuple[str, str], None] = {}
    columns: dict[tuple[float, float, str], None] = {}
    cells = []
    for each, place in zip(parts, found, strict=True):
        group = " · ".join(part for part in (each.expert, each.task_vector) if part)
        if each.number is None:
            row = (group, rest)
            column = (-1.0 if place.depth == 0.0 else math.inf, 0.0, each.kind)
        else:
            row = (group, place.kind.strip(".") if several else each.kind)
            label = f"{each.first}" if each.first == each.last else f"{each.first}-{each.last}"
            column = (each.number, 0.0, label)
        rows[row], columns[column] = None, None
        cells.append((row, column))
    groups = list(dict.fromkeys(group for group, _ in rows))
    # The rows of an expert are together; sorting keeps their order, and what is outside of the layers is last.
    order = {row: n for n, row in enumerate(sorted(rows, key=lambda row: (groups.index(row[0]), row[1] == OUTSIDE)))}
    across = {column: n for n, column in enumerate(sorted(columns, key=lambda each: each[0]))}
    if len(across) == 1 and len(groups) == len(names) > 1:
        return _one_row(names, [shorter or "weight" for shorter in groups])
    return Grid(
        names=list(names),
        rows=list(order),
        columns=[label for _, _, label in across],
        layers=[0 <= at < math.inf for at, _, _ in across],
        places=np.array([(order[row], across[column]) for row, column in cells], dtype=np.int64).reshape(-1, 2),
    )


def _one_row(names: Sequence[str], labels: Sequence[str]) -> Grid:
    """The grid of one weight for each expert or task vector."""
    places = np.array([(0, n) for n in range(len(names))], dtype=np.int64)
    return Grid(list(names), [("", "")], list(labels), [False] * len(names), places)


def searched_names(results: Results) -> tuple[list[str], list[str]]:
    """Names of the weights, and of the temperatures of routers, in the order of the model."""
    known = next((trial.weights for trial in results.trials if trial.weights), {})
    gates = [name for name in known if results.settings.get("search_gate") and name.startswith(f"{GATE}/")]
    return [name for name in known if name not in set(gates)], gates


def scored_trials(results: Results) -> list[TrialRow]:
    """Trials that have a score, by number."""
    return [trial for trial in results.trials if trial.state == "complete" and trial.score is not None]


def best_observed(results: Results) -> TrialRow | None:
    """The trial of the highest score, of equal ones the first."""
    scored = scored_trials(results)
    return max(scored, key=lambda trial: (trial.score, -trial.number)) if scored else None


def points(results: Results) -> dict[str, Mapping[str, float]]:
    """The points that pictures of weights show, the one that matters most first: name → weights."""
    found: dict[str, Mapping[str, float]] = {}
    if results.chosen is not None and (saved := results.candidates[results.chosen]).weights:
        found["saved"] = saved.weights
    if results.recommendation is not None:
        found["recommended"] = results.recommendation.point
    if (best := best_observed(results)) is not None:
        found["best observed"] = best.weights
    alike: list[tuple[list[str], Mapping[str, float]]] = []
    for name, weights in found.items():
        same = next((names for names, known in alike if dict(known) == dict(weights)), None)
        if same is None:
            alike.append(([name], weights))
        else:
            same.append(name)
    return {_joined(names): weights for names, weights in alike}


def _joined(names: Sequence[str]) -> str:
    return names[0] + (f" ({', '.join(names[1:])})" if len(names) > 1 else "")
