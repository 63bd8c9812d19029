"""Folders of questions, as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from tvmerge.benches import find_bench, split_bench
from tvmerge.config import MtBenchConfig
from tvmerge.errors import ConfigError, TaskError
from tvmerge.evaluators.bench import Bench, load_bench

REAL = ROOT.parent / "shared" / "data" / "fastchat" / "mt_bench"


def entry(key: int | str = 1, **changes: Any) -> dict[str, Any]:
    return {"question_id": key, "category": "math", "turns": ["1+1?", "なぜ?"], **changes}


def write(folder: Path, *entries: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in entries]
    (folder / "question.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def load(folder: Path, judge: str = "gpt-4") -> Bench:
    return load_bench(folder, name="mine", judge=judge)


def reference(key: int, *turns: str) -> str:
    return json.dumps(
        {"question_id": key, "answer_id": "x", "model_id": "m", "choices": [{"index": 0, "turns": turns}]}
    )


def test_questions_are_read_as_they_stand(tmp_path: Path) -> None:
    odd = entry("a-7", turns=[" spaces \n[[10]] {x} "], category="独自", extra=1, required_temperature=0)
    bench = load(write(tmp_path, "\ufeff" + json.dumps(entry(reference=["2", "1と1"])), "", "  ", odd, entry(3)))
    first, second, third = bench.questions
    assert (first.question_id, first.category, first.turns) == (1, "math", ("1+1?", "なぜ?"))
    assert first.references == ("2", "1と1")
    assert (second.question_id, second.turns, second.temperature) == ("a-7", (" spaces \n[[10]] {x} ",), 0.0)
    assert second.category == "独自"
    assert third.references is None
    assert bench.notes == ()


@pytest.mark.parametrize("given", [["2"], ["2", ""], [], None, ["2", " "]])
def test_references_count_if_there_is_one_for_each_turn(given: Any, tmp_path: Path) -> None:
    assert load(write(tmp_path, entry(reference=given))).questions[0].references is None


def test_a_folder_of_reference_answers_counts_alone(tmp_path: Path) -> None:
    write(tmp_path, entry(1, reference=["own", "own"]), entry(2, reference=["own", "own"]))
    (tmp_path / "reference_answer").mkdir()
    (tmp_path / "reference_answer" / "gpt-4.jsonl").write_text(reference(2, "r1", "r2") + "\n")
    assert [question.references for question in load(tmp_path).questions] == [None, ("r1", "r2")]
    assert load(tmp_path, judge="another").questions[1].references == ("r1", "r2")  # it is the only one
    (tmp_path / "reference_answer" / "a.jsonl").write_text(reference(1, "s1", "s2") + "\n")
    assert load(tmp_path).questions[1].references == ("r1", "r2")
    bench = load(tmp_path, judge="another")
    assert bench.questions[0].references == ("s1", "s2")
    assert "a.jsonl" in bench.notes[0]
    (tmp_path / "reference_answer" / "gpt-4.jsonl").write_text('{"question_id": 2, "choices": []}\n')
    with pytest.raises(TaskError, match=r"gpt-4\.jsonl, line 1: is no answer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", "line 2: is no JSON"),
        ("[1]", "line 2: must be an object"),
        (entry(None), "question_id must be a number or a text"),  # type: ignore[arg-type]
        (entry(True), "question_id"),
        (entry(1), "question_id 1 stands twice"),
        (entry(2, turns=[]), "turns must be"),
        (entry(2, turns="text"), "turns must be"),
        (entry(2, turns=["a", 1]), "turns must be"),
        (entry(2, turns=["a", " "]), "turns must be"),
        (entry(2, turns=["\ud800"]).__repr__().replace("'", '"'), "turns must be"),
        (entry(2, category=3), "category must be"),
        (entry(2, reference=[1, 2]), "reference must be"),
        (entry(2, required_temperature=-1), "required_temperature"),
        (entry(2, required_temperature="hot"), "required_temperature"),
    ],
)
def test_a_broken_line_is_named(broken: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        load(write(tmp_path, entry(1), broken))
    assert "question.jsonl, line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_questions_at_all(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is not there"):
        load(tmp_path)
    (tmp_path / "question.jsonl").write_bytes(b"\n")
    with pytest.raises(TaskError, match="holds no question"):
        load(tmp_path)
    (tmp_path / "question.jsonl").write_bytes(b'{"question_id": 1, "turns": ["\xff"]}\n')
    with pytest.raises(TaskError, match="line 1: is no JSON"):
        load(tmp_path)


def test_the_real_mt_bench_has_the_references_that_fastchat_gives() -> None:
    if not REAL.exists():
        pytest.skip(f"needs {REAL}")
    bench = load(REAL)
    assert len(bench.questions) == 80
    with_reference = [question for question in bench.questions if question.references is not None]
    assert len(with_reference) == 30
    assert {question.category for question in with_reference} == {"math", "reasoning", "coding"}


def config(**settings: Any) -> MtBenchConfig:
    return MtBenchConfig(target_model="t", tuned_model="u", base_model="b", **settings)


def test_benches_are_found_by_name_or_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "benchmarks" / "mine", entry())
    assert find_bench(config(bench_name="mine")).name == "mine"
    assert len(find_bench(config(bench_name="toy")).questions) == 240  # that comes with the code
    write(tmp_path / "else" / "日本語", entry(), entry(2))
    assert find_bench(config(bench_dir="else/日本語")).name == "日本語"
    assert len(find_bench(config(bench_dir="else", bench_name="日本語")).questions) == 2
    for settings, message in (
        ({"bench_name": "none"}, "there are .*mine.*toy"),
        ({"bench_dir": "else"}, "question.jsonl is not there"),
        ({"bench_dir": "else", "bench_name": "none"}, "question.jsonl is not there"),
    ):
        with pytest.raises(TaskError, match=message):
            find_bench(config(**settings))


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", "a\\b", ".hidden", "", " ", "a\0b", "a\n", "-x", "~"])
def test_a_bench_name_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="--bench_name"):
        config(bench_name=name)


def test_the_split_keeps_the_shares_of_categories(tmp_path: Path) -> None:
    entries = [
        entry(n, category="math" if n % 4 else "writing", reference=["1", "2"] if n % 2 else []) for n in range(80)
    ]
    bench = load(write(tmp_path, *entries))
    split = split_bench(config(bench_name="mine", question_limit=20), bench, judge="gpt-4")
    search, heldout = split.search, split.heldout
    assert (len(search), len(heldout)) == (20, 24)
    assert not set(search) & set(heldout)
    assert sum(bench.questions[index].category == "writing" for index in search) in (4, 5, 6)
    # A judge that compares with references has only those questions that have them.
    split = split_bench(config(bench_name="mine"), bench, judge="rouge_l")
    search, heldout = split.search, split.heldout
    assert (len(search), len(heldout)) == (28, 12)
    assert all(bench.questions[index].references for index in [*search, *heldout])
    with pytest.raises(TaskError, match="no question has a reference"):
        split_bench(config(bench_name="mine"), load(write(tmp_path, entry())), judge="rouge_l")
    with pytest.raises(TaskError, match="has 3 turns"):
        split_bench(config(bench_name="mine"), load(write(tmp_path, entry(turns=["a", "b", "c"]))), judge="gpt-4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bench_name": None}, "--bench_name is missing"),
        ({"parallel": 0}, "--parallel must be at least 1"),
        ({"num_choices": 0}, "--num_choices"),
        ({"max_new_token": 0}, "--max_new_token"),
        ({"judge_repeats": 0}, "--judge_repeats"),
        ({"judge_retries": -1}, "--judge_retries"),
        ({"judge_timeout": 0.0}, "--judge_timeout must be more than 0"),
        ({"judge_timeout": float("inf")}, "--judge_timeout"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"judge_price_in": 1.0}, "belong together"),
        ({"judge_price_in": -1.0, "judge_price_out": 1.0}, "--judge_price_in"),
        ({"max_judge_cost": 0.0}, "--max_judge_cost"),
        ({"max_unscored": 1.0}, "--max_unscored"),
        ({"judge_model_name": " "}, "--judge_model_name is empty"),
        ({"question_limit": 0}, "--question_limit"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**{"bench_name": "toy", **settings})
