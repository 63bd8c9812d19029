"""Folders of questions in FastChat's formats: question.jsonl, and reference answers where there are some."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tvmerge.errors import TaskError
from tvmerge.judges import Case

__all__ = ["Bench", "BenchQuestion", "load_bench"]

QUESTIONS = "question.jsonl"
REFERENCES = "reference_answer"
HOTTEST = 100


@dataclass(frozen=True)
class BenchQuestion:
    """A conversation to be had: what the user says, turn by turn."""

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] | None = None  # a good answer to each turn
    temperature: float | None = None  # that the question asks for itself

    def case(self, answers: Sequence[str]) -> Case:
        """The last of some answers, to be judged."""
        n = len(answers)
        references = None if self.references is None else self.references[:n]
        return Case(questions=self.turns[:n], answers=tuple(answers), references=references)

    def empty_cases(self) -> list[Case]:
        """Each turn with empty answers."""
        return [self.case([""] * n) for n in range(1, len(self.turns) + 1)]


@dataclass(frozen=True)
class Bench:
    """The questions of a folder, in the order of its file."""

    name: str
    questions: tuple[BenchQuestion, ...]
    notes: tuple[str, ...] = ()  # what the user should know of them


def load_bench(folder: Path, *, name: str, judge: str) -> Bench:
    """Read question.jsonl, and reference_answer/*.jsonl if there is such a folder.

    A question's own `reference` counts where there is no such folder. Of several files in it, it is the one named as
    the judge that counts, as in FastChat.

    Args:
        folder: of the bench.
        name: what it is called.
        judge: name of the judge.

    Raises:
        TaskError: a file is missing or a line of it broken; with its number.
    """
    path = folder / QUESTIONS
    if not path.is_file():
        raise TaskError(f"bench {name}: {path} is not there")
    questions: dict[int | str, BenchQuestion] = {}
    for where, entry in _entries(path):
        question = _question(entry, where)
        if question.question_id in questions:
            raise TaskError(f"{where}: the question_id {question.question_id!r} stands twice in the file")
        questions[question.question_id] = question
    if not questions:
        raise TaskError(f"{path}: holds no question")
    notes: list[str] = []
    if (folder / REFERENCES).is_dir() and (chosen := _reference_file(folder / REFERENCES, judge, notes)):
        given = dict(_reference_answers(chosen))
        if unused := sorted(map(repr, given.keys() - questions.keys())):
            notes.append(f"{chosen}: {len(unused)} of its {len(given)} answers are to no question, as {unused[0]}")
        questions = {key: _with_references(question, given.get(key)) for key, question in questions.items()}
    return Bench(name=name, questions=tuple(questions.values()), notes=tuple(notes))


def _entries(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each line with something on it as an object, and where it is."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where}: is no JSON: {error}") from error
        if not isinstance(entry, dict):
            raise TaskError(f"{where}: must be an object with question_id, category and turns")
        yield where, entry


def _question(entry: Mapping[str, Any], where: str) -> BenchQuestion:
    key = entry.get("question_id")
    if isinstance(key, bool) or not isinstance(key, (int, str)) or key == "":
        raise TaskError(f"{where}: question_id must be a number or a text, got {key!r}")
    category = entry.get("category", "general")
    if (
        not isinstance(category, str)
        or not category.strip().isprintable()
        or not category.strip()
        or _texts([category, str(key)]) is None
    ):
        raise TaskError(
            f"{where}: category must be a text, and question_id too if it is none, got {category!r} and {key!r}"
        )
    turns = _texts(entry.get("turns"))
    if not turns or not all(turn.strip() for turn in turns):
        raise TaskError(
            f"{where}: turns must be a list of texts with something in them, got {entry.get('turns')!r:.80}"
        )
    temperature = entry.get("required_temperature")
    if temperature is not None and not (isinstance(temperature, (int, float)) and 0 <= temperature <= HOTTEST):
        raise TaskError(f"{where}: required_temperature must be from 0 to {HOTTEST}, got {temperature!r:.80}")
    reference = entry.get("reference")
    texts = _texts([reference] if isinstance(reference, str) else reference or [])
    if texts is None:
        raise TaskError(f"{where}: reference must be a list of texts, got {reference!r:.80}")
    question = BenchQuestion(
        key, category.strip(), tuple(turns), None, None if temperature is None else float(temperature)
    )
    return _with_references(question, texts)


def _texts(value: Any) -> list[str] | None:
    """A list of texts that can be written down; None if it is something else."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        return None
    try:
        "".join(value).encode()
    except UnicodeEncodeError:  # half of a character, as "\\ud800"
        return None
    return value


def _with_references(question: BenchQuestion, texts: list[str] | None) -> BenchQuestion:
    """A question with its references, if each turn has one."""
    n = len(question.turns)
    complete = texts is not None and len(texts) >= n and all(text.strip() for text in texts[:n])
    return replace(question, references=tuple(texts[:n]) if texts is not None and complete else None)


def _reference_file(folder: Path, judge: str, notes: list[str]) -> Path | None:
    files = sorted(folder.glob("*.jsonl"))
    named = [path for path in files if path.stem == judge.replace("/", "_")]
    if named or len(files) < 2:
        return next(iter(named or files), None)
    notes.append(
        f"of {len(files)} files in {folder} none is {judge}.jsonl: the first one, {files[0].name}, holds the references"
    )
    return files[0]


def _reference_answers(path: Path) -> Iterator[tuple[int | str, list[str]]]:
    """Question id → answers to its turns: the first choice of each line, in the format of model_answer."""
    for where, entry in _entries(path):
        try:
            key, turns = entry["question_id"], _texts(entry["choices"][0]["turns"])
        except (KeyError, IndexError, TypeError) as error:
            raise TaskError(f"{where}: is no answer in FastChat's format: it lacks {error}") from error
        if not isinstance(key, (int, str)) or turns is None:
            raise TaskError(f"{where}: must have a question_id and choices with a list of texts as turns")
        yield key, turns
