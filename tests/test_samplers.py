"""Samplers: one seed gives the same trials, in one process or in many."""

from __future__ import annotations

from typing import get_args, get_type_hints

import optuna
import pytest
from optuna.distributions import FloatDistribution

from tvmerge.config import JglueConfig
from tvmerge.samplers import SAMPLERS, SeededSampler

RANGES = {name: FloatDistribution(0.0, 2.0) for name in ("a", "b", "c")}
FIRST = [dict.fromkeys(RANGES, 0.0), dict.fromkeys(RANGES, 1.0)]


def objective(weights: dict[str, float]) -> float:
    return -sum((weight - target) ** 2 for weight, target in zip(weights.values(), (0.3, 1.0, 1.7), strict=True))


def run(name: str, seed: int, n_trials: int, *, study: optuna.Study | None = None) -> optuna.Study:
    sampler = SeededSampler(name=name, seed=seed, search_space=RANGES, first=FIRST)
    if study is None:
        study = optuna.create_study(direction="maximize", sampler=sampler)
    study.sampler = sampler
    while len(study.trials) < n_trials:
        trial = study.ask()
        weights = {name: trial.suggest_float(name, 0.0, 2.0) for name in RANGES}
        study.tell(trial, objective(weights))
    return study


def params(study: optuna.Study) -> list[dict[str, float]]:
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_seed_gives_one_sequence(name: str) -> None:
    once = params(run(name, 7, 25))
    assert once == params(run(name, 7, 25))
    assert once != params(run(name, 8, 25))
    assert once[:2] == FIRST
    assert len({tuple(weights.values()) for weights in once}) == 25, "a draw was repeated"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_made_anew_in_the_middle_goes_on_as_if_it_had_not_been(name: str) -> None:
    study = run(name, 7, 13)
    for n_trials in (14, 21, 25):
        study = run(name, 7, n_trials, study=study)
    assert params(study) == params(run(name, 7, 25))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_learns(name: str) -> None:
    study = run(name, 3, 60)
    values = [trial.values[0] for trial in study.trials]
    assert max(values[30:]) > max(values[2:12])
    assert study.best_value > -0.25


def test_the_command_line_knows_the_samplers() -> None:
    assert get_args(get_type_hints(JglueConfig)["optuna_sampler"]) == tuple(SAMPLERS)
