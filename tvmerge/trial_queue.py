"""Which trial a worker runs next, and how trials are written down: whole, once, and under one number for ever.

A trial is created with its weights in one transaction. A worker that takes a trial that waits, or ends one, does so in
one too (trial_table.py), so that of several that try one does.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from tvmerge.evaluators import Goals, QuestionScore, task_scores, task_shares
from tvmerge.heartbeat import hand_back
from tvmerge.samplers import PointSampler
from tvmerge.score_log import packed
from tvmerge.trial_table import change_trial, create_trial

__all__ = ["MAIN", "Claim", "StudyPlan", "TrialQueue"]

#: What the process is called that began the study.
MAIN = "main"
#: More weights than these are no parameters of Optuna's: a dashboard takes ten seconds for them. They are in the
#: trial's attribute `weights`, as they always are.
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
        for number in range(len(self.trials()), len(self._plan.first)):
            self._create(self._plan.first[number], number, TrialState.WAITING, {"given": True})

    def claim(self, n_trials: int) -> Claim | None:
        """A trial to run: one that this process left unfinished, else one that was handed back, else a new one.

        Args:
            n_trials: how many the study is to have.

        Returns:
            None if there is none left.
        """
        trials = self.trials()
        for trial in trials:
            if trial.state != TrialState.RUNNING or trial.user_attrs.get("worker") != self._worker:
                continue
            if self._worker != MAIN:
                hand_back(self._storage, trial, reason=f"{self._worker} has died")
            elif self._take(trial, TrialState.RUNNING):
                return self._claimed(trial._trial_id, trial.number, trial.user_attrs["weights"])
            trials = self.trials()
        while True:
            for trial in trials:
                is_open = trial.state == TrialState.WAITING and trial.number < n_trials
                if is_open and self._take(trial, TrialState.WAITING):
                    return self._claimed(trial._trial_id, trial.number, trial.user_attrs["weights"])
            number = len(trials)
            if number >= n_trials:
                return None
            point = self._sampler.point(trials, number, stream=self._stream)
            new = self._create(point, number, TrialState.RUNNING, {"worker": self._worker})
            if new is not None:
                return self._claimed(new, number, point)
            trials = self.trials()  # another worker was faster

    def _take(self, trial: FrozenTrial, was: TrialState) -> bool:
        """Take a trial that waits, or that a process before this one left, if nobody else does."""
        having = {"worker": self._worker} if was == TrialState.RUNNING else {}
        # A sign that nobody has seen yet, so that who watches begins to count again.
        taken = {"worker": self._worker, "beat": f"{self._worker}:{secrets.token_hex(4)}"}
        return change_trial(
            self._storage, trial._trial_id, TrialState.RUNNING, was=was, having=having, attributes=taken
        )

    def _claimed(self, trial_id: int, number: int, weights: Mapping[str, float]) -> Claim:
        self._claim = Claim(trial_id, number, {name: float(weights[name]) for name in self._plan.ranges})
        return self._claim

    def _create(
        self, point: Mapping[str, float], number: int, state: TrialState, attributes: Mapping[str, Any]
    ) -> int | None:
        """Write down a trial, if it still is the next."""
        ranges = self._plan.ranges
        inside = len(ranges) <= MAX_PARAMETERS and all(r.low <= point[name] <= r.high for name, r in ranges.items())
        weights = {name: float(point[name]) for name in ranges}
        return create_trial(
            self._storage,
            self._study_id,
            number=number,
            state=state,
            parameters={name: (weights[name], r) for name, r in ranges.items()} if inside else {},
            attributes={"weights": weights, **attributes},
        )

    def _values(self, scores: Sequence[QuestionScore], score: float) -> list[float]:
        """What Optuna is to maximise."""
        if not self._plan.objectives:
            return [score]
        means = {task: mean for task, mean in task_scores(scores).items() if mean is not None}
        shares = task_shares(means, self._plan.goals)
        return [means[task] if shares[task] > 0 else -means[task] for task in self._plan.objectives]

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
        attributes = {**facts, "seconds": round(seconds, 3)}
        attributes |= {"scores": packed(scores)} if scores else {}
        attributes |= {} if score is None else {"score": score}
        self._claim = None
        return change_trial(
            self._storage,
            claim.id,
            state,
            having={"worker": self._worker},
            attributes=attributes,
            values=None if score is None else self._values(scores, score),
        )

    def release(self) -> None:
        """Have another worker run the trial that this one will not end."""
        claim, self._claim = self._claim, None
        if claim is not None and self._worker != MAIN:
            change_trial(self._storage, claim.id, TrialState.WAITING, having={"worker": self._worker}, attributes={})
