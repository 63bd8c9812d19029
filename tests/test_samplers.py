"""Samplers: one seed gives the same trials, in one process or in many."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from tvmerge.samplers import SAMPLERS, Recommendation, SeededSampler, recommend
from tvmerge.samplers.recommend import student95

RANGES = {name: FloatDistribution(0.0, 2.0) for name in ("a", "b", "c")}
FIRST = [dict.fromkeys(RANGES, 0.0), dict.fromkeys(RANGES, 1.0)]


def objective(weights: dict[str, float]) -> float:
    return -sum((weight - target) ** 2 for weight, target in zip(weights.values(), (0.3, 1.0, 1.7), strict=True))


def run(name: str, seed: int, n_trials: int, *, study: optuna.Study | None = None, guided: bool = True) -> optuna.Study:
    sampler = SeededSampler(name=name, seed=seed, search_space=RANGES, first=FIRST, guided=guided)
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
    # A Gaussian process that is told no noise is sure of a corner.
    assert len({tuple(weights.values()) for weights in once}) == 25 or name == "GP", "a draw was repeated"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_made_anew_in_the_middle_goes_on_as_if_it_had_not_been(name: str) -> None:
    study = run(name, 7, 13)
    for n_trials in (14, 21, 25):
        study = run(name, 7, n_trials, study=study)
    assert params(study) == params(run(name, 7, 25))


def test_tpe_draws_what_it_always_drew() -> None:
    study = run("TPE", 7, 20, guided=False)
    sampler_seed, _ = np.random.SeedSequence([7, 20]).generate_state(2)
    study.sampler = optuna.samplers.TPESampler(seed=int(sampler_seed))
    drawn = study.ask(fixed_distributions=dict(RANGES)).params
    assert run("TPE", 7, 21, guided=False).trials[20].params == pytest.approx(drawn)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("random", "QMC")])
def test_a_sampler_learns(name: str) -> None:
    learned, chance = (run(each, 3, 90 if each != "GP" else 40) for each in (name, "random"))
    values, drawn = ([trial.values[0] for trial in study.trials] for study in (learned, chance))
    assert max(values[20:]) > max(values[:10])
    assert np.mean(values[-20:]) > np.mean(drawn[-20:]) + 0.01


OWN = ["CMA-ES", "RSM"]
LAYERS = {f"layers.{n}": FloatDistribution(0.0, 2.0) for n in range(8)}
Score = Callable[[Mapping[str, float]], float]


def finished(
    n: int,
    score: Score,
    *,
    name: str = "RSM",
    ranges: Mapping[str, FloatDistribution] = LAYERS,
    first: Sequence[Mapping[str, float]] = (),
    seed: int = 1,
) -> optuna.Study:
    """A study as study.py runs it: a given point outside of the ranges is an attribute, NaN a failure."""
    sampler = SeededSampler(name=name, seed=seed, search_space=ranges, first=first)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for number in range(n):
        trial = study.ask()
        weights = dict(first[number]) if number < len(first) else {}
        if weights and not all(r.low <= weights[key] <= r.high for key, r in ranges.items()):
            trial.set_user_attr("weights", weights)
        else:
            weights = {key: trial.suggest_float(key, r.low, r.high, log=r.log) for key, r in ranges.items()}
        value = score(weights)
        if math.isnan(value):
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, value)
    return study


def noisy_bowl(best: Mapping[str, float], *, noise: float, seed: int = 0) -> Score:
    rng = np.random.default_rng(seed)

    def score(weights: Mapping[str, float]) -> float:
        away = sum((weights[key] - best[key]) ** 2 for key in best)
        return 0.7 - 0.3 * away / len(best) + noise * float(rng.standard_normal())

    return score


def slope(low: float, high: float) -> dict[str, float]:
    return {key: low + (high - low) * n / (len(LAYERS) - 1) for n, key in enumerate(LAYERS)}


def score_of_best_uniform(score: Score) -> float:
    return max(score(dict.fromkeys(LAYERS, weight)) for weight in np.linspace(0, 2, 201))


def found_by(study: optuna.Study, ranges: Mapping[str, FloatDistribution] = LAYERS) -> Recommendation:
    found = recommend(study.trials, ranges)
    assert found is not None
    return found


@pytest.mark.parametrize("name", OWN)
def test_another_process_draws_the_same(name: str) -> None:
    code = (
        "import json, optuna\nfrom optuna.distributions import FloatDistribution\n"
        "from tvmerge.samplers import SeededSampler\noptuna.logging.set_verbosity(40)\n"
        "ranges = {f'layers.{n}': FloatDistribution(0.0, 2.0) for n in range(8)}\n"
        f"sampler = SeededSampler(name={name!r}, seed=1, search_space=ranges, first=[])\n"
        "study = optuna.create_study(direction='maximize', sampler=sampler)\n"
        "for _ in range(24):\n    t = study.ask()\n"
        "    study.tell(t, sum(t.suggest_float(k, 0.0, 2.0) * (1 + i) for i, k in enumerate(ranges)))\n"
        "print(json.dumps([t.params for t in study.trials]))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = finished(24, lambda weights: sum(w * (1 + i) for i, w in enumerate(weights.values())), name=name)
    assert json.loads(other.stdout) == params(here)


@pytest.mark.parametrize("name", OWN)
def test_workers_that_draw_at_once_try_different_points(name: str) -> None:
    study = finished(20, noisy_bowl(slope(0.5, 1.5), noise=0.02), name=name)
    running = [study.ask() for _ in range(6)]
    drawn = [tuple(t.suggest_float(key, 0.0, 2.0) for key in LAYERS) for t in running]
    assert len(set(drawn)) == 6
    study.tell(running[3], 0.5)
    later = study.ask()
    assert tuple(later.suggest_float(key, 0.0, 2.0) for key in LAYERS) not in drawn


@pytest.mark.parametrize("name", OWN)
def test_the_start_is_one_weight_for_all(name: str) -> None:
    study = finished(9, noisy_bowl(slope(0.9, 0.9), noise=0.0), name=name)
    assert all(len(set(weights.values())) == 1 for weights in params(study)[:8])
    assert len(set(params(study)[8].values())) > 1
    # The fifth trial is the last of a grid; a quadratic through five points of a parabola is exact.
    assert params(study)[7]["layers.0"] == pytest.approx(0.9, abs=1e-6)


def test_the_optimum_of_a_quadratic_is_found_and_its_score_believed() -> None:
    best = slope(0.6, 1.3)
    held, truths = [], []
    for seed in range(12):
        study = finished(60, noisy_bowl(best, noise=0.02, seed=seed), seed=seed)
        found = found_by(study)
        assert found.interval is not None
        truth = noisy_bowl(best, noise=0.0)(found.point)
        truths.append(truth)
        held.append(found.interval[0] <= truth <= found.interval[1])
    assert min(truths) > score_of_best_uniform(noisy_bowl(best, noise=0.0))
    assert np.mean(truths) > 0.692
    assert sum(held) >= 10


def test_a_search_in_a_corner_goes_on_past_the_prior() -> None:
    best = slope(0.0, 2.0)
    found = found_by(finished(60, noisy_bowl(best, noise=0.005)))
    assert noisy_bowl(best, noise=0.0)(found.point) > 0.68, "of 0.7; uniform 0.57"


def test_a_cliff_makes_it_fall_back() -> None:
    bowl, noise = noisy_bowl(slope(1.1, 1.1), noise=0.0), np.random.default_rng(0)

    def score(weights: Mapping[str, float]) -> float:
        return bowl(weights) - 0.15 * (weights["layers.3"] > 0.6)

    study = finished(100, lambda weights: score(weights) + 0.01 * float(noise.standard_normal()))
    chosen = [found.by for n in range(16, 101) if (found := recommend(study.trials[:n], LAYERS)) is not None]
    assert chosen[0] == "surface"
    assert {"trust region", "CMA-ES"} <= set(chosen)
    assert set(chosen[chosen.index("CMA-ES") :]) == {"CMA-ES"}, "it changed its mind"
    assert score(found_by(study).point) > score_of_best_uniform(score) + 0.02


@pytest.mark.parametrize("name", OWN)
def test_failed_trials_are_no_scores_and_stop_nothing(name: str) -> None:
    bowl = noisy_bowl(slope(0.6, 1.3), noise=0.0)
    numbers = itertools.count()
    study = finished(50, lambda weights: math.nan if next(numbers) % 3 == 1 else bowl(weights), name=name)
    assert len(study.get_trials(states=[TrialState.FAIL])) == 17
    assert bowl(found_by(study).point) > 0.68
    nothing = finished(30, lambda _: math.nan, name=name)
    assert len({tuple(weights.values()) for weights in params(nothing)[8:]}) == 22
    assert recommend(nothing.trials, LAYERS) is None


@pytest.mark.parametrize("name", OWN)
def test_first_points_outside_of_the_ranges_are_learned_from(name: str) -> None:
    ranges = dict.fromkeys(LAYERS, FloatDistribution(0.2, 0.8))
    first = [dict.fromkeys(LAYERS, weight) for weight in (0.0, 1.0, 0.5)]
    study = finished(40, noisy_bowl(slope(0.5, 1.0), noise=0.0), name=name, ranges=ranges, first=first)
    assert all(0.2 <= weight <= 0.8 for weights in params(study)[2:] for weight in weights.values())
    found = found_by(study, ranges)
    assert all(0.2 <= weight <= 0.8 for weight in found.point.values())
    assert found.point["layers.7"] > found.point["layers.0"]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("best", [0.7, 3.0])
def test_one_weight_is_searched_too(name: str, best: float) -> None:
    ranges = {"uniform": FloatDistribution(0.0, 2.0)}
    study = finished(40, noisy_bowl({"uniform": best}, noise=0.01), name=name, ranges=ranges)
    assert found_by(study, ranges).point["uniform"] == pytest.approx(min(best, 2.0), abs=0.2)


@pytest.mark.parametrize("name", OWN)
def test_temperatures_are_searched_by_their_logarithm(name: str) -> None:
    gates = {f"gate/layers.{n}": FloatDistribution(0.25, 4.0, log=True) for n in range(4)}
    ranges = {**{f"expert{e}/layers.{n}": FloatDistribution(0.0, 2.0) for e in (1, 2) for n in range(4)}, **gates}
    first = [dict.fromkeys(ranges, weight) | dict.fromkeys(gates, 1.0) for weight in (0.0, 1.0, 0.5, 1.5)]

    def score(point: Mapping[str, float]) -> float:
        hot = sum((math.log(point[key]) - math.log(1.8)) ** 2 for key in gates)
        return 0.7 - 0.1 * sum((point[key] - 0.8) ** 2 for key in ranges if key not in gates) / 8 - 0.1 * hot

    study = finished(80, score, name=name, ranges=ranges, first=first)
    assert all(0.25 <= weights[key] <= 4.0 for weights in params(study) for key in gates)
    assert params(study)[5]["gate/layers.0"] == 1.0
    found = found_by(study, ranges)
    assert score(found.point) > score(dict.fromkeys(ranges, 0.8) | dict.fromkeys(gates, 1.0))
    assert sum(math.log(found.point[key]) for key in gates) / 4 == pytest.approx(math.log(1.8), abs=0.2)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("value", [0.5, 0.0, -1e30])
def test_scores_that_are_all_alike_are_no_problem(name: str, value: float) -> None:
    study = finished(40, lambda _: value, name=name)
    assert all(math.isfinite(weight) for weights in params(study) for weight in weights.values())
    assert math.isfinite(found_by(study).point["layers.0"])


@pytest.mark.parametrize("name", OWN)
def test_less_can_be_better(name: str) -> None:
    sampler = SeededSampler(name=name, seed=0, search_space=RANGES, first=[])
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for _ in range(40):
        trial = study.ask()
        study.tell(trial, 5 - objective({key: trial.suggest_float(key, 0.0, 2.0) for key in RANGES}))
    found = recommend(study.trials, RANGES, maximise=False)
    assert found is not None
    assert objective(dict(found.point)) > -0.5
    if found.interval is not None:
        assert found.score is not None
        assert found.interval[0] <= found.score <= found.interval[1]


def test_two_trials_tell_nothing_but_which_of_them_is_better() -> None:
    study = run("TPE", 0, 2)
    found = found_by(study, RANGES)
    assert (found.by, found.point, found.score) == ("best observed", study.best_params, None)


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.776), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_student_s_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student95(freedom) == pytest.approx(quantile, rel=0.02)


def test_a_known_noise_is_taken_as_it_is() -> None:
    study = finished(30, noisy_bowl(slope(0.6, 1.3), noise=0.02))
    sure, unsure = (recommend(study.trials, LAYERS, noise=noise) for noise in (0.005, 0.05))
    assert sure is not None
    assert unsure is not None
    assert sure.interval is not None
    assert unsure.interval is not None
    assert sure.interval[1] - sure.interval[0] < unsure.interval[1] - unsure.interval[0]
