"""What a search finds on synthetic landscapes, by sampler and number of trials.

    python perf/search.py                                                   # seconds
    python perf/search.py --landscapes A B C D --samplers RSM --seeds 20 --trials 15 30 60 100 300

Figures are the true score of what a sampler recommends, means over seeds with their standard errors. A landscape is a
hidden best point, from which the probability to answer a question falls off; a trial sees the answers to a hundred
questions, the truth is the mean probability over fifteen hundred others.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cmaes
import numpy as np
import numpy.typing as npt
import optuna
from merge import processor, row
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, TPESampler
from optuna.trial import FrozenTrial, create_trial

from tvmerge.samplers import SAMPLERS, PointSampler, recommend
from tvmerge.search import BASELINES, uniform_weights

__all__ = ["LANDSCAPES", "SEARCHES", "Found", "Landscape", "Search", "Searched", "Shape", "search"]

Floats = npt.NDArray[np.float64]
TRUE_QUESTIONS = 1500


@dataclass(frozen=True)
class Shape:
    """What a landscape is drawn from."""

    layers: int = 35
    kinds: int = 1  # weights of a layer
    form: str = "bowl"  # bowl, peaks, threshold or pairs
    ability: float = 1.2  # logit at the best point, for a question of difficulty 0
    steepness: float = 1.5
    smooth: float = 0.3  # standard deviation of the best weights over depth, smooth part
    rough: float = 0.2  # and each weight's own
    questions: int = 100  # of a trial
    repeat: float = 0.5  # share of a trial's luck that comes again in every trial
    taste: float = 0.35  # how differently questions like the weights


LANDSCAPES: Mapping[str, Shape] = {
    "A": Shape(),
    "B": Shape(steepness=1.0, smooth=0.2, rough=0.1),  # little to gain over a uniform weight
    "C": Shape(smooth=0.0, rough=0.36),  # no smoothness over depth
    "D": Shape(layers=36, kinds=8, rough=0.15),
    "peaks": Shape(form="peaks"),  # a second peak, lower and elsewhere
    "threshold": Shape(form="threshold"),  # a layer that breaks the model a little above its best weight
    "pairs": Shape(form="pairs"),  # neighbouring layers gain only if both are near their best
}


class Searched(Protocol):
    """What a search is measured on."""

    names: Sequence[str]  # of the weights, as granularity.py calls them

    def trial(self, w: Floats) -> float:
        """The score of one trial at weights `(d,)`."""

    def truth(self, w: Floats) -> float:
        """The true score there."""

    def best_uniform(self) -> float:
        """The true score of the truly best uniform weight."""


class Landscape:
    """A hidden best point and questions around it.

    P(question q is answered) = sigmoid(ability - loss(w - w*) - b_q - h_q·(w - w*)), where loss is a quadratic form of
    log-normal importances of the weights, correlated between neighbouring layers, or another form.
    """

    def __init__(self, shape: Shape, *, seed: int) -> None:
        self.shape = shape
        self.names: Sequence[str] = weight_names(shape)
        rng = np.random.default_rng([20, seed])
        self.d = shape.layers * shape.kinds
        self.best = self._profile(rng)
        root = np.exp(0.6 * rng.standard_normal(self.d))
        root /= np.sqrt((root**2).sum())
        layer = np.repeat(np.arange(shape.layers), shape.kinds)
        together = 0.4 ** np.abs(layer[:, None] - layer)
        if shape.kinds > 1:
            together = together * (0.3 + 0.7 * np.eye(self.d))
        form = root[:, None] * root * together
        self.form, self.importance = form * 2 / form.sum(), root**2
        self.difficulty, self.taste = self._questions(rng, shape.questions, root)
        self.true_difficulty, self.true_taste = self._questions(rng, TRUE_QUESTIONS, root)
        self.luck = rng.standard_normal(shape.questions)
        self.other_peak, self.broken = self._profile(rng), int(rng.integers(shape.layers))
        self._rng = np.random.default_rng([21, seed])

    def _profile(self, rng: np.random.Generator) -> Floats:
        """Best weights `(d,)`: around one centre, smooth over depth, and each with its own deviation."""
        shape = self.shape
        depth = np.linspace(0, 1, shape.layers)
        kernel = np.exp(-0.5 * ((depth[:, None] - depth) / 0.2) ** 2) + 1e-8 * np.eye(shape.layers)
        profile = np.linalg.cholesky(kernel) @ rng.standard_normal(shape.layers)
        profile = (profile - profile.mean()) / profile.std() * shape.smooth
        best = (rng.uniform(0.5, 1.2) + profile)[:, None] + shape.rough * rng.standard_normal(
            (shape.layers, shape.kinds)
        )
        if shape.kinds > 1:
            best += 0.15 * rng.standard_normal(shape.kinds)
        clipped: Floats = np.clip(best.ravel(), 0, 2)
        return clipped

    def _questions(self, rng: np.random.Generator, n: int, root: Floats) -> tuple[Floats, Floats]:
        scale = self.shape.taste * math.sqrt(35) * root
        return 1.5 * rng.standard_normal(n), scale * rng.standard_normal((n, self.d))

    def _loss(self, w: Floats) -> float:
        away, shape = w - self.best, self.shape
        bowl = shape.steepness * float(away @ self.form @ away)
        if shape.form == "peaks":
            other = w - self.other_peak
            return min(bowl, shape.steepness * float(other @ self.form @ other) + 0.2)
        if shape.form == "threshold":
            return bowl + 2.0 * float(away[self.broken] > 0.15)
        if shape.form == "pairs":
            of_pair = np.add.reduceat(away**2, np.arange(0, self.d, 2))
            share = np.add.reduceat(self.importance, np.arange(0, self.d, 2))
            return 1.5 * float(share @ (1 - np.exp(-of_pair / (2 * 0.4**2))))
        return bowl

    def _probabilities(self, w: Floats, difficulty: Floats, taste: Floats) -> Floats:
        logits = self.shape.ability - self._loss(w) - difficulty - taste @ (w - self.best)
        chances: Floats = 1 / (1 + np.exp(-logits))
        return chances

    def trial(self, w: Floats) -> float:
        """The share of right answers of one trial."""
        return float(self.answers(w).mean())

    def answers(self, w: Floats) -> npt.NDArray[np.bool_]:
        """Which questions of one trial are answered right."""
        repeat = self.shape.repeat
        luck = math.sqrt(repeat) * self.luck + math.sqrt(1 - repeat) * self._rng.standard_normal(self.shape.questions)
        threshold = np.array([0.5 * (1 + math.erf(each / math.sqrt(2))) for each in luck])
        right: npt.NDArray[np.bool_] = threshold < self._probabilities(w, self.difficulty, self.taste)
        return right

    def truth(self, w: Floats) -> float:
        """The true share of right answers."""
        return float(self._probabilities(w, self.true_difficulty, self.true_taste).mean())

    def best_uniform(self) -> float:
        """The true score of the best uniform weight of a fine grid."""
        return max(self.truth(np.full(self.d, weight)) for weight in np.linspace(0, 2, 41))


@dataclass(frozen=True)
class Search:
    """One way to choose the weights of trials, and what it recommends."""

    sampler: str  # a key of SAMPLERS
    guided: bool = True
    plain: Callable[[int], BaseSampler] | None = None  # Optuna's own over the whole range, from the first trial on


SEARCHES: Mapping[str, Search] = {
    **{name: Search(name) for name in SAMPLERS},
    **{f"flat {name}": Search(name, guided=False) for name in SAMPLERS},
    "plain TPE": Search("", plain=lambda seed: TPESampler(seed=seed)),
    "plain CMA-ES": Search("", plain=lambda seed: CmaEsSampler(seed=seed, warn_independent_sampling=False)),
}


@dataclass(frozen=True)
class Found:
    """True scores after a number of trials."""

    recommended: float
    observed: float  # of the best observed trial
    uniform: float  # of the truly best uniform weight
    claimed: float  # what the best observed trial scored
    seconds: float  # of a trial of the search, but for its score


def weight_names(shape: Shape) -> list[str]:
    """As granularity.py calls them."""
    inner = [f".kind{n}" for n in range(shape.kinds)] if shape.kinds > 1 else [""]
    return [f"layers.{layer}{kind}" for layer in range(shape.layers) for kind in inner]


def scored(number: int, weights: Mapping[str, float], score: float) -> FrozenTrial:
    """A finished trial, as study.py keeps it."""
    trial = create_trial(value=score, user_attrs={"weights": dict(weights)})
    trial.number = number
    return trial


Chooser = Callable[[Sequence[FrozenTrial]], "dict[str, float]"]


def chooser(way: Search, ranges: Mapping[str, FloatDistribution], *, seed: int) -> tuple[Chooser, int]:
    """What chooses the weights of the next trial, and how many trials are given."""
    if way.plain is not None:
        study = optuna.create_study(direction="maximize", sampler=way.plain(seed))

        def ask(trials: Sequence[FrozenTrial]) -> dict[str, float]:
            if trials:
                study.tell(len(trials) - 1, trials[-1].value)
            trial = study.ask()
            return {name: trial.suggest_float(name, r.low, r.high) for name, r in ranges.items()}

        return ask, 0
    first = [dict.fromkeys(ranges, weight) for weight in uniform_weights(weight_min=0.0, weight_max=2.0)]
    first = first if way.guided else first[: len(BASELINES)]
    sampler = PointSampler(name=way.sampler, seed=seed, ranges=ranges, n_first=len(first), guided=way.guided)
    return lambda trials: first[len(trials)] if len(trials) < len(first) else sampler.point(trials, len(trials)), len(
        first
    )


def search(landscape: Searched, way: Search, *, seed: int, marks: Sequence[int]) -> list[Found]:
    """Run a study and say what it would recommend at each of `marks`."""
    ranges = dict.fromkeys(landscape.names, FloatDistribution(0.0, 2.0))
    choose, n_first = chooser(way, ranges, seed=seed)
    best_uniform = landscape.best_uniform()
    found, spent = [], 0.0
    trials: list[FrozenTrial] = []
    for number in range(max(marks)):
        started = time.perf_counter()
        weights = choose(trials)
        spent += time.perf_counter() - started
        trials.append(scored(number, weights, landscape.trial(_array(weights))))
        if number + 1 not in marks:
            continue
        claimed = max(trials, key=lambda trial: trial.value or 0.0)
        point: Mapping[str, float] = claimed.user_attrs["weights"]
        if way.plain is None:
            best = recommend(trials, ranges, n_first=n_first)
            assert best is not None, "trials were scored"
            point = best.point
        recommended, observed = (landscape.truth(_array(each)) for each in (point, claimed.user_attrs["weights"]))
        found.append(Found(recommended, observed, best_uniform, claimed.value or 0.0, spent / (number + 1)))
    return found


def _array(point: Mapping[str, float]) -> Floats:
    return np.array(list(point.values()))


def compare(
    landscape: str, samplers: Sequence[str], *, seeds: int, marks: Sequence[int]
) -> dict[str, list[list[Found]]]:
    """Sampler → for each mark what was found with each seed."""
    found = {}
    for name in samplers:
        runs = [
            search(Landscape(LANDSCAPES[landscape], seed=seed), SEARCHES[name], seed=seed, marks=marks)
            for seed in range(seeds)
        ]
        found[name] = [list(at_mark) for at_mark in zip(*runs, strict=True)]
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN of one value."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def draw_times(name: str, n_weights: int, n_trials: int, *, rounds: int) -> float:
    """Median milliseconds of a draw after that many finished trials of random scores, the first draw left out.

    All trials are near the best uniform weight, so that every sampler counts them.
    """
    kinds = 9 if n_weights > 100 else 1
    names = [f"layers.{n // kinds}.kind{n % kinds}" for n in range(n_weights)]
    ranges = dict.fromkeys(names, FloatDistribution(0.0, 2.0))
    rng = np.random.default_rng(0)
    sampler = PointSampler(name=name, seed=0, ranges=ranges, n_first=0)
    trials: list[FrozenTrial] = []
    times = []
    for number in range(n_trials + rounds + 1):
        weights = dict(zip(names, rng.normal(1, 0.05, n_weights).tolist(), strict=True))
        if number < 8:
            weights = sampler.point(trials, number)
            trials.append(scored(number, weights, 0.6 - 0.1 * (weights[names[0]] - 1) ** 2))
            continue
        elif number >= n_trials:
            started = time.perf_counter()
            weights = sampler.point(trials, number)
            times.append(time.perf_counter() - started)
        trials.append(scored(number, weights, float(rng.normal(0.6, 0.03))))
    return 1000 * float(np.median(times[1:]))


def print_landscape(name: str, found: Mapping[str, list[list[Found]]], *, marks: Sequence[int]) -> None:
    """The table of a landscape."""
    any_run = next(iter(found.values()))[0]
    uniform, _ = mean_and_error([each.uniform for each in any_run])
    print(f"\n{name}: the truly best uniform weight scores {uniform:.3f}\n")
    row("recommended, true score", *(f"{mark} trials" for mark in marks), "best observed claims", "ms a draw")
    row("---", *("---:" for _ in marks), "---:", "---:")
    for sampler, at_marks in found.items():
        cells = (mean_and_error([each.recommended for each in runs]) for runs in at_marks)
        last = at_marks[-1]
        row(
            sampler,
            *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells),
            f"{np.mean([each.claimed for each in last]):.3f}",
            f"{1000 * np.median([each.seconds for each in last]):.1f}",
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landscapes", nargs="+", choices=LANDSCAPES, default=["A", "threshold"])
    parser.add_argument("--samplers", nargs="+", choices=SEARCHES, default=["RSM", "CMA-ES", "plain CMA-ES"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, nargs="+", default=[15, 30, 100])
    parser.add_argument("--draws", type=int, default=0, help="time so many draws at 35, 291 and 1,164 weights too")
    parser.add_argument("--draws_of", nargs="+", choices=SAMPLERS, default=["RSM", "CMA-ES"])
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    marks = sorted(set(options.trials))
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    print(f"optuna {optuna.__version__}, cmaes {cmaes.__version__}, {options.seeds} seeds, 100 questions a trial")
    for name in options.landscapes:
        print_landscape(name, compare(name, options.samplers, seeds=options.seeds, marks=marks), marks=marks)
    if options.draws:
        print()
        row("ms a draw, median", "after 100 trials", "after 1,000")
        row("---", "---:", "---:")
        for sampler in options.draws_of:
            for n_weights in (35, 291, 1164):
                few, many = (draw_times(sampler, n_weights, n, rounds=options.draws) for n in (100, 1000))
                row(f"{sampler}, {n_weights} weights", f"{few:.0f}", f"{many:.0f}")


if __name__ == "__main__":
    main()
