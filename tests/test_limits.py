"""How many questions a trial sees and a table is made of, if nobody says how many, and if somebody does."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT, TASKS
from hypothesis import given
from hypothesis import strategies as st

from tvmerge.benches import split_bench
from tvmerge.config import JglueConfig, MtBenchConfig
from tvmerge.errors import ConfigError
from tvmerge.evaluators.bench import Bench, BenchQuestion
from tvmerge.evaluators.split import share_out
from tvmerge.models.transformers import load_tokenizer
from tvmerge.questions import TaskQuestions, ask_questions, open_tasks

TOYS = ("toy_jcommonsenseqa", "toy_jnli", "toy_jsquad", "toy_marc_ja")
MODELS: dict[str, Any] = {"target_model": "target", "base_model": "base", "tuned_model": "tuned"}

DEMO: dict[str, Any] = {"jglue_tasks": ",".join(TOYS), "task_dir": str(ROOT / "demo" / "tasks")}


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    weights=st.lists(st.floats(0.1, 10), min_size=8, max_size=8),
    total=st.integers(0, 200),
    least=st.integers(0, 9),
)
def test_no_question_is_better_given_by_another_task(
    sizes: list[int], weights: list[float], total: int, least: int
) -> None:
    available = {str(n): size for n, size in enumerate(sizes)}
    known = {str(n): weights[n] for n in range(len(sizes))}
    given = share_out(total, available=available, weights=known, least=0)
    assert sum(given.values()) == min(total, sum(sizes))
    for a, n in given.items():
        assert 0 <= n <= available[a]
        for b, m in given.items():
            if n and m < available[b]:
                assert (n - 0.5) / known[a] <= (m + 0.5) / known[b] * (1 + 1e-9), f"{a} gives what {b} should"
    some = share_out(total, available=available, weights=known, least=least)
    assert some == {name: max(n, min(least, available[name])) for name, n in given.items()}


def test_shares_by_hand() -> None:
    sizes = {"a": 1000, "b": 1000, "c": 20}
    even = dict.fromkeys(sizes, 1.0)
    assert share_out(300, available=sizes, weights=even, least=5) == {"a": 140, "b": 140, "c": 20}
    assert share_out(301, available=sizes, weights=even, least=5) == {"a": 141, "b": 140, "c": 20}
    assert share_out(300, available=sizes, weights={"a": 2, "b": 1, "c": 0}, least=5) == {"a": 200, "b": 100, "c": 5}
    group = {f"m{n}": 100 for n in range(57)}
    weights = {"jnli": 1.0, **dict.fromkeys(group, 1 / 57)}
    # Half of the score is jnli's, and five questions are the least that say something of a task.
    given = share_out(300, available={"jnli": 1000, **group}, weights=weights, least=5)
    assert 140 <= given.pop("jnli") <= 150
    assert given == dict.fromkeys(group, 5)


def asked(**settings: Any) -> TaskQuestions:
    config = JglueConfig(**{**MODELS, **DEMO, **settings})
    return ask_questions(config, open_tasks(config), load_tokenizer(ROOT / "demo" / "models" / "target"))


def counts(questions: TaskQuestions) -> tuple[dict[str, int], dict[str, int]]:
    parts = questions.search, questions.heldout
    assert questions.heldout is not None
    return tuple({name: len(known) for name, known in part._questions.items()} for part in parts if part)  # type: ignore[return-value]


def test_tasks_share_about_300_questions() -> None:
    questions = asked()
    assert counts(questions) == (dict.fromkeys(TOYS, 75), dict.fromkeys(TOYS, 150))
    assert questions.notes[0] == (
        "300 of 1,400 questions per trial: at the same cost more trials of about 300 find more than fewer trials of "
        "more; --jglue_limit takes another number, or all"
    )
    # Labels keep their shares: of three that are equally frequent, 25 each.
    labels = [question.doc["label"] for question in questions.search._questions["toy_jnli"]]
    rows = open_tasks(JglueConfig(**MODELS, **DEMO)).loaded["toy_jnli"].questions
    of_all = [row["label"] for row in rows]
    for label in set(of_all):
        assert abs(labels.count(label) - 75 * of_all.count(label) / 500) <= 2
    weighted = asked(task_weight=["toy_jnli=4", "toy_jsquad=0"])
    assert counts(weighted)[0] == dict(zip(TOYS, (50, 200, 5, 50), strict=True))


def test_a_task_gives_what_it_has_and_all_is_all() -> None:
    tiny = {"jglue_tasks": "tiny_choice,tiny_extract", "task_dir": str(TASKS)}
    questions = asked(**tiny)
    assert counts(questions) == ({"tiny_choice": 42, "tiny_extract": 28}, {"tiny_choice": 18, "tiny_extract": 12})
    assert questions.notes == ["70 questions per trial: all that are not held out"]
    every = asked(**tiny, jglue_limit="all")
    assert every.search.fingerprint == questions.search.fingerprint
    assert every.notes == []
    assert counts(asked(**tiny, jglue_limit="all,7"))[0] == {"tiny_choice": 42, "tiny_extract": 7}
    assert counts(asked(**tiny, jglue_limit=["all", 7]))[0] == {"tiny_choice": 42, "tiny_extract": 7}


def test_held_out_questions_have_a_limit_and_the_search_sees_none_of_the_others() -> None:
    every, some = asked(heldout_limit="all"), asked(heldout_limit=100)
    assert counts(some)[1] == dict.fromkeys(TOYS, 25)
    assert "100 of 600 held-out questions are asked" in some.notes[1]
    assert some.search.fingerprint == every.search.fingerprint
    assert every.heldout is not None
    assert some.heldout is not None
    for name in TOYS:
        less, more = ({q.index for q in each._questions[name]} for each in (some.heldout, every.heldout))
        assert less < more


def test_a_bench_has_300_questions_unless_told_otherwise() -> None:
    turns = BenchQuestion(0, "a", ("hello",), ("hello",))
    bench = Bench("mine", tuple([turns] * 6000))

    def sizes(**settings: Any) -> tuple[int, int]:
        split = split_bench(MtBenchConfig(**MODELS, bench_name="mine", **settings), bench, judge="rouge_l")
        return len(split.search), len(split.heldout)

    assert sizes() == (300, 1000)
    assert sizes(question_limit="all", heldout_limit="all") == (4200, 1800)
    assert sizes(question_limit=20, heldout_limit=30) == (20, 30)


def test_studies_of_earlier_versions_go_on() -> None:
    config = JglueConfig(**MODELS, jglue_tasks="a,b", jglue_limit="100,50")
    identity = config.identity()
    assert identity["jglue_limit"] == [100, 50]
    assert not {"pruner", "heldout_limit"} & identity.keys()
    assert JglueConfig(**MODELS, jglue_tasks="a,b", jglue_limit="all").identity()["jglue_limit"] == [None, None]
    assert JglueConfig(**MODELS, jglue_tasks="a,b").identity()["jglue_limit"] not in (None, [None, None])
    assert JglueConfig(**MODELS, jglue_tasks="a,b", pruner="halving").identity()["pruner"] == "halving"
    for limit, known in ((None, None), ("all", None), (80, 80)):
        bench = MtBenchConfig(**MODELS, bench_name="toy", question_limit=limit)
        assert bench.identity()["question_limit"] == known


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jglue_limit": "5,many"}, "--jglue_limit must be whole numbers or all, separated by commas, got '5,many'"),
        ({"jglue_limit": "all,all,all"}, "--jglue_limit must be one number or one for each of the 2 tasks, got 3"),
        ({"num_fewshot": "all"}, "--num_fewshot must be whole numbers, separated by commas"),
        ({"heldout_limit": 0}, "--heldout_limit must be at least 1, got 0"),
        ({"heldout_limit": "most"}, "--heldout_limit must be a whole number or all, got 'most'"),
    ],
)
def test_limits_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JglueConfig(**{**MODELS, "jglue_tasks": "a,b", **settings})
    with pytest.raises(ConfigError, match="--question_limit must be a whole number or all, got 'most'"):
        MtBenchConfig(**MODELS, bench_name="toy", question_limit="most")
