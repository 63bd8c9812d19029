"""The benches and judge prompts that ship with the tool are well formed, and the work of their authors."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_bench
import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
PROMPTS = ROOT / "judge_prompts"
FASTCHAT = ROOT.parent / "shared" / "data" / "fastchat"
EIGHT = ("writing", "roleplay", "reasoning", "math", "extraction", "knowledge", "humanities", "coding")
#: How many questions a bench has at least in each of its categories.
LEAST = {
    "japanese_chat": dict.fromkeys(EIGHT, 6),
    "japanese_roleplay": {"roleplay": 15, "story": 15},
    "english_chat": dict.fromkeys(EIGHT, 4),
}
FIRST_ID = {"japanese_chat": 1001, "japanese_roleplay": 2001, "english_chat": 3001, "toy": 1}
ALWAYS_WITH_REFERENCE = {"reasoning", "math", "extraction", "knowledge", "coding"}
#: The fields of the prompts' templates.
FIELDS = {
    "pair-v2": {"question", "answer_a", "answer_b"},
    "pair-v2-multi-turn": {"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"},
    "single-v1": {"question", "answer"},
    "single-v1-multi-turn": {"question_1", "question_2", "answer_1", "answer_2"},
}
FIELDS["pair-math-v1"] = FIELDS["pair-v2"] | {"ref_answer_1"}
FIELDS["pair-math-v1-multi-turn"] = FIELDS["pair-v2-multi-turn"] | {"ref_answer_1", "ref_answer_2"}
FIELDS["single-math-v1"] = FIELDS["single-v1"] | {"ref_answer_1"}
FIELDS["single-math-v1-multi-turn"] = FIELDS["single-v1-multi-turn"] | {"ref_answer_1", "ref_answer_2"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(name: str) -> list[dict[str, Any]]:
    return read(BENCHMARKS / name / "question.jsonl")


def texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


@pytest.mark.parametrize("name", LEAST)
def test_a_bench_has_what_it_promises(name: str) -> None:
    rows = questions(name)
    counts = Counter(row["category"] for row in rows)
    assert counts.keys() == LEAST[name].keys()
    assert all(counts[category] >= least for category, least in LEAST[name].items())
    for row in rows:
        assert list(row) == ["question_id", "category", "turns", "reference"][: len(row)]
        assert len(row["turns"]) == 2
        assert all(row["turns"])
        expected = name != "japanese_roleplay" and row["category"] in ALWAYS_WITH_REFERENCE
        assert ("reference" in row) == expected, row["question_id"]
        if expected:
            assert len(row["reference"]) == 2
            assert all(reference.strip() for reference in row["reference"])


def test_no_id_and_no_turn_comes_twice() -> None:
    rows = [row for name in FIRST_ID for row in questions(name)]
    assert len({row["question_id"] for row in rows}) == len(rows)
    turns = [turn for row in rows for turn in row["turns"]]
    assert len(set(turns)) == len(turns)
    for name, first in FIRST_ID.items():
        ids = [row["question_id"] for row in questions(name)]
        assert ids == list(range(first, first + len(ids)))


@pytest.mark.parametrize(
    "path",
    [*sorted(BENCHMARKS.glob("*/question.jsonl")), *sorted(PROMPTS.glob("*.jsonl"))],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_the_text_is_clean(path: Path) -> None:
    raw = path.read_text(encoding="utf-8")
    assert raw.endswith("}\n")
    assert not re.search(r"(?<!\\)\\u", raw)
    for text in (text for row in read(path) for text in texts(row)):
        assert text == unicodedata.normalize("NFC", text)
        assert text == text.strip()
        assert not re.search(r"[ \u3000]$", text, re.MULTILINE), text
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn") and c != "\n"], text


@pytest.mark.parametrize("name", ["japanese_chat", "japanese_roleplay"])
def test_japanese_benches_are_in_japanese(name: str) -> None:
    for turn in (turn for row in questions(name) for turn in row["turns"]):
        assert len(re.findall(r"[ぁ-ゖ]", turn)) >= 10, turn


def test_the_toy_bench_is_what_its_script_makes() -> None:
    made = make_bench.to_lines(make_bench.make_questions())
    assert (BENCHMARKS / "toy" / "question.jsonl").read_bytes() == made.encode()


@pytest.mark.parametrize("language", ["en", "ja"])
def test_judge_prompts_have_the_known_names_and_fields(language: str) -> None:
    prompts = {prompt["name"]: prompt for prompt in read(PROMPTS / f"{language}.jsonl")}
    assert prompts.keys() == FIELDS.keys()
    for name, prompt in prompts.items():
        keys = "name type system_prompt prompt_template description category output_format"
        assert list(prompt) == keys.split()
        template = prompt["prompt_template"]
        parsed = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        assert sorted(parsed) == sorted(FIELDS[name])
        filled = template.format(**{field: f"<{field}>" for field in parsed})
        # Each text stands on lines of its own between two delimiters, no two of which are the same.
        delimiters = re.findall(r"^\[(.*)\]$", filled, re.MULTILINE)
        assert len(set(delimiters)) == len(delimiters) == 2 * len(parsed)
        assert all(re.search(rf"^\[.*\]\n<{field}>\n\[.*\]$", filled, re.MULTILINE) for field in parsed)
        single = name.startswith("single")
        assert prompt["type"] == ("single" if single else "pairwise")
        assert prompt["output_format"] == ("[[rating]]" if single else "[[A]]")
        assert prompt["output_format"] in prompt["system_prompt"]
        for text in (prompt["system_prompt"], template):
            if single:
                assert {"en": "Rating: [[5]]", "ja": "評価: [[5]]"}[language] in text
            else:
                assert all(f"{ {'en': 'Verdict', 'ja': '判定'}[language] }: [[{verdict}]]" in text for verdict in "ABC")
        if language == "ja":
            assert "日本語の質問には、日本語で答えていなければなりません" in prompt["system_prompt"]
            assert "簡体字" in prompt["system_prompt"]


def test_fastchat_reads_the_files() -> None:
    files = sorted(str(path) for path in BENCHMARKS.glob("*/question.jsonl"))
    code = (
        "import sys\n"
        "from fastchat.llm_judge.common import load_judge_prompts, load_questions\n"
        "print([len(load_judge_prompts(path)) for path in sys.argv[1:3]])\n"
        "print([len(load_questions(path, None, None)) for path in sys.argv[3:]])\n"
    )
    prompts = [str(PROMPTS / f"{language}.jsonl") for language in ("en", "ja")]
    command = [sys.executable, "-W", "ignore", "-X", "utf8", "-c", code, *prompts, *files]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in result.stdout.splitlines()[-2:]] == [
        [8, 8],
        [len(read(Path(f))) for f in files],
    ]


@pytest.mark.skipif(not FASTCHAT.exists(), reason="MT-Bench is not here")
def test_nothing_is_taken_from_mt_bench() -> None:
    length = 60
    theirs = [row["turns"] for row in read(FASTCHAT / "mt_bench" / "question.jsonl")]
    theirs += [[row["system_prompt"], row["prompt_template"]] for row in read(FASTCHAT / "judge_prompts.jsonl")]
    runs = {text[i : i + length] for text in texts(theirs) for i in range(len(text) - length + 1)}
    ours: list[object] = [row["turns"] for name in FIRST_ID for row in questions(name)]
    for language in ("en", "ja"):
        ours += [[row["system_prompt"], row["prompt_template"]] for row in read(PROMPTS / f"{language}.jsonl")]
    for text in texts(ours):
        shared = [text[i : i + length] for i in range(len(text) - length + 1) if text[i : i + length] in runs]
        assert not shared
