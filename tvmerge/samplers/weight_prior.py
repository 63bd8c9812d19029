"""What is believed of the best weights before any trial: their covariance, from their names alone.

Weights of neighbouring layers, of one layer's tensors, of experts and of task vectors are not independent. The leading
eigenvectors of the covariance are the directions in which the best weights most likely differ from one uniform weight:
all up, early layers up and late ones down, and so on. A search over a few of them learns in tens of trials what one
over every weight does not learn in hundreds (Karhunen-Loève expansion; Rasmussen and Williams 2006, Gaussian Processes
for Machine Learning, section 4.3).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_MODES", "Place", "WeightName", "correlation", "modes", "places", "read_name"]

Floats = npt.NDArray[np.float64]

#: Length of the radial basis function, as a share of the model's depth.
DEPTH_LENGTH = 0.2
#: Between two kinds of tensors of one layer: both are moved by what the layer learned.
KINDS = 0.7
#: Between one weight in two experts: the same task vector on another target, and another job in the mixture.
EXPERTS = 0.5
#: Between two task vectors at one place. They share what the target can bear there and little else, and they may get
#: in each other's way; above 0, so that "a bit more of everything" stays the likeliest direction.
TASK_VECTORS = 0.3
#: Share of a weight's variance that is its own.
OWN = 0.05
#: Prior standard deviation of a weight around the best uniform one, and of a temperature's logarithm around 0.
WEIGHT_SD = 0.3
LOG_TEMPERATURE_SD = 0.3
#: More modes than that are never searched: of 1,164 weights they hold most of what neighbours share.
MAX_MODES = 64

_EXPERT = re.compile(r"expert\d+$")
_NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)(?:-(\d+))?(?=\.|$)")


@dataclass(frozen=True)
class Place:
    """Where in a model a weight acts."""

    depth: float  # 0: the embeddings; 1: the last layer
    kind: str  # `mlp.down_proj`; "" for a whole layer
    expert: str  # `expert2`; "" if there are none
    task_vector: str  # its label; "" if there is one


@dataclass(frozen=True)
class WeightName:
    """The parts of a weight's name (granularity.py, mixture.py make them)."""

    expert: str  # `expert2`; "" if there are none
    task_vector: str  # its label; "" if there is one
    stack: str  # of layers: `decoder.layers`; "" outside of them
    first: int | None  # number of the layer; of a block its first; None outside of the layers
    last: int | None
    kind: str  # the rest: `mlp.down_proj`; "" for a whole layer

    @property
    def number(self) -> float | None:
        """Of the layer, or the middle of a block."""
        return None if self.first is None or self.last is None else (self.first + self.last) / 2


def read_name(name: str) -> WeightName:
    """The parts of a weight's name."""
    *prefixes, inner = name.split("/")
    expert = prefixes.pop(0) if prefixes and _EXPERT.match(prefixes[0]) else ""
    number = _NUMBER.search(inner)
    if number is None:
        return WeightName(expert, "/".join(prefixes), "", None, None, inner)
    stack, kind = inner[: number.start()].rstrip("."), inner[number.end() :].lstrip(".")
    return WeightName(expert, "/".join(prefixes), stack, int(number[1]), int(number[2] or number[1]), kind)


def places(names: Sequence[str]) -> list[Place]:
    """Where each weight acts, as its name says.

    Depth is the number of the layer over that of the last layer of the same stack, for a block of layers its middle.
    Outside of the layers it is 0 for embeddings and 1 for all else (the last norm, the head), and one and the same for
    all where no name has a number.
    """
    parts = [read_name(name) for name in names]
    last: dict[str, float] = {}
    for each in parts:
        if each.number is not None:
            last[each.stack] = max(each.number, last.get(each.stack, 0.0))
    found = []
    for each in parts:
        kind, number = each.kind, each.number
        if number is not None:
            depth = number / last[each.stack] if last[each.stack] else 0.0
        else:
            depth = 0.5 if not last else 0.0 if "emb" in kind or kind in {"wte", "wpe"} else 1.0
        several = f"{each.stack}." if len(last) > 1 and number is not None else ""
        found.append(Place(depth=depth, kind=several + kind, expert=each.expert, task_vector=each.task_vector))
    return found


def correlation(names: Sequence[str]) -> Floats:
    """The prior correlation of weights, or of temperatures.

    The entrywise product of positive semidefinite matrices is one (Schur 1911), so that the product over depth, kind,
    expert and task vector is, and with OWN on the diagonal it is positive definite.

    Returns:
        `(d, d)`, ones on the diagonal.
    """
    found = places(names)
    depth = np.array([place.depth for place in found])
    shared = np.exp(-0.5 * ((depth[:, None] - depth) / DEPTH_LENGTH) ** 2)
    for attribute, between in (("kind", KINDS), ("expert", EXPERTS), ("task_vector", TASK_VECTORS)):
        _, of = np.unique([getattr(place, attribute) for place in found], return_inverse=True)
        shared *= np.where(of[:, None] == of, 1.0, between)
    mixed: Floats = (1 - OWN) * shared + OWN * np.eye(len(found))
    return mixed


@functools.lru_cache(maxsize=8)
def modes(names: tuple[str, ...], is_temperature: tuple[bool, ...]) -> Floats:
    """The directions in which the best point most likely differs from a uniform one, the likeliest first.

    Weights and temperatures are not correlated: what one of them does to a score says nothing of the other. A mode is
    ranked by its share of the variance of its own kind, as there may be many more weights than temperatures.

    Args:
        names: of all numbers that are searched.
        is_temperature: which of them are temperatures, modelled by their logarithm.

    Returns:
        `(d, min(d, MAX_MODES))`, read-only: orthogonal columns, each as long as its prior standard deviation.
    """
    temperature = np.array(is_temperature)
    ranked: list[tuple[float, int, Floats]] = []
    for mask, sd in ((~temperature, WEIGHT_SD), (temperature, LOG_TEMPERATURE_SD)):
        if not mask.any():
            continue
        values, vectors = _decomposed(correlation([name for name, one in zip(names, mask, strict=True) if one]))
        for value, vector in zip(values[:MAX_MODES], vectors.T[:MAX_MODES], strict=True):
            column = np.zeros(len(names))
            column[mask] = sd * np.sqrt(value) * vector
            ranked.append((-value / mask.sum(), len(ranked), column))
    columns = np.stack([column for _, _, column in sorted(ranked, key=lambda each: each[:2])[:MAX_MODES]], axis=1)
    columns.flags.writeable = False
    return columns


def _decomposed(matrix: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues, the largest first, and eigenvectors of one orientation.

    Where kinds are interchangeable eigenvalues coincide and any basis of their space would do: a diagonal that differs
    by less than anything that matters picks one, the same in every process.
    """
    d = len(matrix)
    values, vectors = np.linalg.eigh(matrix + np.diag(np.linspace(1e-6, 0.0, d)))
    values, vectors = values[::-1], vectors[:, ::-1]
    # The sign is that of the first large entry: of the very largest there may be two, equal up to rounding.
    first = np.argmax(np.abs(vectors) > 0.5 * np.abs(vectors).max(axis=0), axis=0)
    return values, vectors * np.sign(vectors[first, np.arange(d)])
