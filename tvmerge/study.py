"""A study: create or resume it, run its trials, keep what was scored.

A run that was killed at any moment goes on with the same command and ends with the same result. Three things make it
so. Weights are a function of the finished trials, the seed and the trial's number (samplers/). A trial that was
under way is taken up again under its own number. Scores are written before the trial is marked as finished, and lines
of trials that are not finished are dropped when the study is opened again.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import torch
from filelock import FileLock, Timeout
from optuna.distributions import FloatDistribution
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from tvmerge.errors import InputError, RunError, StopError, StudyError
from tvmerge.evaluators import Goals, QuestionScore, Scored, mean_score, task_scores
from tvmerge.files import write_text
from tvmerge.samplers import SeededSampler
from tvmerge.search import BASELINES

__all__ = ["STORAGE_ERRORS", "MergeStudy", "ScoreLog", "TrialResult"]

#: What the storage of a study raises, on a full disk for one.
STORAGE_ERRORS = (SQLAlchemyError, OptunaError)

STUDY_NAME = "tvmerge"
LOG_KEYS = {"model", "trial", "split", "task", "question", "score"}
#: A run stops after so many failed trials in a row: the cause will not go away by itself.
MAX_FAILURES_IN_A_ROW = 3


@dataclass(frozen=True)
class TrialResult:
    """A finished and scored trial."""

    number: int
    weights: Mapping[str, float]
    score: float


class ScoreLog:
    """scores.jsonl: one line for each question that a model was scored on.

    Keys: `model` (`merge`, at the weights of `trial`, or `tuned`; `tuned/label` if there are several), `trial` (null
    for those), `split` (`search` or `heldout`), `task`, `question` (index in the task), `turn` and `choice` (of a
    conversation, where they are not 1 and 0), `score` (null: unscored).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines; one that was torn is left out."""
        if not self.path.exists():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                entry = json.loads(line)
            except ValueError:  # what a power cut leaves
                continue
            if isinstance(entry, dict) and entry.keys() >= LOG_KEYS:
                entries.append(entry)
        return entries

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop all other lines."""
        write_text(self.path, "".join(_line(entry) for entry in self.lines() if wanted(entry)))

    def append(self, scores: Iterable[QuestionScore], *, model: str, trial: int | None, split: str) -> None:
        """Add a model's scores and flush them to the disk."""
        # As `_line` writes them, in a fifth of its time: there are thousands.
        head = json.dumps({"model": model, "trial": trial, "split": split}, ensure_ascii=False)[:-1]
        lines = [
            f'{head}, "task": {_quoted(each.task)}, "question": {each.question}{_place(each)}, '
            f'"score": {json.dumps(each.score)}}}\n'
            for each in scores
        ]
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def replace(self, scores: Iterable[QuestionScore], *, model: str, trial: int | None, split: str) -> None:
        """As `append`, after dropping what a kill left of the same scores."""
        same = {"model": model, "trial": trial, "split": split}
        self.keep(lambda line: not same.items() <= line.items())
        self.append(scores, model=model, trial=trial, split=split)

    def find(self, *, model: str, trial: int | None, split: str) -> list[QuestionScore]:
        """The scores of one model on one split, in the order they were written."""
        wanted = {"model": model, "trial": trial, "split": split}
        return [
            QuestionScore(
                task=entry["task"],
                question=entry["question"],
                score=entry["score"],
                turn=entry.get("turn", 1),
                choice=entry.get("choice", 0),
            )
            for entry in self.lines()
            if wanted.items() <= entry.items()
        ]


@functools.cache
def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _place(score: QuestionScore) -> str:
    """Which turn and choice a score is of, where a question may have several."""
    turn = f', "turn": {score.turn}' if score.turn != 1 else ""
    return turn + (f', "choice": {score.choice}' if score.choice else "")


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


class MergeStudy:
    """An Optuna study in `output_dir/study.db`, created or resumed, and held by one process at a time.

    Args:
        output_dir: an existing folder.
        identity: what makes it the same study: every setting that a score depends on, as plain JSON values.
        ranges: name of each number that is searched, in a stable order → where it is searched.
        sampler: a key of SAMPLERS.
        seed: of the sampler.
        first: the points of the first trials, perhaps outside of the ranges.
        goals: how the scores of tasks make the score of a trial.

    Raises:
        StudyError: the folder holds a study of another identity, or a file that is none, or another process runs in it.
    """

    def __init__(
        self,
        *,
        output_dir: Path,
        identity: Mapping[str, Any],
        ranges: Mapping[str, FloatDistribution],
        sampler: str,
        seed: int,
        first: Sequence[Mapping[str, float]],
        goals: Goals | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._lock = _lock(output_dir)
        self._ranges = dict(ranges)
        self._first = list(first)
        self._goals = goals or {}
        self.scores = ScoreLog(output_dir / "scores.jsonl")
        self._storage: RDBStorage | None = None
        try:
            self._storage = RDBStorage(f"sqlite:///{quote(str(output_dir / 'study.db'))}")
            settings: dict[str, Any] = {
                "study_name": STUDY_NAME,
                "storage": self._storage,
                "sampler": SeededSampler(name=sampler, seed=seed, search_space=ranges, first=first),
                "direction": "maximize",
            }
            self._study = optuna.create_study(**settings, load_if_exists=True)
            identity = json.loads(json.dumps(identity))
            if self.recall("identity") not in (None, identity) and not self.n_finished:
                # Nothing was scored that another configuration could spoil: what ended the first attempt was mended.
                optuna.delete_study(study_name=STUDY_NAME, storage=self._storage)
                self._study = optuna.create_study(**settings)
            is_new = self._check_identity(output_dir, identity)
            self._check_scores(is_new=is_new)
        except STORAGE_ERRORS as error:
            self.close()
            reason = " ".join(str(error).split())[:200]
            raise StudyError(f"{output_dir / 'study.db'}: cannot be opened as a study: {reason}") from error
        except BaseException:
            self.close()
            raise

    def _check_scores(self, *, is_new: bool) -> None:
        """Drop the lines of no finished trial of this study; refuse if those of one are gone."""
        finished = {trial.number for trial in self._trials(TrialState.COMPLETE)}
        self.scores.keep(lambda line: not is_new and (line["trial"] is None or line["trial"] in finished))
        lines = [line for line in self.scores.lines() if line["split"] == "search" and line["model"] == "merge"]
        lost = finished - {line["trial"] for line in lines}
        if lost:
            raise StudyError(f"{self.scores.path}: lacks the scores of trial {min(lost)}: restore it, or begin anew")

    def _check_identity(self, output_dir: Path, identity: Mapping[str, Any]) -> bool:
        """Refuse a study of another identity; true if the study is new."""
        known = self._study.user_attrs.get("identity")
        if known is None:
            self._study.set_user_attr("identity", identity)
            return True
        different = sorted(key for key in known.keys() | identity.keys() if known.get(key) != identity.get(key))
        if different:
            was = ", ".join(f"{key} was {known.get(key)!r} and is {identity.get(key)!r}" for key in different)
            raise StudyError(f"{output_dir} holds a study of another configuration: {was}: name another --output_dir")
        return False

    def close(self) -> None:
        """Let another process have the folder."""
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
        self._lock.release()

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    @property
    def n_finished(self) -> int:
        """Number of trials that were scored or have failed."""
        return len(self._trials(TrialState.COMPLETE, TrialState.FAIL))

    @property
    def n_first(self) -> int:
        """How many trials are of given points."""
        return len(self._first)

    def remember(self, key: str, value: Any) -> None:
        """Keep a plain JSON value with the study."""
        self._study.set_user_attr(key, value)

    def recall(self, key: str) -> Any:
        """What `remember` kept; None if nothing."""
        return self._study.user_attrs.get(key)

    def last_failure(self) -> str:
        """Why the last failed trial failed."""
        failed = self._trials(TrialState.FAIL)
        return f"trial {failed[-1].number}: {failed[-1].user_attrs['failure']}" if failed else "no trial failed"

    def results(self) -> list[TrialResult]:
        """All scored trials, by number."""
        return [_result(trial) for trial in self._trials(TrialState.COMPLETE)]

    def best(self) -> TrialResult:
        """The trial of the highest score; of equal ones the first.

        Raises:
            RunError: no trial was scored.
        """
        results = self.results()
        if not results:
            raise RunError("no trial was scored, see the reasons above")
        return max(results, key=lambda result: (result.score, -result.number))

    def run_trial(self, evaluate: Callable[[Mapping[str, float], int], Scored]) -> TrialResult | None:
        """Run one trial: the one that a kill left unfinished, if there is one, else a new one.

        Args:
            evaluate: weights and the trial's number → a score for each question.

        Returns:
            None if the trial failed; it is recorded as failed, with its weights and the reason.

        Raises:
            RunError: the last trials all failed, or this one did and must not be given up: a baseline, or a trial that
                ran out of memory, of disk or of what the judge may cost. It is run again by the next process.
        """
        unfinished = self._trials(TrialState.RUNNING)
        trial = Trial(self._study, unfinished[0]._trial_id) if unfinished else self._study.ask()
        weights = self._weights(trial)
        started = time.monotonic()
        try:
            scored = evaluate(weights, trial.number)
            scores = scored.scores
            score = mean_score(scores, self._goals)
            if score is None:
                unscored = ", ".join(task for task, mean in task_scores(scores).items() if mean is None)
                raise RunError(f"no question could be scored, of {unscored or 'no task'}")
        except (InputError, StopError):  # a model was changed meanwhile, a judge has gone: nothing is recorded
            raise
        except Exception as error:
            if trial.number < len(BASELINES) or isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)):
                raise RunError(f"trial {trial.number}: {_reason(error)}") from error
            self._fail(trial, error)
            return None
        trial.set_user_attr("task_scores", task_scores(scores))
        for key, fact in scored.facts.items():
            trial.set_user_attr(key, fact)
        trial.set_user_attr("seconds", round(time.monotonic() - started, 3))
        self.scores.append(scores, model="merge", trial=trial.number, split="search")
        self._study.tell(trial, score)
        return TrialResult(number=trial.number, weights=weights, score=score)

    def _weights(self, trial: Trial) -> dict[str, float]:
        point = self._first[trial.number] if trial.number < len(self._first) else None
        if point is not None and not all(r.low <= point[name] <= r.high for name, r in self._ranges.items()):
            # A baseline outside of the ranges cannot be Optuna's parameters of them.
            trial.set_user_attr("weights", dict(point))
            return dict(point)
        return {name: trial.suggest_float(name, r.low, r.high, log=r.log) for name, r in self._ranges.items()}

    def _fail(self, trial: Trial, error: Exception) -> None:
        reason = _reason(error)
        trial.set_user_attr("failure", reason)
        self._study.tell(trial, state=TrialState.FAIL)
        last = self._trials(TrialState.COMPLETE, TrialState.FAIL)[-MAX_FAILURES_IN_A_ROW:]
        if len(last) == MAX_FAILURES_IN_A_ROW and all(t.state == TrialState.FAIL for t in last):
            raise RunError(f"{MAX_FAILURES_IN_A_ROW} trials in a row failed, the last with {reason}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _result(trial: FrozenTrial) -> TrialResult:
    weights = trial.user_attrs.get("weights", trial.params)
    assert trial.value is not None, "a complete trial has a value"
    return TrialResult(number=trial.number, weights=weights, score=trial.value)


def _lock(output_dir: Path) -> FileLock:
    lock = FileLock(output_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StudyError(f"{output_dir}: another run is using this folder, wait for it or name another one") from None
    return lock
