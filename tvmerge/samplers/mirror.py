"""Optuna's own samplers, over trials in memory: they read no storage and leave nothing in one.

What they get are numbers on the modelled scale, in the box that is searched. Samplers that are functions of the trials
are made anew for each draw. Of any others the whole study is gone through again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.storages import InMemoryStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from tvmerge.samplers.observations import Observations

__all__ = ["NSGAII", "Mirrored", "Replayed"]

Floats = npt.NDArray[np.float64]
#: Number of a trial, its point, its values: None if it runs, empty if it has ended without a score.
Entry = tuple[int, "Floats | None", "tuple[float, ...] | None"]
NAME = "mirror"
#: Samplers look at the states of trials and not at their times.
NO_TIME = datetime(2000, 1, 1)


class _Storage(InMemoryStorage):
    """Trials as they are given; what a sampler writes is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[FrozenTrial] = []

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return [t for t in self.given if states is None or t.state in states]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        pass

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        pass


class NSGAII(NSGAIISampler):
    """Optuna's, with generations counted by the scored trials: so many make one, whoever ran them.

    Source: Deb et al. 2002, A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II.
    """

    def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
        """The first that is not full."""
        return len(self._scored(study)) // self._size

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The trials of a generation."""
        return self._scored(study)[generation * self._size :][: self._size]

    @property
    def _size(self) -> int:
        assert self.population_size is not None, "NSGA-II has one"
        return self.population_size

    @staticmethod
    def _scored(study: Study) -> list[FrozenTrial]:
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


class Mirrored:
    """The draws of a sampler of Optuna that is a function of the trials.

    Args:
        make: seed → the sampler of one draw.
        several: whether it is told the values of several objectives, or their one score.
    """

    def __init__(self, make: Callable[[int], BaseSampler], *, several: bool = False) -> None:
        self._make = make
        self._several = several
        self._storages: dict[int, _Storage] = {}
        self._frozen: dict[int, tuple[bytes, FrozenTrial]] = {}

    def __call__(self, seen: Observations, *, number: int, seed: int, generator: np.random.Generator) -> Floats:
        """A point `(d,)` in the box.

        Args:
            seen: the scored trials.
            number: of the trial.
            seed: of the sampler.
            generator: for what the sampler leaves to chance.
        """
        entries = told(seen, several=self._several)
        distributions = _distributions(seen)
        n_objectives = seen.values.shape[1] if self._several and seen.values is not None else 1
        storage = self._storages.get(n_objectives)
        if storage is None:
            storage = self._storages[n_objectives] = _Storage()
            storage.create_new_study([StudyDirection.MAXIMIZE] * n_objectives, NAME)
        storage.given = [self._trial(entry, distributions) for entry in entries]
        own = _frozen(number, TrialState.RUNNING, {}, {}, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            study = Study(NAME, storage)
            drawn = self._make(seed).sample_relative(study, own, dict(distributions))
        # In one go, in the order of the ranges: not one parameter after another, as a trial asks for them.
        free = generator.uniform(seen.box.low, seen.box.high)
        x = np.array([drawn.get(name, chance) for name, chance in zip(seen.space.names, free.tolist(), strict=True)])
        inside: Floats = np.clip(x, seen.box.low, seen.box.high)
        return inside

    def _trial(self, entry: Entry, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
        number, x, values = entry
        assert x is not None, "trials without a point are left out"
        key = x.tobytes() + repr(values).encode()
        known = self._frozen.get(number)
        if known is None or known[0] != key:
            params = dict(zip(distributions, x.tolist(), strict=True))
            state = TrialState.RUNNING if values is None else TrialState.COMPLETE
            known = key, _frozen(number, state, params, distributions, values)
            self._frozen[number] = known
        return known[1]


class Replayed:
    """The draws of any sampler of Optuna's interface, which may keep what it knows in itself or with its trials.

    A study goes on in memory as long as it is called with one more trial each time, and is gone through from its
    beginning if not: when it is resumed, and when workers draw between its draws. Of several objectives it is told the
    score, as many samplers refuse more.

    Args:
        make: seed → the sampler of a whole study.
        seed: of the study.
    """

    def __init__(self, make: Callable[[int], BaseSampler], *, seed: int) -> None:
        self._make = make
        self._seed = seed
        self._study: Study | None = None
        self._done: list[tuple[Any, ...]] = []
        self._open: tuple[int, Trial] | None = None
        self._ranges: tuple[Any, ...] = ()

    def __call__(self, seen: Observations, *, number: int, stream: int) -> Floats:
        """A point `(d,)` in the box.

        Args:
            seen: the scored trials.
            number: of the trial.
            stream: of the worker.
        """
        entries = told(seen, several=False, with_ended=True)
        keys = [(n, None if x is None else x.tobytes(), values) for n, x, values in entries]
        ranges = (seen.box.low.tobytes(), seen.box.high.tobytes(), stream)
        n_done = len(self._done)
        goes_on = self._study is not None and ranges == self._ranges and keys[:n_done] == self._done
        following = keys[n_done][0] if len(keys) > n_done else number
        if not goes_on or (self._open is not None and self._open[0] != following):
            self._begin(seen, ranges, stream)
        distributions = _distributions(seen)
        for entry in entries[len(self._done) :]:
            self._tell(entry, distributions)
        self._done = keys
        trial = self._ask(number, distributions)
        x = np.array([trial.params[name] for name in distributions])
        inside: Floats = np.clip(x, seen.box.low, seen.box.high)
        return inside

    def _begin(self, seen: Observations, ranges: tuple[Any, ...], stream: int) -> None:
        storage = InMemoryStorage()
        storage.create_new_study([StudyDirection.MAXIMIZE], NAME)
        own = np.random.SeedSequence([self._seed, stream] if stream else [self._seed]).generate_state(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study = Study(NAME, storage, sampler=self._make(int(own[0])))
        self._done, self._open, self._ranges = [], None, ranges

    def _ask(self, number: int, distributions: dict[str, BaseDistribution]) -> Trial:
        assert self._study is not None, "it has begun"
        if self._open is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial = self._study.ask()
                for name, r in distributions.items():
                    assert isinstance(r, FloatDistribution), "all are numbers"
                    trial.suggest_float(name, r.low, r.high)
            self._open = number, trial
        return self._open[1]

    def _tell(self, entry: Entry, distributions: dict[str, BaseDistribution]) -> None:
        number, x, values = entry
        trial, self._open = self._ask(number, distributions), None
        assert self._study is not None, "it has begun"
        if x is not None:
            for (name, r), value in zip(distributions.items(), x.tolist(), strict=True):
                self._study._storage.set_trial_param(trial._trial_id, name, value, r)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if values:
                self._study.tell(trial, list(values))
            elif values is not None:
                self._study.tell(trial, state=TrialState.FAIL)


def told(seen: Observations, *, several: bool, with_ended: bool = False) -> list[Entry]:
    """What there is to tell, by number: of scored and running trials those in the box.

    Args:
        seen: the scored trials.
        several: whether values are those of several objectives.
        with_ended: whether failed and pruned trials after the start are told of.
    """
    values = seen.scores[:, None] if seen.values is None or not several else seen.values
    # A point on the box's edge may be a rounding outside of it.
    inside = np.clip(seen.x, seen.box.low, seen.box.high)
    entries: dict[int, Entry] = {
        int(n): (int(n), x, tuple(v.tolist()))
        for n, x, v, is_in in zip(seen.numbers, inside, values, seen.in_box, strict=True)
        if is_in
    }
    for number, x in seen.running.items():
        if ((x > seen.box.low - 1e-9) & (x < seen.box.high + 1e-9)).all():
            entries[number] = number, np.clip(x, seen.box.low, seen.box.high), None
    if with_ended:
        scored = set(seen.numbers.tolist())
        for number in seen.ended - scored:
            if number >= seen.n_start:
                entries[number] = number, None, ()
    return [entries[number] for number in sorted(entries)]


def _distributions(seen: Observations) -> dict[str, BaseDistribution]:
    """The box, as Optuna's ranges."""
    ends = zip(seen.space.names, seen.box.low.tolist(), seen.box.high.tolist(), strict=True)
    return {name: FloatDistribution(low, high) for name, low, high in ends}


def _frozen(
    number: int,
    state: TrialState,
    params: dict[str, Any],
    distributions: dict[str, BaseDistribution],
    values: Sequence[float] | None,
) -> FrozenTrial:
    return FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=None,
        values=values,
        datetime_start=NO_TIME,
        datetime_complete=None if state == TrialState.RUNNING else NO_TIME,
        params=params,
        distributions=distributions,
        user_attrs={},
        system_attrs={},
        intermediate_values={},
    )
