"""Early stopping: trials whose first questions say that the others are not worth asking.

A trial that is stopped has no score: what it got on a part of the questions is kept for later decisions only, and no
sampler sees it. At equal numbers of questions no way to stop early was found to gain anything so far, so that none is
the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvmerge.errors import RunError
from tvmerge.evaluators import AfterStage, Goals, QuestionScore, Scored, mean_score, task_shares

__all__ = ["PRUNERS", "Halving", "Other", "Pruner", "TrialStopped", "Wilcoxon", "stopper"]

#: Which question of which task, turn and choice.
_Key = tuple[str, int, int, int]


class TrialStopped(RunError):
    """A trial was ended early; it has no score.

    Args:
        reason: in words.
        scored: what was asked until then, for later decisions.
    """

    def __init__(self, reason: str, scored: Scored) -> None:
        super().__init__(reason)
        self.scored = scored


@dataclass(frozen=True)
class Other:
    """What another trial of the study got so far."""

    scores: Sequence[QuestionScore]
    is_complete: bool  # False: it was stopped early, and has the scores of some questions only


class Pruner(Protocol):
    """Decides whether a trial goes on."""

    def should_stop(
        self, *, stage: int, scores: Sequence[QuestionScore], others: Sequence[Other], goals: Goals
    ) -> str | None:
        """Decide after a stage; a function of its arguments alone.

        Args:
            stage: from 0.
            scores: of the trial, on the questions up to the end of the stage.
            others: all other trials that were scored or stopped, in any order.
            goals: how scores make the score of a model.

        Returns:
            Why it is to be stopped, in words; None: it goes on.
        """


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving: a trial goes on if it is in the best part of those that came as far.

    Args:
        reduction: what part goes on, one in so many; at least 2.

    Source: Li et al. 2020, arXiv:1810.05934, algorithm 2, where a rung is a stage. The first one of a rung goes on, and
    so does who is as good as one that goes on.
    """

    reduction: int = 2

    def should_stop(
        self, *, stage: int, scores: Sequence[QuestionScore], others: Sequence[Other], goals: Goals
    ) -> str | None:
        """Whether the score so far is below that of the best 1/reduction of those that reached the stage."""
        own = mean_score(scores, goals)
        there = [mean_score(reached, goals) for reached in (_on(scores, other) for other in others) if reached]
        rung = sorted((score for score in (own, *there) if score is not None), reverse=True)
        if own is None or not rung:
            return None
        n_going_on = max(1, len(rung) // self.reduction)
        if own >= rung[n_going_on - 1]:
            return None
        return (
            f"scores {own:.3f} on its first {_count(scores)} questions, and the best {n_going_on} of {len(rung)} "
            f"trials {rung[n_going_on - 1]:.3f} or more"
        )


@dataclass(frozen=True)
class Wilcoxon:
    """Stops a trial that answers questions worse than the best complete one, by more than chance explains.

    Args:
        p: of the one-sided signed-rank test, below which it is stopped.
        least: fewest questions to decide by.

    Source: Wilcoxon 1945; ties with the best are ranked and split, Pratt 1959 and scipy's `zsplit`; the normal
    approximation, as an exact test of ties takes most of a second.
    """

    p: float = 0.1
    least: int = 20

    def should_stop(
        self, *, stage: int, scores: Sequence[QuestionScore], others: Sequence[Other], goals: Goals
    ) -> str | None:
        """Whether its questions, each by what it adds to the score, are worse than the same ones of the best."""
        complete = [(mean_score(other.scores, goals), other) for other in others if other.is_complete]
        known = [(score, other) for score, other in complete if score is not None]
        if not known:
            return None
        _, best = max(known, key=lambda each: each[0])
        gains = _gains(scores, _on(scores, best), goals)
        if len(gains) < self.least or math.fsum(gains) >= 0:
            return None
        # Takes half a second to import: not before it is needed.
        from scipy.stats import wilcoxon

        found = float(wilcoxon(gains, zero_method="zsplit", alternative="less", method="asymptotic").pvalue)
        if found >= self.p:
            return None
        return f"is worse than the best trial on its first {_count(scores)} questions (p = {found:.2g})"


#: Name → what decides; a name that is not here stops nothing.
PRUNERS: Mapping[str, Pruner] = {"halving": Halving(), "wilcoxon": Wilcoxon()}


def stopper(pruner: Pruner, *, is_given: bool, others: Callable[[], Sequence[Other]], goals: Goals) -> AfterStage:
    """What an evaluator calls after each stage of a trial.

    Args:
        pruner: decides.
        is_given: whether the study gave the trial its point: such a trial is never stopped.
        others: gives the trials to compare with, when they are needed.
        goals: how scores make the score of a model.

    Returns:
        A function that raises `TrialStopped`, or does nothing.
    """

    def after_stage(stage: int, scored: Scored) -> None:
        if is_given:
            return
        reason = pruner.should_stop(stage=stage, scores=scored.scores, others=others(), goals=goals)
        if reason is not None:
            raise TrialStopped(reason, scored)

    return after_stage


def _key(score: QuestionScore) -> _Key:
    return score.task, score.question, score.turn, score.choice


def _on(scores: Sequence[QuestionScore], other: Other) -> list[QuestionScore]:
    """What another trial got for the questions of some scores, in their order; empty if it did not come as far."""
    theirs = {_key(each): each for each in other.scores}
    found = [theirs[key] for key in map(_key, scores) if key in theirs]
    return found if len(found) == len(scores) else []


def _gains(ours: Sequence[QuestionScore], theirs: Sequence[QuestionScore], goals: Goals) -> list[float]:
    """By how much each question makes the score of a model higher than another's; of those that both have a score for.

    Questions of a task without a weight are left out. Turns and choices of one question are one: they are no further
    evidence.
    """
    both = [
        (our, our.score - their.score)
        for our, their in zip(ours, theirs, strict=True)
        if our.score is not None and their.score is not None
    ]
    shares = task_shares(dict.fromkeys(our.task for our, _ in both), goals)
    counts: dict[str, int] = {}
    for our, _ in both:
        counts[our.task] = counts.get(our.task, 0) + 1
    gains: dict[tuple[str, int], float] = {}
    for our, gain in both:
        if share := shares[our.task]:
            place = our.task, our.question
            gains[place] = gains.get(place, 0.0) + share * gain / counts[our.task]
    return list(gains.values())


def _count(scores: Sequence[QuestionScore]) -> int:
    return len({(score.task, score.question) for score in scores})
