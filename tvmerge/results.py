"""What a run has found so far, as plain data: of which reports, the dashboard and loggers are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from tvmerge.evaluators import Goals, QuestionScore
from tvmerge.samplers import Recommendation

__all__ = ["Candidate", "Results", "TrialRow", "trial_rows"]

_STATES: Mapping[TrialState, Literal["complete", "pruned", "failed", "running", "waiting"]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
#: Attributes of a trial that a row has fields for, or that say nothing to a reader.
_OWN = {"weights", "given", "score", "scores", "task_scores", "seconds", "cost", "failure", "worker", "beat"}


@dataclass(frozen=True)
class TrialRow:
    """A trial of a study."""

    number: int
    state: Literal["complete", "pruned", "failed", "running", "waiting"]
    is_given: bool  # one weight for all, which the study gave before its sampler drew
    weights: Mapping[str, float]  # in the order of the model
    score: float | None = None  # on the questions of the search; of a pruned trial None
    tasks: Mapping[str, float | None] = field(default_factory=dict)  # mean of the questions' scores, None: unscored
    seconds: float | None = None
    cost: float | None = None  # US dollars that the judge took for it; None: asking is free
    failure: str | None = None  # why it failed
    worker: str | None = None  # who ran it
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else the evaluator said, as plain JSON values


@dataclass(frozen=True)
class Candidate:
    """A model in the table."""

    label: str  # the column's head
    scores: Sequence[QuestionScore]  # on the questions of the table: held out, if some are
    search: Sequence[QuestionScore] = ()  # on those of the search; empty: not measured
    weights: Mapping[str, float] | None = None  # None: it has none, as the tuned model
    trial: int | None = None
    is_target: bool = False  # whether it is a model that the merge is made of, and has to be better than


@dataclass(frozen=True)
class Results:
    """All that a report is made of. While a run goes on there are no candidates yet."""

    name: str  # of the run's folder
    settings: Mapping[str, Any]  # the resolved configuration
    n_trials: int  # that are wanted in all
    trials: Sequence[TrialRow]  # by number
    goals: Goals = field(default_factory=dict)
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)  # task → the category of each question
    recommendation: Recommendation | None = None
    candidates: Sequence[Candidate] = ()  # in the order of the table
    chosen: int | None = None  # index of the candidate that is saved
    heldout: bool = True  # whether the search never saw the questions of the table
    table: str = ""  # Markdown, as printed at the end
    verdict: str = ""  # Markdown


def trial_rows(trials: Sequence[FrozenTrial]) -> list[TrialRow]:
    """The trials of a study, as Optuna has them."""
    return [
        TrialRow(
            number=trial.number,
            state=_STATES[trial.state],
            is_given=bool(trial.user_attrs.get("given")),
            weights=trial.user_attrs.get("weights", trial.params),
            score=trial.user_attrs.get("score", trial.values[0] if trial.values else None),
            tasks=trial.user_attrs.get("task_scores", {}),
            seconds=trial.user_attrs.get("seconds"),
            cost=trial.user_attrs.get("judge_usage", {}).get("cost"),
            failure=trial.user_attrs.get("failure"),
            worker=trial.user_attrs.get("worker"),
            facts={key: value for key, value in trial.user_attrs.items() if key not in _OWN},
        )
        for trial in trials
    ]
