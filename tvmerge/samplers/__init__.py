"""Samplers by name, each a pure function of the trials, the seed and the trial's number.

Optuna's own samplers draw from a generator that starts again when a study is loaded, so that a resumed study repeats
its first draws. Here every trial has seeds that are derived from its number: a study that was killed and resumed asks
for the same weights as one that was not.
"""

from __future__ import annotations

from tvmerge.samplers.points import SAMPLERS, PointSampler, check_sampler
from tvmerge.samplers.recommend import Recommendation, pareto_front, recommend
from tvmerge.samplers.seeded import SeededSampler

__all__ = [
    "SAMPLERS",
    "PointSampler",
    "Recommendation",
    "SeededSampler",
    "check_sampler",
    "pareto_front",
    "recommend",
]
