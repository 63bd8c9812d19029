"""Samplers by name, each a pure function of the finished trials, the seed and the trial's number.

Optuna's own samplers draw from a generator that starts again when a study is loaded, so that a resumed study repeats
its first draws. Here every trial gets a fresh sampler whose seed is derived from the trial's number: a study that was
killed and resumed asks for the same weights as one that was not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from tvmerge.samplers import cma_es, rsm
from tvmerge.samplers.model_based import ModelBasedSampler
from tvmerge.samplers.recommend import Recommendation, recommend

__all__ = ["SAMPLERS", "Recommendation", "SeededSampler", "recommend"]


def _tpe(seed: int, n_first: int) -> BaseSampler:
    return TPESampler(seed=seed)


def _cma_es(seed: int, n_first: int) -> BaseSampler:
    return ModelBasedSampler(cma_es.propose, seed=seed, n_first=n_first)


def _rsm(seed: int, n_first: int) -> BaseSampler:
    return ModelBasedSampler(rsm.propose, seed=seed, n_first=n_first)


#: Name → sampler from the seed of a trial and the number of trials whose points the study gives.
SAMPLERS: Mapping[str, Callable[[int, int], BaseSampler]] = {"TPE": _tpe, "CMA-ES": _cma_es, "RSM": _rsm}


class SeededSampler(BaseSampler):
    """Given weights for the first trials, then the draws of a named sampler, each from its own seed.

    Args:
        name: a key of SAMPLERS.
        seed: of the whole study.
        search_space: weight name → range; the same for all trials.
        first: the weights of the first trials, by trial number.
    """

    def __init__(
        self,
        *,
        name: str,
        seed: int,
        search_space: Mapping[str, FloatDistribution],
        first: Sequence[Mapping[str, float]],
    ) -> None:
        self._make = SAMPLERS[name]
        self._seed = seed
        self._search_space = dict(search_space)
        self._first = list(first)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All weights, in every trial."""
        return dict(self._search_space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The weights of a trial, all of them."""
        if trial.number < len(self._first):
            return dict(self._first[trial.number])
        sampler_seed, uniform_seed = np.random.SeedSequence([self._seed, trial.number]).generate_state(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            drawn = self._make(int(sampler_seed), len(self._first)).sample_relative(study, trial, search_space)
        if drawn:
            return drawn
        # The sampler has too few trials to start from and leaves the draw to us: uniform, in one go, so that a trial
        # that was killed between two parameters is completed with the values that it would have had.
        generator = np.random.default_rng(int(uniform_seed))
        return {name: _uniform(generator, weight) for name, weight in self._search_space.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: `sample_relative` draws all weights."""
        raise AssertionError(f"{param_name} was not drawn together with the other weights")


def _uniform(generator: np.random.Generator, weight: FloatDistribution) -> float:
    """A number anywhere in a range, on its scale."""
    if not weight.log:
        return float(generator.uniform(weight.low, weight.high))
    drawn = math.exp(generator.uniform(math.log(weight.low), math.log(weight.high)))
    return min(max(drawn, weight.low), weight.high)  # which the rounding could leave
