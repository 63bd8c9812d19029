"""The points of trials, by the name of a sampler."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from optuna import samplers as optuna_samplers
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from tvmerge.errors import ConfigError, RunError
from tvmerge.samplers import cma_es, plain, rsm
from tvmerge.samplers.mirror import NSGAII, Mirrored, Replayed
from tvmerge.samplers.observations import Observations, Remembered, observe, start_point

__all__ = ["SAMPLERS", "PointSampler", "check_sampler"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Draw:
    """What a trial's point is drawn from."""

    seen: Observations
    number: int  # of the trial
    study_seed: int
    stream: int  # of the worker
    sampler_seed: int  # of this draw
    uniform_seed: int  # of what a sampler leaves to chance

    @property
    def generator(self) -> np.random.Generator:
        """That of the sampler."""
        return np.random.default_rng(self.sampler_seed)

    @property
    def chance(self) -> np.random.Generator:
        """What points come from that no model has a say in."""
        return np.random.default_rng(self.uniform_seed)


_Drawn = Callable[[Draw], Floats]


def _of_optuna(make: Callable[[int], BaseSampler], *, several: bool = False) -> _Drawn:
    mirrored = Mirrored(make, several=several)
    return lambda d: mirrored(d.seen, number=d.number, seed=d.sampler_seed, generator=d.chance)


#: Name → what makes a draw; made once for a study.
SAMPLERS: Mapping[str, Callable[[], _Drawn]] = {
    "TPE": lambda: _of_optuna(lambda seed: optuna_samplers.TPESampler(seed=seed)),
    "CMA-ES": lambda: lambda d: cma_es.propose(d.seen, d.generator),
    "RSM": lambda: lambda d: rsm.propose(d.seen, d.generator),
    "sep-CMA-ES": lambda: lambda d: cma_es.propose(d.seen, d.generator, separable=True),
    "GP": lambda: _of_optuna(lambda seed: optuna_samplers.GPSampler(seed=seed)),
    "NSGA-II": lambda: _of_optuna(lambda seed: NSGAII(seed=seed), several=True),
    "GA": lambda: lambda d: plain.genetic(d.seen, d.generator, number=d.number),
    "random": lambda: lambda d: plain.uniform(d.seen.box, d.chance),
    # One sequence for all workers, of which each trial is a point.
    "QMC": lambda: lambda d: plain.low_discrepancy(d.seen.box, seed=d.study_seed, index=d.number),
}


def check_sampler(name: str) -> None:
    """Refuse a name that is no sampler.

    Args:
        name: a key of SAMPLERS, or `module:Class` of Optuna's interface.

    Raises:
        ConfigError: with the known names, or with why it cannot be imported.
    """
    if name not in SAMPLERS:
        _imported(name)


def _imported(name: str) -> Callable[[int], BaseSampler]:
    """Seed → a sampler of somebody's own class."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"--optuna_sampler {name} is unknown: choose {', '.join(SAMPLERS)} or module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module raises that is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"--optuna_sampler {name} cannot be imported: {reason}") from error
    if not (isinstance(found, type) and issubclass(found, BaseSampler)) or inspect.isabstract(found):
        raise ConfigError(f"--optuna_sampler {name} is no class that implements optuna.samplers.BaseSampler")
    make: Callable[..., BaseSampler] = found
    parameters = inspect.signature(make).parameters
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in rest and p.name != "seed"]
    if needed:
        raise ConfigError(f"--optuna_sampler {name} needs {', '.join(needed)}: name a class that needs a seed at most")
    return lambda seed: make(seed=seed) if "seed" in parameters else make()


def _replayed(name: str, seed: int) -> _Drawn:
    replayed = Replayed(_imported(name), seed=seed)

    def draw(given: Draw) -> Floats:
        try:
            return replayed(given.seen, number=given.number, stream=given.stream)
        except Exception as error:  # whatever a class of somebody's own raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(f"--optuna_sampler {name} gave no point for trial {given.number}: {reason}") from error

    return draw


class PointSampler:
    """Points of trials after the given ones; a pure function of the trials, the seed and the trial's number.

    What it keeps between draws is what it would make of the same trials again.

    Args:
        name: a key of SAMPLERS, or `module:Class`.
        seed: of the whole study.
        ranges: name → range, in a stable order.
        n_first: how many trials the study gives the points of.
        guided: one weight for all first, and then a search around the best of them; if not, over the whole range.
        n_objectives: how many values a trial has; of several, each also has the attribute `score`.
        maximise: whether higher values are better.

    Raises:
        ConfigError: there is no such sampler.
    """

    def __init__(
        self,
        *,
        name: str,
        seed: int,
        ranges: Mapping[str, FloatDistribution],
        n_first: int,
        guided: bool = True,
        n_objectives: int = 1,
        maximise: bool = True,
    ) -> None:
        self._draw = SAMPLERS[name]() if name in SAMPLERS else _replayed(name, seed)
        self._seed = seed
        self._ranges = dict(ranges)
        self._n_first = n_first
        self._guided = guided
        self._n_objectives = n_objectives
        self._maximise = maximise
        self._remembered: Remembered = {}

    def point(self, trials: Sequence[FrozenTrial], number: int, *, stream: int = 0) -> dict[str, float]:
        """The point of a trial.

        Args:
            trials: all of the study, in any state and order. Those that run are what other workers try.
            number: of the trial.
            stream: of the worker that runs it; 0 is the main process.

        Returns:
            Name → value inside of its range, in the order of the ranges.
        """
        seen = observe(
            [t for t in trials if t.number != number],
            self._ranges,
            n_first=self._n_first,
            n_objectives=self._n_objectives,
            maximise=self._maximise,
            guided=self._guided,
            remembered=self._remembered,
        )
        x = start_point(seen, number) if self._guided else None
        if x is None:
            entropy = [self._seed, number, stream] if stream else [self._seed, number]
            seeds = np.random.SeedSequence(entropy).generate_state(2)
            x = self._draw(Draw(seen, number, self._seed, stream, int(seeds[0]), int(seeds[1])))
        return seen.space.point(x, self._ranges)
