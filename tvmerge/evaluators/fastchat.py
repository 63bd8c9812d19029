"""Answers and judgments as FastChat's files, which its own tools and people's scripts read."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmerge.evaluators.bench import BenchQuestion
from tvmerge.files import remove_staged, write_text
from tvmerge.judges import Judgment

__all__ = ["FastChatFiles", "Rated", "Talk"]

#: How FastChat's files spell that there is no rating; its show_result leaves such lines out.
UNSCORED = -1


@dataclass(frozen=True)
class Talk:
    """A model's answers to the turns of a question."""

    index: int  # of the question in its bench
    question: BenchQuestion
    choice: int  # which of several answers to the same question
    answers: tuple[str, ...]  # fewer than turns if one could not be given


@dataclass(frozen=True)
class Rated:
    """What a judge made of a turn of a talk."""

    talk: Talk
    turn: int  # from 1
    judgment: Judgment


class FastChatFiles:
    """model_answer/<model>.jsonl, and model_judgment/<judge>_single.jsonl for all models.

    Args:
        folder: of the run.
        judge: name of the judge.
    """

    def __init__(self, folder: Path, *, judge: str) -> None:
        self._judge = judge
        self._answers = folder / "model_answer"
        file_name = re.sub(r"[^\w.\-]+", "_", judge)[-60:]  # names of files may have 255 bytes
        self._judgments = folder / "model_judgment" / f"{file_name}_single.jsonl"

    def keep(self, is_wanted: Callable[[str], bool]) -> None:
        """Drop the answers and judgments of all other models: what a kill left of a trial must not count."""
        for folder in (self._answers, self._judgments.parent):
            remove_staged(folder, "*.jsonl")
        for path in self._answers.glob("*.jsonl"):
            if not is_wanted(path.stem):
                path.unlink()
        if self._judgments.exists():
            self._keep_judgments(is_wanted)

    def _keep_judgments(self, is_wanted: Callable[[str], bool]) -> bool:
        """Rewrite the judgments if some go; whether there is a file."""
        if not self._judgments.exists():
            return False
        text = self._judgments.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.split("\n") if (model := _model_of(line)) is not None and is_wanted(model)]
        kept = "".join(f"{line}\n" for line in lines)
        if kept != text:
            write_text(self._judgments, kept)
        return True

    def write(self, model: str, talks: Sequence[Talk], rated: Iterable[Rated]) -> None:
        """Write what a model answered and how that was judged, in place of what was there of the same model.

        A question that could not be answered to its end is not in the file of answers.
        """
        self._answers.mkdir(parents=True, exist_ok=True)
        self._judgments.parent.mkdir(parents=True, exist_ok=True)
        self._keep_judgments(lambda other: other != model)
        now = time.time()
        choices: dict[int, list[Talk]] = {}
        for talk in talks:
            choices.setdefault(talk.index, []).append(talk)
        complete = [each for each in choices.values() if all(len(t.answers) == len(t.question.turns) for t in each)]
        lines = [_line(_answer(model, each, now)) for each in complete]
        write_text(self._answers / f"{model}.jsonl", "".join(lines))
        with self._judgments.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(_line(self._judgment(model, each, now)) for each in rated))

    def _judgment(self, model: str, rated: Rated, now: float) -> dict[str, Any]:
        judgment, talk = rated.judgment, rated.talk
        entry: dict[str, Any] = {
            "question_id": talk.question.question_id,
            "model": model,
            "judge": [self._judge, "none" if judgment.prompt is None else judgment.prompt.name],
            "user_prompt": "" if judgment.prompt is None else judgment.prompt.user,
            "judgment": judgment.text,
            "score": UNSCORED if judgment.rating is None else judgment.rating,
            "turn": rated.turn,
            "tstamp": now,
        }
        entry |= {} if talk.choice == 0 else {"choice": talk.choice}
        entry |= {} if len(judgment.ratings) < 2 else {"ratings": list(judgment.ratings)}
        return entry | ({} if judgment.reason is None else {"reason": judgment.reason})


def _answer(model: str, talks: Sequence[Talk], now: float) -> dict[str, Any]:
    choices = [{"index": talk.choice, "turns": list(talk.answers)} for talk in talks]
    key = talks[0].question.question_id
    digest = hashlib.sha256(json.dumps([model, key, choices]).encode()).hexdigest()
    return {"question_id": key, "answer_id": digest[:22], "model_id": model, "choices": choices, "tstamp": now}


def _model_of(line: str) -> str | None:
    """The model of a whole line; None if it was torn."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    model = entry.get("model") if isinstance(entry, dict) else None
    return model if isinstance(model, str) else None


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
