"""scores.jsonl: one line for each question that a model was scored on."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvmerge.evaluators import QuestionScore
from tvmerge.files import write_text

__all__ = ["ScoreLog", "packed", "unpacked"]

LOG_KEYS = {"model", "trial", "split", "task", "question", "score"}


class ScoreLog:
    """The scores of a run, question by question.

    Keys: `model` (`merge`, at the weights of `trial`; `recommended`; `tuned`; `tuned/label` if there are several),
    `trial` (null for all but `merge`), `split` (`search` or `heldout`), `task`, `question` (index in the task), `turn`
    and `choice` (of a conversation, where they are not 1 and 0), `score` (null: unscored).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines; one that was torn, or that is no score, is left out: what it was of is scored again."""
        if not self.path.exists():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                entry = json.loads(line)
            except ValueError:  # what a power cut leaves
                continue
            if isinstance(entry, dict) and entry.keys() >= LOG_KEYS and _is_score(entry):
                entries.append(entry)
        return entries

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Drop all other lines; those that stay."""
        kept = [entry for entry in self.lines() if wanted(entry)]
        write_text(self.path, "".join(_line(entry) for entry in kept))
        return kept

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

    def by_model(self) -> dict[tuple[str, int | None, str], list[QuestionScore]]:
        """Model, trial and split → the scores, in the order they were written."""
        found: dict[tuple[str, int | None, str], list[QuestionScore]] = {}
        for entry in self.lines():
            found.setdefault((entry["model"], entry["trial"], entry["split"]), []).append(_score(entry))
        return found

    def find(self, *, model: str, trial: int | None, split: str) -> list[QuestionScore]:
        """The scores of one model on one split, in the order they were written."""
        return self.by_model().get((model, trial, split), [])


def packed(scores: Sequence[QuestionScore]) -> list[Any]:
    """Scores as a short JSON value, kept with a trial: `[[task, [[question, score, turn, choice], ...]], ...]`."""
    runs = itertools.groupby(scores, key=lambda each: each.task)
    return [[task, [_short(each) for each in of_task]] for task, of_task in runs]


def unpacked(value: Sequence[Any]) -> list[QuestionScore]:
    """What `packed` made short, in the same order."""
    return [QuestionScore(task, *short) for task, of_task in value for short in of_task]


def _short(score: QuestionScore) -> list[Any]:
    place = [] if (score.turn, score.choice) == (1, 0) else [score.turn, score.choice]
    return [score.question, score.score, *place]


def _is_score(entry: Mapping[str, Any]) -> bool:
    """Whether a line holds what we write, and not what a hand or another program has made of it."""
    score, trial = entry["score"], entry["trial"]
    return (
        (trial is None or type(trial) is int)
        and all(isinstance(entry[key], str) for key in ("model", "split", "task"))
        and all(type(entry.get(key, 0)) is int for key in ("question", "turn", "choice"))
        and (score is None or (type(score) in (int, float) and math.isfinite(score)))
    )


def _score(entry: Mapping[str, Any]) -> QuestionScore:
    return QuestionScore(
        task=entry["task"],
        question=entry["question"],
        score=entry["score"],
        turn=entry.get("turn", 1),
        choice=entry.get("choice", 0),
    )


@functools.cache
def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _place(score: QuestionScore) -> str:
    """Which turn and choice a score is of, where a question may have several."""
    turn = f', "turn": {score.turn}' if score.turn != 1 else ""
    return turn + (f', "choice": {score.choice}' if score.choice else "")


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
