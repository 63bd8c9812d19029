"""Judge prompts in FastChat's format: which one a case is put with, and how."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tvmerge.errors import ConfigError
from tvmerge.judges import Case, Prompt
from tvmerge.judges.rating import defused

__all__ = ["MAX_TURNS", "JudgePrompts", "load_judge_prompts"]

#: What FastChat's prompts can show.
MAX_TURNS = 2
#: Name → the fields that its template may hold. Of those with `math` in their name FastChat thinks as of those with a
#: reference; so do we, in any category.
FIELDS: Mapping[str, frozenset[str]] = {
    "single-v1": frozenset({"question", "answer"}),
    "single-math-v1": frozenset({"question", "answer", "ref_answer_1"}),
    "single-v1-multi-turn": frozenset({"question_1", "question_2", "answer_1", "answer_2"}),
    "single-math-v1-multi-turn": frozenset(
        {"question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2"}
    ),
}
#: Lines of a template that set its parts apart: `[The answer ends]`, `<|The Start of ...|>`, `### User:`.
_DELIMITER = re.compile(r"^[^\S\n]*(\[[^\[\]{}\n]+\]|<\|[^{}\n]+\|>|#+ [^{}\n]+)[^\S\n]*$", re.MULTILINE)


@dataclass(frozen=True)
class _Template:
    """One line of a file of judge prompts."""

    name: str
    system: str
    pieces: tuple[tuple[str, str | None], ...]  # text, and the field that follows it
    delimiters: tuple[str, ...]

    def fill(self, values: Mapping[str, str]) -> str:
        """The prompt, fields replaced; a value is never read as a template."""
        return "".join(text + ("" if field is None else values[field]) for text, field in self.pieces)


class JudgePrompts:
    """The prompts of a file.

    Args:
        templates: by name.
    """

    def __init__(self, templates: Mapping[str, _Template]) -> None:
        self._templates = dict(templates)

    @property
    def digest(self) -> str:
        """What tells files of prompts apart: their texts, in whatever order."""
        texts = {name: [template.system, template.pieces] for name, template in self._templates.items()}
        return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]

    def render(self, case: Case) -> Prompt:
        """Put a case: with its references if it has some, its first turn too if it is the second.

        Raises:
            ValueError: a case of more than two turns.
        """
        turn = len(case.questions)
        if turn > MAX_TURNS:
            raise ValueError(f"a judge's prompt shows {MAX_TURNS} turns, and this is turn {turn}")
        name = f"single{'-math' if case.references else ''}-v1{'-multi-turn' if turn > 1 else ''}"
        template = self._templates[name]
        answers = [defused(answer, delimiters=template.delimiters) for answer in case.answers]
        values = {"question": case.questions[0], "answer": answers[0]}
        for number, (question, answer) in enumerate(zip(case.questions, answers, strict=True), start=1):
            values |= {f"question_{number}": question, f"answer_{number}": answer}
        values |= {f"ref_answer_{number}": text for number, text in enumerate(case.references or (), start=1)}
        return Prompt(name=name, system=template.system, user=template.fill(values))


def load_judge_prompts(path: Path) -> JudgePrompts:
    """Read a file in FastChat's format; prompts that compare pairs are left out.

    Raises:
        ConfigError: it cannot be read, or one of the four prompts that rate a single answer is missing or broken.
    """
    templates = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"--judge_file {path}, line {number}"
        try:
            entry = json.loads(line)
            name = entry["name"]
            if name in FIELDS:
                texts = [entry.get("system_prompt") or "", entry["prompt_template"]]
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError("system_prompt and prompt_template must be texts")
                "".join(texts).encode()  # refuses half of a character
                templates[name] = _template(name, *texts)
                if entry.get("output_format", "[[rating]]") != "[[rating]]":
                    raise ValueError(f"output_format must be [[rating]], got {entry['output_format']!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{where}: is no judge prompt: {what}") from error
    if missing := [name for name in FIELDS if name not in templates]:
        raise ConfigError(f"--judge_file {path}: lacks the prompt {missing[0]}")
    return JudgePrompts(templates)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--judge_file {path}: cannot be read: {error}") from error


def _template(name: str, system: str, text: str) -> _Template:
    """Take a `str.format` template apart; no more of its language is understood than a field's name.

    Raises:
        ValueError: an unknown field, or one that is more than a name.
    """
    pieces: list[tuple[str, str | None]] = []
    for literal, field, spec, conversion in string.Formatter().parse(text):
        if field is not None and (field not in FIELDS[name] or spec or conversion):
            raise ValueError(f"{name} holds the field {{{field}}}, it may hold {', '.join(sorted(FIELDS[name]))}")
        pieces.append((literal, field))
    last = {"answer", "answer_2"} & FIELDS[name]
    if not last & {field for _, field in pieces}:
        raise ValueError(f"{name} does not hold {{{min(last)}}}, the answer to rate")
    return _Template(name=name, system=system, pieces=tuple(pieces), delimiters=_delimiters(pieces))


def _delimiters(pieces: list[tuple[str, str | None]]) -> tuple[str, ...]:
    text = "".join(literal + ("" if field is None else "{}") for literal, field in pieces)
    return tuple(dict.fromkeys(match[1].strip() for match in _DELIMITER.finditer(text)))
