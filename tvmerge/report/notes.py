"""Notes on trials and on a study, in Markdown: what the dashboard shows of them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tvmerge.results import TrialRow

__all__ = ["NOTE_LENGTH", "RunNotes", "study_note"]

#: Characters of a note on a trial: what the dashboard keeps in one piece.
NOTE_LENGTH = 2045
#: Characters of the note on a study.
STUDY_NOTE_LENGTH = 16_000
#: Answers that a note shows, and characters of each.
SAMPLES = 3
ANSWER_LENGTH = 300
FAILURE_LENGTH = 600
#: Tasks that a note shows.
MOST_ROWS = 20
#: Bytes before the end of what was read, by which a file that was replaced is known.
TAIL = 80


class _Growing:
    """A file of JSON lines that grows, and that is sometimes replaced by one with fewer lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = 0
        self._tail = b""

    def is_replaced(self) -> bool:
        """Whether what was read before is not what the file begins with; it is read from its beginning then."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, self._offset - TAIL))
                same = file.read(min(TAIL, self._offset)) == self._tail
                same = same and os.fstat(file.fileno()).st_ino == self._inode
        except OSError:
            same = not self._offset
        if not same:
            self._offset, self._tail = 0, b""
        return not same

    def new(self) -> Iterator[dict[str, Any]]:
        """The whole lines that were added since; a line that is still being written is left for the next time."""
        try:
            file = self._path.open("rb")
        except OSError:
            return
        with file:
            self._inode = os.fstat(file.fileno()).st_ino
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._tail = (self._tail + line)[-TAIL:]
                try:
                    entry = json.loads(line)
                except ValueError:  # what a power cut leaves
                    continue
                if isinstance(entry, dict):
                    yield entry


@dataclass
class _Counts:
    """The questions of a task in a trial."""

    questions: int = 0
    right: int = 0
    wrong: int = 0
    unscored: int = 0
    only_shares: bool = True  # whether every score is from 0 to 1

    def add(self, score: float | None) -> None:
        """Count one."""
        self.questions += 1
        self.unscored += score is None
        if score is not None:
            self.right += score == 1
            self.wrong += score == 0
            self.only_shares = self.only_shares and 0 <= score <= 1


class RunNotes:
    """Notes on the trials of a run, from what its folder holds of them.

    Args:
        folder: of the run; it may hold nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._scores = _Growing(folder / "scores.jsonl")
        self._counts: dict[int, dict[str, _Counts]] = {}
        self._judgments: dict[Path, _Growing] = {}
        #: Trial → question → turn of the first answer → rating; None: unscored.
        self._ratings: dict[int, dict[str, dict[int, float | None]]] = {}

    def refresh(self) -> None:
        """Read what the run has written since; call it after the trials were looked up, whose scores are there then."""
        if self._scores.is_replaced():
            self._counts.clear()
        for entry in self._scores.new():
            self._count(entry)
        for path in sorted((self._folder / "model_judgment").glob("*_single.jsonl")):
            self._judgments.setdefault(path, _Growing(path))
        if any(judgments.is_replaced() for judgments in self._judgments.values()):
            self._ratings.clear()
            self._judgments = {path: _Growing(path) for path in self._judgments}
        for judgments in self._judgments.values():
            for entry in judgments.new():
                self._rate(entry)

    def _count(self, entry: Mapping[str, Any]) -> None:
        trial, task, score = entry.get("trial"), entry.get("task"), entry.get("score")
        if entry.get("model") == "merge" and entry.get("split") == "search" and isinstance(trial, int):
            by_task = self._counts.setdefault(trial, {})
            by_task.setdefault(str(task), _Counts()).add(score if isinstance(score, (int, float)) else None)

    def _rate(self, entry: Mapping[str, Any]) -> None:
        found = re.fullmatch(r"trial-(\d+)", str(entry.get("model")))
        question, turn, score = entry.get("question_id"), entry.get("turn"), entry.get("score")
        if found is None or entry.get("choice", 0) != 0 or not isinstance(turn, int):
            return
        ratings = self._ratings.setdefault(int(found[1]), {})
        if str(question) in ratings or len(ratings) < SAMPLES * 2:  # the first ones may lack an answer
            rating = score if isinstance(score, (int, float)) and score >= 0 else None
            ratings.setdefault(str(question), {})[turn] = rating

    def of(self, trial: TrialRow) -> str:
        """The note on a trial, NOTE_LENGTH characters at most."""
        score = "no score" if trial.score is None else f"score {trial.score:.4f}"
        facts = [score, trial.state]
        facts += [] if trial.seconds is None else [f"{trial.seconds:.1f} s"]
        facts += [] if trial.worker is None else [f"worker {_inline(trial.worker)}"]
        facts += [] if trial.cost is None else [f"judge {trial.cost:.4f} USD"]
        unscored = trial.facts.get("unscored")
        facts += [f"{unscored:.1%} unscored"] if isinstance(unscored, (int, float)) and unscored else []
        note = f"**Trial {trial.number}**: {', '.join(facts)}\n"
        if trial.failure is not None:
            note += f"\nFailed:\n{_quoted(trial.failure, FAILURE_LENGTH)}\n"
        if "stopped" in trial.facts:
            note += f"\nStopped:\n{_quoted(str(trial.facts['stopped']), FAILURE_LENGTH)}\n"
        if trial.weights:
            values = list(trial.weights.values())
            mean = math.fsum(values) / len(values)
            note += f"\n{len(values)} weights, {min(values):.3f} to {max(values):.3f}, mean {mean:.3f}\n"
        for part in self._parts(trial):
            if len(note) + len(part) <= NOTE_LENGTH:
                note += part
        return note[:NOTE_LENGTH]

    def _parts(self, trial: TrialRow) -> Iterator[str]:
        counts = self._counts.get(trial.number, {})
        if trial.tasks:
            yield _table(trial.tasks, {task: counts.get(task, _Counts()) for task in trial.tasks})
        ratings = self._ratings.get(trial.number, {})
        for question, answers in islice(self._answers(trial.number), SAMPLES):
            of_turn = ratings.get(question, {})
            yield f"\nQuestion {_inline(question)}\n" + "".join(
                f"\n{_rating(of_turn, turn)}\n{_quoted(answer, ANSWER_LENGTH)}\n"
                for turn, answer in enumerate(answers, start=1)
            )

    def _answers(self, number: int) -> Iterator[tuple[str, list[str]]]:
        """Questions, and the turns of the first answer to each of them."""
        try:
            with (self._folder / "model_answer" / f"trial-{number:04d}.jsonl").open(encoding="utf-8") as file:
                for line in file:
                    entry = json.loads(line)
                    yield str(entry["question_id"]), [str(turn) for turn in entry["choices"][0]["turns"]]
        except (OSError, ValueError, LookupError, TypeError):  # other tools write such files too
            return


def _table(tasks: Mapping[str, float | None], counts: Mapping[str, _Counts]) -> str:
    """A row for each task; how many were right and wrong, where scores are from 0 to 1."""
    heads = ["task", "score", "questions", "unscored"]
    shares = any(each.questions and each.only_shares for each in counts.values())
    lines = [[*heads, "right", "wrong"] if shares else heads]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for task, mean in islice(tasks.items(), MOST_ROWS):
        each = counts[task]
        known = [each.questions, each.unscored] if each.questions else ["", ""]
        exact = [each.right, each.wrong] if each.questions and each.only_shares else ["", ""]
        shown = "unscored" if mean is None else f"{mean:.4f}"
        lines.append([_inline(task), shown, *map(str, known), *(map(str, exact) if shares else [])])
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _rating(ratings: Mapping[int, float | None], turn: int) -> str:
    if turn not in ratings:
        return f"turn {turn}:"
    rating = ratings[turn]
    return f"turn {turn}, unscored:" if rating is None else f"turn {turn}, rated {rating:g}:"


def _inline(text: str) -> str:
    """A name in running text, without what Markdown would take for a mark."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!~])", r"\\\1", " ".join(text.split()))


def _quoted(text: str, length: int) -> str:
    """Text as it is, however many backticks are in it."""
    text = "".join(c for c in text.strip() if c.isprintable() or c == "\n")
    text = text if len(text) <= length else f"{text[:length]}…"
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def study_note(folder: Path) -> str | None:
    """What the saved model's card says of a run, less its weights; None if nothing is saved yet."""
    try:
        card = (folder / "best" / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    text = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    return text.partition("\n## Weights\n")[0].strip()[:STUDY_NOTE_LENGTH] or None
