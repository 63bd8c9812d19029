"""What scores the models of a search: a space, its live model and the questions, opened and put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from transformers import PreTrainedTokenizerBase

from tvmerge.config import JglueConfig, MtBenchConfig, SearchConfig
from tvmerge.errors import TrialTimeout
from tvmerge.evaluators import AfterStage, Evaluator, Progress, Questions, Scored, ScoredModel
from tvmerge.interrupt import check_interrupted
from tvmerge.judging import open_judged, trial_name
from tvmerge.models.transformers import TransformersModel
from tvmerge.progress import RunProgress
from tvmerge.pruning import PRUNERS, stopper
from tvmerge.questions import ask_questions, open_tasks
from tvmerge.search import BASELINES, uniform_weights
from tvmerge.spaces import Space
from tvmerge.spaces.dense import DenseSpace
from tvmerge.spaces.mixture import MixtureSpace
from tvmerge.state_dict import StateDict
from tvmerge.study import MergeStudy
from tvmerge.trial_queue import Claim, StudyPlan

__all__ = ["Scorer", "open_questions", "open_space", "study_plan", "uniform_points"]

#: Seconds between two looks at what other workers do.
PATIENCE = 1.0

Ask = Callable[[PreTrainedTokenizerBase], Questions]


def open_space(config: SearchConfig, output: Path) -> Space:
    """The models that a configuration can become.

    Raises:
        InputError: its models cannot be found, or do not fit together.
    """
    return MixtureSpace(config, output) if config.is_mixture else DenseSpace(config)


@contextmanager
def open_questions(config: SearchConfig, output: Path, *, device: str) -> Iterator[Ask]:
    """Tasks or a bench and its judge; what is left is to choose the questions, which takes a tokenizer.

    Raises:
        InputError: there are no such tasks, or the judge cannot be asked.
    """
    if isinstance(config, MtBenchConfig):
        with open_judged(config, output, device=device) as bench:
            yield bench.ask
        return
    assert isinstance(config, JglueConfig), "there are two kinds of searches"
    tasks = open_tasks(config)
    yield lambda tokenizer: ask_questions(config, tasks, tokenizer)


def uniform_points(config: SearchConfig) -> list[float]:
    """The weights of the first trials: those that are always compared with, and a grid if the search starts there."""
    if config.search == "flat":
        return list(BASELINES)
    return uniform_weights(weight_min=config.weight_min, weight_max=config.weight_max)


def study_plan(config: SearchConfig, *, space: Space, questions: Questions, device: str) -> StudyPlan:
    """What the study of a configuration searches; it is known by what it asks of which weights, not by their paths."""
    asked = [evaluator.fingerprint for evaluator in (questions.search, questions.heldout) if evaluator is not None]
    identity = {
        **config.identity(),
        **space.identity(),
        "questions": asked,
        "scoring": dict(questions.scoring),
        "device": device.partition(":")[0],
    }
    counted = [task for task, goal in questions.goals.items() if goal.weight]
    return StudyPlan(
        identity=identity,
        ranges=space.ranges,
        sampler=config.optuna_sampler,
        seed=config.optuna_seed,
        first=[space.uniform(weight) for weight in uniform_points(config)],
        goals=questions.goals,
        guided=config.search == "guided",
        objectives=counted if config.optuna_sampler == "NSGA-II" and len(counted) > 1 else [],
    )


@dataclass(frozen=True)
class Scorer:
    """Every part that a score needs, checked and open."""

    config: SearchConfig
    space: Space
    study: MergeStudy
    model: TransformersModel
    asked: ScoredModel  # the model, as evaluators ask it
    questions: Questions
    noted: set[str] = field(default_factory=set)  # what was said of how the model is asked
    said: dict[str, Any] = field(default_factory=dict)  # what the evaluator said of the last trial

    def score(
        self,
        state_dict: StateDict,
        evaluator: Evaluator,
        progress: RunProgress,
        *,
        name: str,
        what: str,
        limit: float | None = None,
        after_stage: AfterStage | None = None,
    ) -> Scored:
        """Fill the live model and have it asked.

        Args:
            state_dict: of a model of the space.
            evaluator: of the questions.
            progress: where it is shown.
            name: what the model's answers are called.
            what: what the questions are called on the terminal.
            limit: seconds that it may take; None: any.
            after_stage: may stop it; None: nothing does.

        Raises:
            TrialStopped: it was stopped.
            TrialTimeout: it took longer.
            RunError: it cannot be scored.
        """
        advance, close = progress.count_questions(evaluator.n_scores, what)
        try:
            self.space.sources.check_unchanged()
            self.model.load(state_dict)
            self.space.sources.check_unchanged()
            return evaluator.score(self.asked, _within(limit, advance), name=name, after_stage=after_stage)
        finally:
            close()

    def note(self, progress: RunProgress) -> None:
        """Say what is new of how the model is asked."""
        for note in self.asked.notes:
            if note not in self.noted:
                progress.note(note)
                self.noted.add(note)

    def run_trials(self, progress: RunProgress, *, n_trials: Callable[[], int], after: Callable[[], None]) -> None:
        """Run trials until so many are finished, by this process or by others.

        Args:
            progress: where they are shown.
            n_trials: how many there are to be; it may grow.
            after: called after each.

        Raises:
            RunError: a trial that must not be given up, or three in a row.
        """
        while True:
            check_interrupted()
            claim = self.study.claim(n_trials())
            if claim is not None:
                self._run(claim, progress)
                after()
            elif self.study.n_open(n_trials()):
                time.sleep(PATIENCE)  # others are at them, and may die
                self.study.collect()
            else:
                self.study.collect()  # the last one may be another worker's
                return

    def _run(self, claim: Claim, progress: RunProgress) -> None:
        self.said.clear()
        result = self.study.run(claim, lambda weights, number: self._evaluate(weights, number, progress))
        scored = self.study.results()
        best = max(scored, key=lambda each: (each.score, -each.number)) if scored else None
        progress.finish_trial(
            n_finished=self.study.n_finished,
            score=None if result is None else result.score,
            best=None if best is None else (best.score, best.number),
            remarks=_remarks(self.said, self.questions.cost()),
        )
        self.note(progress)
        trial = self.study.trials()[claim.number]
        if trial.state == TrialState.FAIL:
            progress.note(f"  trial {claim.number}: {trial.user_attrs['failure']}")
        elif trial.state == TrialState.PRUNED:
            progress.note(f"  trial {claim.number}: {trial.user_attrs['stopped']}")

    def _evaluate(self, weights: Mapping[str, float], number: int, progress: RunProgress) -> Scored:
        merged, name = self.space.at(weights), trial_name(number)
        scored = self.score(
            merged,
            self.questions.search,
            progress,
            name=name,
            what="questions",
            limit=self.config.trial_timeout,
            after_stage=self._stopper(number),
        )
        self.said.update(scored.facts)
        return scored

    def _stopper(self, number: int) -> AfterStage | None:
        pruner, study = PRUNERS.get(self.config.pruner), self.study
        if pruner is None:
            return None
        given = number < study.n_first
        goals = self.questions.goals
        return stopper(pruner, is_given=given, others=lambda: study.others(number), goals=goals)


def _within(limit: float | None, advance: Progress) -> Progress:
    """Progress that ends what takes too long."""
    if limit is None:
        return advance
    deadline = time.monotonic() + limit

    def checked(n: int) -> None:
        advance(n)
        if time.monotonic() > deadline:
            raise TrialTimeout(f"it took longer than {limit:g} s")

    return checked


def _remarks(facts: Mapping[str, Any], cost: str) -> Sequence[str]:
    """What a line on a trial says beside its score."""
    remarks = [cost] if cost else []
    remarks += [f"{facts['unscored']:.1%} unscored"] if facts.get("unscored") else []
    return remarks + ([f"repeats {facts['judge_spread']:.2f} apart"] if "judge_spread" in facts else [])
