"""Samplers of our own behind Optuna's interface, for anybody's study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from tvmerge.samplers.points import PointSampler

__all__ = ["SeededSampler"]


class SeededSampler(BaseSampler):
    """Given points for the first trials, then the draws of a named sampler, each from its own seed.

    Args:
        name: a key of SAMPLERS, or `module:Class`.
        seed: of the whole study.
        search_space: name → range, the same for all trials; None: the numbers that all finished trials have.
        first: the points of the first trials, by trial number.
        guided: whether a search starts with one weight for all.
    """

    def __init__(
        self,
        *,
        name: str = "RSM",
        seed: int = 0,
        search_space: Mapping[str, FloatDistribution] | None = None,
        first: Sequence[Mapping[str, float]] = (),
        guided: bool = True,
    ) -> None:
        self._name = name
        self._seed = seed
        self._search_space = search_space
        self._first = list(first)
        self._guided = guided
        self._sampler: PointSampler | None = None
        self._known: dict[str, BaseDistribution] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All numbers, in every trial."""
        if self._search_space is not None:
            return dict(self._search_space)
        known = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: each for name, each in known.items() if isinstance(each, FloatDistribution) and not each.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """All numbers of a trial together."""
        if trial.number < len(self._first):
            return dict(self._first[trial.number])
        if not search_space:
            return {}
        if self._sampler is None or search_space != self._known:
            self._known = dict(search_space)
            self._sampler = PointSampler(
                name=self._name,
                seed=self._seed,
                ranges={name: each for name, each in search_space.items() if isinstance(each, FloatDistribution)},
                n_first=len(self._first),
                guided=self._guided,
                n_objectives=len(study.directions),
                maximise=study.directions[0] == StudyDirection.MAXIMIZE,
            )
        return dict(self._sampler.point(study.get_trials(deepcopy=False), trial.number))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The middle of a number's range in the first trial of a study that was not told its numbers; else random."""
        if isinstance(param_distribution, FloatDistribution) and not study.get_trials(deepcopy=False)[:-1]:
            low, high = param_distribution.low, param_distribution.high
            return math.sqrt(low * high) if param_distribution.log else 0.5 * (low + high)
        entropy = [self._seed, trial.number, *param_name.encode()]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        return RandomSampler(seed=seed).sample_independent(study, trial, param_name, param_distribution)
