"""Which trial a worker runs next, and how trials are written down: whole, once, and under one number for ever.

A trial is created with its weights in one transaction. A worker that takes a trial that waits, or ends one, does so in
one too, so that of several that try one does.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from tvmerge.evaluators import Goals, QuestionScore, task_scores, task_shares
from tvmerge.heartbeat import hand_back
from tvmerge.samplers import PointSampler
from tvmerge.score_log import packed

__all__ = ["MAIN", "Claim", "StudyPlan", "TrialQueue"]

#: What the process is called that began the study.
MAIN = "main"
#: Begins the attributes of a study that name its workers.
JOINED = "worker "
#: More weights than these are no parameters of Optuna's: a dashboard takes ten seconds for them, a storage one and a
#: half milliseconds for each. They are in the trial's attribute `weights`, as they always are.
MAX_PARAMETERS = 64


@dataclass(frozen=True)
class Claim:
    """A trial that this process is to run."""

    id: int  # in the storage
    number: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class StudyPlan:
    """What a study searches, and how.

    Attributes:
        identity: what makes it the same study: every setting that a score depends on, as plain JSON values.
        ranges: name of each number that is searched, in a stable order → where it is searched.
        sampler: as samplers/ knows it.
        seed: of the sampler.
        first: the points of the first trials, perhaps outside of the ranges.
        goals: how the scores of tasks make the score of a trial.
        guided: whether the sampler starts at the best of the first points.
        objectives: tasks that are objectives of their own; empty: the score is the only one.
    """

    identity: Mapping[str, Any]
    ranges: Mapping[str, FloatDistribution]
    sampler: str
    seed: int
    first: Sequence[Mapping[str, float]]
    goals: Goals = field(default_factory=dict)
    guided: bool = True
    objectives: Sequence[str] = ()


class TrialQueue:
    """The trials of a study, as one of its workers sees them.

    Args:
        study: in a storage.
        storage: the same that the study is in.
        plan: what it searches.
        worker: what this process is called; MAIN if it began the study.
    """

    def __init__(self, study: optuna.Study, storage: RDBStorage, plan: StudyPlan, *, worker: str) -> None:
        self._study = study
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._plan = plan
        self._worker = worker
        self._stream = 0 if worker == MAIN else zlib.crc32(worker.encode())
        self._claim: Claim | None = None
        self._sampler = PointSampler(
            name=plan.sampler,
            seed=plan.seed,
            ranges=plan.ranges,
            n_first=len(plan.first),
            guided=plan.guided,
            n_objectives=max(len(plan.objectives), 1),
        )

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials of some states, or all, by number."""
        return self._study.get_trials(deepcopy=False, states=states or None)

    def begin(self) -> None:
        """Write down the first trials, as far as they are not."""
        for point in self._plan.first[len(self.trials()) :]:
            self._study.add_trial(self._template(point, TrialState.WAITING))

    def claim(self, n_trials: int) -> Claim | None:
        """A trial to run: one that this process left unfinished, else one that was handed back, else a new one.

        Args:
            n_trials: how many the study is to have.

        Returns:
            None if there is none left.
        """
        for trial in self.trials(TrialState.RUNNING):
            if self._is_mine(trial):
                if self._worker == MAIN:
                    self._storage.set_trial_user_attr(trial._trial_id, "worker", self._worker)
                    return self._claimed(trial)
                hand_back(self._storage, trial, reason=f"{self._worker} has died")
        for trial in self.trials(TrialState.WAITING):
            if trial.number < n_trials and self._take(trial):
                return self._claimed(trial)
        trials = self.trials()
        if len(trials) >= n_trials:
            return None
        point = self._sampler.point(trials, len(trials), stream=self._stream)
        new = self._storage.create_new_trial(self._study_id, self._template(point, TrialState.RUNNING))
        return self._claimed(next(trial for trial in reversed(self.trials()) if trial._trial_id == new))

    def _is_mine(self, trial: FrozenTrial) -> bool:
        """Whether it is of this process or of one before it of the same name."""
        worker = trial.user_attrs.get("worker")
        # Where no worker ever joined, a trial whose taker was killed before it could say its name is ours too.
        alone = not any(key.startswith(JOINED) for key in self._study.user_attrs)
        return worker == self._worker or (self._worker == MAIN and worker is None and alone)

    def _take(self, trial: FrozenTrial) -> bool:
        """Take a trial that waits, if nobody else does."""
        try:
            if not self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                return False
            self._storage.set_trial_user_attr(trial._trial_id, "worker", self._worker)
        except UpdateFinishedTrialError:
            return False
        return True

    def _claimed(self, trial: FrozenTrial) -> Claim:
        self._claim = Claim(trial._trial_id, trial.number, dict(trial.user_attrs["weights"]))
        return self._claim

    def _template(self, point: Mapping[str, float], state: TrialState) -> FrozenTrial:
        """A trial to be written down in one transaction."""
        ranges = self._plan.ranges
        inside = len(ranges) <= MAX_PARAMETERS and all(r.low <= point[name] <= r.high for name, r in ranges.items())
        weights = {name: float(point[name]) for name in ranges}
        attributes: dict[str, Any] = {"weights": weights}
        attributes |= {"given": True} if state == TrialState.WAITING else {"worker": self._worker}
        template = create_trial(
            state=TrialState.WAITING,  # which needs no dates
            params=weights if inside else {},
            distributions=dict(ranges) if inside else {},
            user_attrs=attributes,
        )
        template.state = state
        template.datetime_start = datetime.now() if state == TrialState.RUNNING else None
        return template

    def _values(self, scores: Sequence[QuestionScore], score: float) -> list[float]:
        """What Optuna is to maximise."""
        if not self._plan.objectives:
            return [score]
        means, shares = task_scores(scores), task_shares(task_scores(scores), self._plan.goals)
        return [math.copysign(1.0, shares[task]) * (means[task] or 0.0) for task in self._plan.objectives]

    def end(
        self,
        claim: Claim,
        state: TrialState,
        *,
        scores: Sequence[QuestionScore],
        facts: Mapping[str, Any],
        seconds: float,
        score: float | None = None,
    ) -> bool:
        """Write down how a trial ended.

        Args:
            claim: the trial.
            state: how.
            scores: of its questions; empty: none are kept.
            facts: what else is kept with it, as plain JSON values.
            seconds: that it took.
            score: of the trial, if it has one.

        Returns:
            Whether it was ours to end: another worker may have taken it over.
        """
        known = self._storage.get_trial(claim.id)
        if known.state != TrialState.RUNNING or known.user_attrs.get("worker") != self._worker:
            self._claim = None
            return False
        attributes = {**facts, "seconds": round(seconds, 3)}
        attributes |= {"scores": packed(scores)} if scores else {}
        attributes |= {} if score is None else {"score": score}
        try:
            for key, value in attributes.items():
                self._storage.set_trial_user_attr(claim.id, key, value)
            values = None if score is None else self._values(scores, score)
            self._storage.set_trial_state_values(claim.id, state, values)
        except UpdateFinishedTrialError:
            return False
        finally:
            self._claim = None
        return True

    def release(self) -> None:
        """Have another worker run the trial that this one will not end."""
        if self._claim is not None and self._worker != MAIN:
            known = self._storage.get_trial(self._claim.id)
            if known.state == TrialState.RUNNING and known.user_attrs.get("worker") == self._worker:
                self._storage.set_trial_state_values(self._claim.id, TrialState.WAITING)
        self._claim = None
