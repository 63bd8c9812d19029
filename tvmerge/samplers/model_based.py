"""Samplers of our own behind Optuna's interface: each draw a function of the finished trials and a generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from tvmerge.samplers.observations import Observations, observe, start_point

__all__ = ["ModelBasedSampler"]

Floats = npt.NDArray[np.float64]


class ModelBasedSampler(BaseSampler):
    """One weight for all in the first trials, then what a model of the scores proposes.

    Args:
        propose: scored trials and the trial's own generator → a point `(d,)` on the modelled scale.
        seed: of this trial.
        n_first: how many trials the study gives the points of.
    """

    def __init__(
        self, propose: Callable[[Observations, np.random.Generator], Floats], *, seed: int, n_first: int = 0
    ) -> None:
        self._propose = propose
        self._seed = seed
        self._n_first = n_first

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What all finished trials have."""
        return intersection_search_space(study.get_trials(deepcopy=False))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """All numbers of a trial together."""
        ranges = {name: each for name, each in search_space.items() if isinstance(each, FloatDistribution)}
        maximise = study.direction == StudyDirection.MAXIMIZE
        seen = observe(study.get_trials(deepcopy=False), ranges, n_first=self._n_first, maximise=maximise)
        x = start_point(seen, trial.number)
        if x is None:
            x = self._propose(seen, np.random.default_rng(self._seed))
        return seen.space.point(x, ranges)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: `sample_relative` draws all numbers."""
        raise AssertionError(f"{param_name} was not drawn together with the other numbers")
