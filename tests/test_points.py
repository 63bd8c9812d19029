"""Points of trials: one conformance suite over every sampler, and closed forms of the plain ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import qmc

from tvmerge.errors import ConfigError, RunError
from tvmerge.samplers import SAMPLERS, PointSampler, SeededSampler, check_sampler, pareto_front, recommend
from tvmerge.samplers.cma_es import evolved
from tvmerge.samplers.mirror import NSGAII
from tvmerge.samplers.observations import BOX, observe
from tvmerge.samplers.plain import MUTATION_RATE, POPULATION
from tvmerge.samplers.rsm import believe, cautious

Ranges = Mapping[str, FloatDistribution]
Score = Callable[[Mapping[str, float]], float]

FOREIGN = ["optuna.samplers:CmaEsSampler", "optuna.samplers:RandomSampler", "test_points:Nothing"]
NAMES = [*SAMPLERS, *FOREIGN]
#: What takes no seconds.
PLAIN = [name for name in NAMES if name != "GP"]
LAYERS = {f"layers.{n}": FloatDistribution(0.0, 2.0) for n in range(5)}


class Nothing(BaseSampler):
    """A sampler that takes no seed and draws one number after another."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        seed = 100 * trial.number + int(param_name.split(".")[1])
        return RandomSampler(seed=seed).sample_independent(study, trial, param_name, param_distribution)


class NotANumber(Nothing):
    """A sampler that has divided by zero."""

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return math.nan


def trial_of(
    number: int,
    point: Mapping[str, float] | None,
    values: Sequence[float] | None = None,
    *,
    state: TrialState = TrialState.COMPLETE,
    worker: str | None = None,
    **attrs: Any,
) -> FrozenTrial:
    """As study.py keeps it."""
    attrs |= {} if point is None else {"weights": dict(point)}
    attrs |= {} if worker is None else {"worker": worker}
    trial = create_trial(state=state, values=values, user_attrs=attrs)
    trial.number = number
    return trial


def bowl(point: Mapping[str, float]) -> float:
    """Best at weights from 0.6 up to 1.2, and at temperatures of 1.5."""
    best = np.linspace(0.6, 1.2, len(point))
    away = [
        math.log(value / 1.5) if name.startswith("gate") else value - top
        for (name, value), top in zip(point.items(), best, strict=True)
    ]
    return 0.7 - 0.3 * float(np.mean(np.square(away)))


def sampler_of(name: str, ranges: Ranges = LAYERS, *, seed: int = 1, **settings: Any) -> PointSampler:
    return PointSampler(name=name, seed=seed, ranges=ranges, n_first=settings.pop("n_first", 0), **settings)


def study_of(
    name: str, n: int, *, ranges: Ranges = LAYERS, score: Score = bowl, noise: float = 0.01, **settings: Any
) -> list[FrozenTrial]:
    sampler, rng = sampler_of(name, ranges, **settings), np.random.default_rng(5)
    trials: list[FrozenTrial] = []
    for number in range(n):
        point = sampler.point(trials, number)
        trials.append(trial_of(number, point, [score(point) + noise * float(rng.standard_normal())]))
    return trials


def length(name: str) -> int:
    return {"GP": 14, "NSGA-II": 64}.get(name, 36)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_point_is_a_function_of_the_trials(name: str, guided: bool) -> None:
    trials = study_of(name, length(name), guided=guided)
    number = len(trials)
    used = sampler_of(name, guided=guided)
    expected = used.point(trials, number)
    assert used.point(trials, number) == expected, "asked twice"
    assert used.point(trials[::-1], number) == expected, "in any order"
    earlier = used.point(trials[: number - 4], number - 4)
    assert earlier == trials[number - 4].user_attrs["weights"], "a sampler that knew more says the same"
    assert used.point(trials, number) == expected
    assert sampler_of(name, guided=guided).point(trials, number) == expected, "resumed"
    assert list(expected) == list(LAYERS)
    if name not in ("GP", "test_points:Nothing"):
        assert sampler_of(name, seed=2, guided=guided).point(trials, number) != expected


def test_another_process_finds_the_same_points() -> None:
    code = (
        "import json, test_points as t\nt.optuna.logging.set_verbosity(40)\n"
        "print(json.dumps({n: t.sampler_of(n).point(t.study_of(n, t.length(n)), t.length(n)) for n in t.PLAIN}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="tests")
    here = {name: sampler_of(name).point(study_of(name, length(name)), length(name)) for name in PLAIN}
    assert json.loads(other.stdout.splitlines()[-1]) == here


SPACES: Mapping[str, Ranges] = {
    "one": {"uniform": FloatDistribution(0.0, 2.0)},
    "excludes 0": {f"layers.{n}": FloatDistribution(0.5, 0.9) for n in range(4)},
    "wide": {f"layers.{n}": FloatDistribution(-5.0, 5.0) for n in range(6)},
    "mixture": {
        **{f"expert{e}/layers.{n}": FloatDistribution(0.0, 2.0) for e in (1, 2) for n in range(2)},
        **{f"gate/layers.{n}": FloatDistribution(0.25, 4.0, log=True) for n in range(2)},
    },
    "many": {f"layers.{n // 6}.kind{n % 6}": FloatDistribution(0.0, 2.0) for n in range(300)},
}


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", NAMES[:-1])
def test_points_are_inside_of_the_ranges(name: str, space: str, guided: bool) -> None:
    ranges = SPACES[space]
    n = {"GP": 12, "NSGA-II": 58}.get(name, 26)
    for score in (bowl, lambda _: 0.5):
        if space == "many" and score is not bowl:
            continue
        trials = study_of(name, n, ranges=ranges, score=score, noise=0.0, guided=guided)
        for trial in trials:
            point = trial.user_attrs["weights"]
            assert all(r.low <= point[key] <= r.high for key, r in ranges.items())
    found = recommend(trials, ranges)
    assert found is not None
    assert all(r.low <= found.point[key] <= r.high for key, r in ranges.items())


@pytest.mark.parametrize("name", NAMES)
def test_pruned_trials_tell_nothing(name: str) -> None:
    trials = study_of(name, length(name))
    n = len(trials)
    points = []
    for report in (-9.0, 9.0):
        pruned = trial_of(n, dict.fromkeys(LAYERS, 1.7), [report], state=TrialState.PRUNED)
        points.append(sampler_of(name).point([*trials, pruned], n + 1))
    assert points[0] == points[1]
    found, without = recommend([*trials, pruned], LAYERS), recommend(trials, LAYERS)
    assert found == without


@pytest.mark.parametrize("name", NAMES)
def test_what_others_try_and_what_failed_is_tolerated(name: str) -> None:
    trials = study_of(name, length(name))
    n = len(trials)
    others = [
        trial_of(n, dict.fromkeys(LAYERS, 0.9), state=TrialState.RUNNING, worker="b"),
        trial_of(n + 1, None, state=TrialState.RUNNING),
        trial_of(n + 2, None, state=TrialState.WAITING),
        trial_of(n + 3, dict.fromkeys(LAYERS, 0.7), state=TrialState.FAIL),
        trial_of(n + 4, dict.fromkeys(LAYERS, 0.9), state=TrialState.RUNNING),
    ]
    sampler = sampler_of(name)
    expected = sampler.point([*trials, *others], n + 4)
    assert all(math.isfinite(value) for value in expected.values())
    ended = trial_of(n, dict.fromkeys(LAYERS, 0.9), [0.6])
    later = sampler.point([*trials, ended, *others[1:]], n + 5)
    assert later == sampler_of(name).point([*trials, ended, *others[1:]], n + 5)
    assert sampler.point([*trials, *others], n + 4) == expected, "of its own trial it knows nothing"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("GP", "QMC", "test_points:Nothing")])
def test_workers_draw_from_streams_of_their_own(name: str) -> None:
    trials = study_of(name, length(name))
    drawn = [sampler_of(name).point(trials, len(trials), stream=stream) for stream in range(4)]
    assert len({tuple(point.values()) for point in drawn}) == 4
    assert sampler_of(name).point(trials, len(trials)) == drawn[0]


@pytest.mark.parametrize("name", ["TPE", "GP", "NSGA-II", "GA", "random", "QMC", "optuna.samplers:RandomSampler"])
def test_without_a_prior_a_box_around_the_best_uniform_weight_is_searched(name: str) -> None:
    points = [trial.user_attrs["weights"] for trial in study_of(name, length(name), noise=0.0)]
    seen = observe(study_of(name, 8, noise=0.0), LAYERS)
    assert seen.uniform_weight == pytest.approx(0.9, abs=1e-6), "the middle of 0.6 to 1.2"
    assert all(len(set(point.values())) == 1 for point in points[:8])
    drawn = np.array([list(point.values()) for point in points[8:]])
    assert np.abs(drawn - 0.9).max() <= BOX + 1e-9
    flat = [trial.user_attrs["weights"] for trial in study_of(name, length(name), noise=0.0, guided=False)]
    assert np.abs(np.array([list(point.values()) for point in flat]) - 0.9).max() > BOX


def test_a_low_discrepancy_sequence_is_sobol_s() -> None:
    trials = study_of("QMC", 16, guided=False)
    points = np.array([list(trial.user_attrs["weights"].values()) for trial in trials])
    assert np.allclose(points, 2 * qmc.Sobol(5, scramble=True, rng=1).random(16))


def test_a_child_has_the_weights_of_two_of_the_better_half() -> None:
    ranges = {f"layers.{n}": FloatDistribution(0.0, 2.0) for n in range(400)}
    trials = study_of("GA", 40, ranges=ranges)
    inside = [trial for trial in trials if all(0.9 - BOX < w < 0.9 + BOX for w in trial.user_attrs["weights"].values())]
    best = sorted(inside, key=lambda trial: -trial.values[0])[: POPULATION // 2]
    child = sampler_of("GA", ranges).point(trials, 40)
    # How many of the child's weights each trial has: those of two, but for mutations.
    shared = {t.number: sum(child[key] == t.user_attrs["weights"][key] for key in ranges) for t in trials}
    parents = sorted(shared, key=lambda number: -shared[number])[:2]
    assert set(parents) <= {trial.number for trial in best}
    assert all(shared[number] > 100 for number in parents)
    either = [trials[number].user_attrs["weights"] for number in parents]
    mutated = np.mean([child[key] not in (either[0][key], either[1][key]) for key in ranges])
    assert mutated == pytest.approx(MUTATION_RATE, abs=4 * math.sqrt(MUTATION_RATE / 400))


def test_nsga_ii_is_optuna_s() -> None:
    """Trials that Optuna drew by itself are continued as it would."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.NSGAIISampler(seed=3, population_size=8))
    ours = optuna.create_study(direction="maximize", sampler=NSGAII(seed=3, population_size=8))
    for each in (study, ours):
        each.optimize(lambda trial: -((trial.suggest_float("x", 0, 2) - 0.7) ** 2), n_trials=40)
    assert [trial.params for trial in ours.trials] == [trial.params for trial in study.trials]


def two_tasks(name: str, n: int) -> list[FrozenTrial]:
    """The first task likes low weights, the second high ones."""
    sampler = sampler_of(name, n_objectives=2)
    trials: list[FrozenTrial] = []
    for number in range(n):
        point = sampler.point(trials, number)
        low, high = (1 - float(np.mean([(w - best) ** 2 for w in point.values()])) for best in (0.7, 1.1))
        trials.append(trial_of(number, point, [low, high], score=0.5 * (low + high)))
    return trials


@pytest.mark.parametrize("name", NAMES)
def test_of_several_objectives_the_score_or_each_of_them_is_searched(name: str) -> None:
    trials = two_tasks(name, {"GP": 12}.get(name, 70))
    assert sampler_of(name, n_objectives=2).point(trials, len(trials)).keys() == LAYERS.keys()
    found = recommend(trials, LAYERS, n_objectives=2)
    assert found is not None
    assert np.mean(list(found.point.values())) == pytest.approx(0.9, abs=0.15)


def test_nsga_ii_spreads_over_the_front() -> None:
    fronts = {}
    for name in ("NSGA-II", "random"):
        trials = two_tasks(name, 300)
        fronts[name] = [trials[number].values for number in pareto_front(trials)]
    assert len(fronts["NSGA-II"]) > len(fronts["random"])
    assert all(sum(values) > 1.7 for values in fronts["NSGA-II"])


def test_the_front_is_what_nothing_is_better_than() -> None:
    values = [(1.0, 0.0), (0.5, 0.5), (0.5, 0.4), (0.0, 1.0), (0.5, 0.5), (0.9, 0.0)]
    trials = [trial_of(number, None, pair) for number, pair in enumerate(values)]
    trials.append(trial_of(6, None, state=TrialState.FAIL))
    assert pareto_front(trials) == [0, 1, 3, 4]
    assert pareto_front([]) == []
    study = optuna.create_study(directions=["maximize", "maximize"])
    study.add_trials(trials)
    assert sorted(trial.number for trial in study.best_trials) == [0, 1, 3, 4]


def test_generations_are_rounded_up_to_the_workers() -> None:
    ranges = {f"layers.{n}": FloatDistribution(0.0, 2.0) for n in range(12)}
    trials = study_of("CMA-ES", 60, ranges=ranges)
    alone = evolved(observe(trials, ranges))
    shared = [trial_of(t.number, t.user_attrs["weights"], t.values, worker=f"gpu{t.number % 4}") for t in trials]
    together = evolved(observe(shared, ranges))
    assert (alone.population_size, together.population_size) == (11, 12)
    assert (alone.generation, together.generation) == (52 // 11, 52 // 12)


def test_a_generation_is_of_trials_that_were_not_pruned() -> None:
    ranges = {f"layers.{n}": FloatDistribution(0.0, 2.0) for n in range(12)}
    trials = study_of("CMA-ES", 19, ranges=ranges)
    assert evolved(observe(trials, ranges)).generation == 1
    trials[12] = trial_of(12, trials[12].user_attrs["weights"], [0.1], state=TrialState.PRUNED)
    assert evolved(observe(trials, ranges)).generation == 0


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", ["CMA-ES", "sep-CMA-ES", "RSM", "GA", "TPE"])
def test_a_search_finds_what_is_better_than_one_weight(name: str, guided: bool) -> None:
    trials = study_of(name, 120, guided=guided)
    found = recommend(trials, LAYERS)
    assert found is not None
    best_uniform = max(bowl(dict.fromkeys(LAYERS, weight)) for weight in np.linspace(0, 2, 201))
    assert bowl(found.point) > best_uniform


@pytest.mark.parametrize("n", [8, 10, 15])
def test_few_trials_recommend_nothing_much_worse_than_one_weight(n: int) -> None:
    """With no more than noise to go by the best uniform point is kept to."""
    ranges = {f"layers.{k}": FloatDistribution(0.0, 2.0) for k in range(20)}
    rng = np.random.default_rng(0)
    worse = []
    for seed in range(12):
        best = dict(zip(ranges, rng.normal(0.9, 0.36, 20), strict=True))

        def score(point: Mapping[str, float], best: Mapping[str, float] = best) -> float:
            return 0.7 - 0.25 * float(np.mean([(point[key] - best[key]) ** 2 for key in ranges]))

        found = recommend(study_of("RSM", n, ranges=ranges, score=score, noise=0.03, seed=seed), ranges)
        assert found is not None
        uniform = max(score(dict.fromkeys(ranges, weight)) for weight in np.linspace(0, 2, 41))
        worse.append(uniform - score(found.point))
    assert np.mean(worse) < 0.006


def test_the_more_is_known_the_nearer_to_the_top_of_the_surface() -> None:
    trials = study_of("RSM", 200, noise=0.03)
    shares = []
    for n in (12, 30, 200):
        belief = believe(observe(trials[:n], LAYERS))
        assert belief is not None
        z, top = cautious(belief), belief.top
        shares.append(float(z @ top / (top @ top)))
        assert np.allclose(z, shares[-1] * top), "on the way to it"
    assert 0 <= shares[0] < shares[-1] <= 1
    assert shares[-1] > 0.7


def test_a_trial_that_has_changed_is_read_again() -> None:
    trials = study_of("GA", 40)
    sampler = sampler_of("GA")
    sampler.point(trials, 40)
    trials[30] = trial_of(30, dict.fromkeys(LAYERS, 0.91), [5.0])
    assert sampler.point(trials, 40) == sampler_of("GA").point(trials, 40)


@pytest.mark.parametrize("name", PLAIN[:-1])
def test_a_study_of_somebody_else_needs_no_ranges(name: str) -> None:
    study = optuna.create_study(direction="minimize", sampler=SeededSampler(name=name, seed=3))

    def objective(trial: optuna.Trial) -> float:
        kind = trial.suggest_categorical("kind", ["a", "b"])
        weights = [trial.suggest_float(f"layers.{n}", 0.0, 2.0) for n in range(3)]
        rate = trial.suggest_float("rate", 1e-3, 1e-1, log=True)
        return sum((w - 0.8) ** 2 for w in weights) + math.log10(rate / 0.01) ** 2 + 0.1 * (kind == "b")

    study.optimize(objective, n_trials=60)
    assert study.trials[0].params["layers.0"] == 1.0
    assert study.trials[0].params["rate"] == pytest.approx(1e-2)
    assert len({trial.params["kind"] for trial in study.trials}) == 2
    assert study.best_value < 0.35


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tpe", "unknown: choose TPE, CMA-ES, RSM, sep-CMA-ES, GP, NSGA-II, GA, random, QMC or module:Class"),
        ("no_such_module:Sampler", "cannot be imported: ModuleNotFoundError"),
        ("optuna.samplers:NoSuchSampler", "cannot be imported: AttributeError"),
        ("optuna.samplers:BaseSampler", "no class that implements"),
        ("math:sqrt", "no class that implements"),
        ("optuna.samplers:GridSampler", "needs search_space"),
        (":", "unknown"),
    ],
)
def test_what_is_no_sampler_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        check_sampler(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_a_sampler_is_not(name: str) -> None:
    check_sampler(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [("optuna.samplers:BruteForceSampler", "step must be given"), ("test_points:NotANumber", "nan` is invalid")],
)
def test_a_sampler_of_somebody_else_that_fails_says_so_in_one_line(name: str, says: str) -> None:
    sampler = PointSampler(name=name, seed=1, ranges=LAYERS, n_first=2, guided=False)
    trials = [trial_of(n, dict.fromkeys(LAYERS, float(n)), [0.5]) for n in range(6)]
    with pytest.raises(RunError, match=f"--optuna_sampler {name} gave no point for trial 6: .*{says}") as failed:
        sampler.point(trials, 6)
    assert "\n" not in str(failed.value)
