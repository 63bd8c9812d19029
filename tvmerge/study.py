"""A study: create, resume or join it, run its trials, keep what was scored.

A run that was killed at any moment goes on with the same command and ends with the same result. Three things make it
so. Weights are a function of the finished trials, the seed and the trial's number (samplers/). A trial is written
down with its weights in one transaction before it is run, and one that was under way is taken up again under its own
number. The scores of its questions are written with the trial before it is marked as finished; scores.jsonl is made of
them.

Several processes may work on one study, each on a trial of its own (heartbeat.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
from filelock import FileLock, Timeout
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tvmerge.errors import InputError, RunError, StopError, StudyError, TrialTimeout
from tvmerge.evaluators import QuestionScore, Scored, mean_score, task_scores
from tvmerge.files import remove_staged
from tvmerge.heartbeat import SLOWEST, Heartbeat
from tvmerge.models.batching import is_out_of_memory
from tvmerge.pruning import Other, TrialStopped
from tvmerge.samplers import Recommendation, pareto_front, recommend
from tvmerge.score_log import ScoreLog, unpacked
from tvmerge.search import BASELINES
from tvmerge.storage import STORAGE_ERRORS, STUDY_FILE, STUDY_NAME, file_url, open_storage, reason_of
from tvmerge.trial_queue import MAIN, Claim, StudyPlan, TrialQueue

__all__ = ["MergeStudy", "TrialResult"]

_Value = TypeVar("_Value")

#: A run stops after so many failed trials in a row: the cause will not go away by itself.
MAX_FAILURES_IN_A_ROW = 3
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class TrialResult:
    """A finished and scored trial."""

    number: int
    weights: Mapping[str, float]
    score: float


class MergeStudy:
    """An Optuna study, created, resumed or joined.

    Args:
        output_dir: folder of the run, which this process alone works in; None: the study is joined, and must be there.
        plan: what it searches.
        storage: address of a database; None: a file in `output_dir`.
        name: of the study.
        worker: what this process is called; MAIN if it began the study.
        heartbeat: seconds between two signs of life.
        trial_timeout: seconds that a trial may take; None: any.

    Raises:
        ConfigError: there is no such kind of storage.
        StudyError: it is a study of another identity, no study, or in use by another process.
    """

    def __init__(
        self,
        *,
        output_dir: Path | None,
        plan: StudyPlan,
        storage: str | None = None,
        name: str = STUDY_NAME,
        worker: str = MAIN,
        heartbeat: float = 15.0,
        trial_timeout: float | None = None,
    ) -> None:
        self.plan = plan
        self.trial_timeout = trial_timeout
        self._name = name
        self._output = output_dir
        self._in_file = storage is None
        self._worker = worker
        self._heartbeat: Heartbeat | None = None
        self._opened: RDBStorage | None = None
        self._others: dict[int, Other] = {}  # number of a trial that has ended → its scores
        self._logged: set[int] = set()  # numbers of the trials that are in scores.jsonl
        self._lock = None if output_dir is None else _lock(output_dir)
        try:
            if output_dir is not None:
                remove_staged(output_dir, STUDY_FILE)
            self._opened = open_storage(storage or file_url(_known(output_dir) / STUDY_FILE))
            is_new = self._open()
            self._queue = TrialQueue(self._study, self._opened, plan, worker=worker)
            self._trials = self._queue.trials
            self._begin(is_new=is_new)
            study_id = self._opened.get_study_id_from_name(name)
            self.remember(SLOWEST, max(heartbeat, self.recall(SLOWEST) or 0.0))
            self._heartbeat = Heartbeat(self._opened, study_id, worker=worker, interval=heartbeat)
        except STORAGE_ERRORS as error:
            self.close()
            raise StudyError(f"{self._place}: cannot be opened as a study: {reason_of(error)}") from error
        except BaseException:
            self.close()
            raise

    @property
    def _place(self) -> str:
        return str(self._output / STUDY_FILE) if self._output is not None and self._in_file else f"study {self._name}"

    def _open(self) -> bool:
        """Load or create the study; true if it is new."""
        n_objectives = max(len(self.plan.objectives), 1)
        settings: dict[str, Any] = {
            "study_name": self._name,
            "storage": self._opened,
            "directions": [StudyDirection.MAXIMIZE] * n_objectives,
        }
        if self._output is None:
            self._study = optuna.load_study(study_name=self._name, storage=_known(self._opened))
            return False
        self._study = optuna.create_study(**settings, load_if_exists=True)
        known, trials = self.recall("identity"), self._study.get_trials(deepcopy=False)
        if known is None and any("given" not in trial.user_attrs for trial in trials):
            raise StudyError(f"study {self._name}: has trials that no run of tvmerge made: name another --study_name")
        # In a database the trial that runs may be that of another run, which has the same name for its study.
        states = ENDED if self._in_file else (*ENDED, TrialState.RUNNING)
        if known not in (None, self._identity) and not any(trial.state in states for trial in trials):
            # Nothing was scored that another configuration could spoil: what ended the first attempt was mended.
            optuna.delete_study(study_name=self._name, storage=_known(self._opened))
            self._study = optuna.create_study(**settings)
        return self.recall("identity") is None

    @property
    def _identity(self) -> Any:
        return json.loads(json.dumps(self.plan.identity))

    def _begin(self, *, is_new: bool) -> None:
        """Write down the first trials of a new study; refuse a study of another identity."""
        known, identity = self.recall("identity"), self._identity
        if self._output is None and known is None:
            raise StudyError(f"{self._place}: is not begun yet: start the search first")
        if is_new:
            self._queue.begin()
            self.remember("identity", known := identity)
        different = sorted(key for key in known.keys() | identity.keys() if known.get(key) != identity.get(key))
        # Other questions follow from other settings, and their digests tell nobody anything.
        different = [key for key in different if key != "questions"] or different
        if different:
            was = ", ".join(
                "the questions are others"
                if key == "questions"
                else f"{key} was {known.get(key)!r} and is {identity.get(key)!r}"
                for key in different
            )
            flag = "--output_dir" if self._in_file else "--study_name"
            advice = "" if self._output is None else f": name another {flag}"
            place = self._output if self._in_file else f"study {self._name}"
            raise StudyError(f"{place} holds a study of another configuration: {was}{advice}")
        if self._output is not None:
            self.scores = ScoreLog(self._output / "scores.jsonl")
            self._check_scores(is_new=is_new)

    def _check_scores(self, *, is_new: bool) -> None:
        """Drop the lines of no finished trial of this study, and add those that a kill kept out."""
        finished = {
            trial.number: len(unpacked(trial.user_attrs["scores"])) for trial in self._trials(TrialState.COMPLETE)
        }
        kept = self.scores.keep(lambda line: not is_new and (line["trial"] is None or line["trial"] in finished))
        counts: dict[int, int] = {}
        for line in kept:
            if _is_searched(line):
                counts[line["trial"]] = counts.get(line["trial"], 0) + 1
        torn = {number for number, count in counts.items() if count != finished[number]}
        if torn:
            self.scores.keep(lambda line: not _is_searched(line) or line["trial"] not in torn)
        self._logged = counts.keys() - torn
        self.collect()

    def collect(self) -> None:
        """Write what was scored since the last time, here or by other workers, to scores.jsonl."""
        if self._output is None:
            return
        for trial in self._trials(TrialState.COMPLETE):
            if trial.number not in self._logged:
                scores = unpacked(trial.user_attrs["scores"])
                self.scores.append(scores, model="merge", trial=trial.number, split="search")
                self._logged.add(trial.number)

    def close(self) -> None:
        """Let other processes have the folder, and the trial that was not ended."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._opened is not None:
            self._opened.remove_session()
            self._opened.engine.dispose()
        if self._lock is not None:
            self._lock.release()

    def trials(self) -> list[FrozenTrial]:
        """All trials, as Optuna has them."""
        return self._trials()

    @property
    def n_finished(self) -> int:
        """Number of trials that were scored or stopped, or have failed."""
        return len(self._trials(*ENDED))

    def n_open(self, n_trials: int) -> int:
        """Number of trials, of so many, that are begun or wait to be."""
        return sum(trial.number < n_trials for trial in self._trials(TrialState.RUNNING, TrialState.WAITING))

    @property
    def n_first(self) -> int:
        """How many trials are of given points."""
        return len(self.plan.first)

    def remember(self, key: str, value: Any) -> None:
        """Keep a plain JSON value with the study."""
        self._study.set_user_attr(key, value)

    def recall(self, key: str) -> Any:
        """What `remember` kept; None if nothing."""
        return self._study.user_attrs.get(key)

    def results(self) -> list[TrialResult]:
        """All scored trials, by number."""
        return [_result(trial) for trial in self._trials(TrialState.COMPLETE)]

    def search_scores(self, number: int) -> list[QuestionScore]:
        """What a trial got, question by question; of one that was stopped as far as it went."""
        return unpacked(self._trials()[number].user_attrs.get("scores", []))

    def others(self, number: int) -> list[Other]:
        """What all other trials got that were scored or stopped."""
        ended = [trial for trial in self._trials(TrialState.COMPLETE, TrialState.PRUNED) if trial.number != number]
        for trial in ended:
            if trial.number not in self._others:  # what has ended stays as it is
                scores = unpacked(trial.user_attrs.get("scores", []))
                self._others[trial.number] = Other(scores, is_complete=trial.state == TrialState.COMPLETE)
        return [self._others[trial.number] for trial in ended]

    def best(self) -> TrialResult:
        """The trial of the highest score; of equal ones the first.

        Raises:
            RunError: no trial was scored.
        """
        results = self.results()
        if not results:
            raise RunError("no trial was scored, see the reasons above")
        return max(results, key=lambda result: (result.score, -result.number))

    def pareto_front(self) -> list[int]:
        """Numbers of the trials than which none is better in all objectives."""
        return pareto_front(self._trials())

    def recommended(self) -> Recommendation | None:
        """The point that the sampler believes to be the best; None if no trial was scored."""
        return recommend(
            self._trials(),
            self.plan.ranges,
            n_first=self.n_first,
            n_objectives=max(len(self.plan.objectives), 1),
        )

    def claim(self, n_trials: int) -> Claim | None:
        """A trial to run; None if none is left of so many."""
        return self._queue.claim(n_trials)

    def run_trial(self, evaluate: Callable[[Mapping[str, float], int], Scored]) -> TrialResult | None:
        """Claim a trial and run it.

        Raises:
            As `run`.
        """
        claim = self.claim(1 << 62)
        return None if claim is None else self.run(claim, evaluate)

    def run(self, claim: Claim, evaluate: Callable[[Mapping[str, float], int], Scored]) -> TrialResult | None:
        """Run a trial that was claimed.

        Args:
            claim: by this process.
            evaluate: weights and the trial's number → a score for each question.

        Returns:
            None if there is no score: it failed, was stopped early, or another worker has it by now. What failed is
            recorded as failed, with its weights and the reason.

        Raises:
            RunError: the last trials all failed, or this one did and must not be given up: a baseline, or a trial that
                ran out of memory, of disk or of what the judge may cost. It is run again by the next process.
        """
        started = time.monotonic()
        beating = _known(self._heartbeat)
        beating.begin(claim.id, limit=self.trial_timeout, hung=lambda: self._hangs(claim))
        try:
            scored = evaluate(claim.weights, claim.number)
            score = mean_score(scored.scores, self.plan.goals)
            if self.trial_timeout is not None and time.monotonic() - started > self.trial_timeout:
                raise TrialTimeout(f"it took longer than {self.trial_timeout:g} s")
            if score is None:
                unscored = ", ".join(task for task, mean in task_scores(scored.scores).items() if mean is None)
                raise RunError(f"no question could be scored, of {unscored or 'no task'}")
        except TrialStopped as stopped:
            facts = {"stopped": str(stopped), **stopped.scored.facts}
            self._end(claim, TrialState.PRUNED, stopped.scored.scores, facts, started)
            return None
        except (InputError, StopError):  # a model was changed meanwhile, a judge has gone: nothing is recorded
            raise
        except Exception as error:
            if claim.number < len(BASELINES) or isinstance(error, OSError) or is_out_of_memory(error):
                raise RunError(f"trial {claim.number}: {_reason(error)}") from error
            self._fail(claim, error, started)
            return None
        finally:
            beating.end()
        facts = {"task_scores": task_scores(scored.scores), **scored.facts}
        if not self._end(claim, TrialState.COMPLETE, scored.scores, facts, started, score=score):
            return None
        return TrialResult(number=claim.number, weights=claim.weights, score=score)

    def _end(
        self,
        claim: Claim,
        state: TrialState,
        scores: Sequence[QuestionScore],
        facts: Mapping[str, Any],
        started: float,
        *,
        score: float | None = None,
    ) -> bool:
        seconds = time.monotonic() - started
        ended = self._queue.end(claim, state, scores=scores, facts=facts, seconds=seconds, score=score)
        self.collect()
        return ended

    def _fail(self, claim: Claim, error: Exception, started: float) -> None:
        self._end(claim, TrialState.FAIL, [], {"failure": _reason(error)}, started)
        last = self._trials(*ENDED)[-MAX_FAILURES_IN_A_ROW:]
        if len(last) == MAX_FAILURES_IN_A_ROW and all(t.state == TrialState.FAIL for t in last):
            raise RunError(f"{MAX_FAILURES_IN_A_ROW} trials in a row failed, the last with {_reason(error)}") from error

    def _hangs(self, claim: Claim) -> None:
        """Record that a trial hangs; a baseline is run again by the next process."""
        if claim.number >= len(BASELINES):
            failure = f"it took over {self.trial_timeout:g} s and hung"
            self._queue.end(claim, TrialState.FAIL, scores=[], facts={"failure": failure}, seconds=0.0)

    def release(self) -> None:
        """Have another worker run the trial that this one will not end."""
        self._queue.release()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _result(trial: FrozenTrial) -> TrialResult:
    attributes = trial.user_attrs
    return TrialResult(number=trial.number, weights=attributes["weights"], score=attributes["score"])


def _is_searched(line: Mapping[str, Any]) -> bool:
    return (line["split"], line["model"]) == ("search", "merge")


def _known(value: _Value | None) -> _Value:
    assert value is not None, "it is opened by then"
    return value


def _lock(output_dir: Path) -> FileLock:
    lock = FileLock(output_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StudyError(f"{output_dir}: another run is using this folder, wait for it or name another one") from None
    return lock
