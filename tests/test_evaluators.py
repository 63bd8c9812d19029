"""lm-eval in process: the same per-question values as lm-eval's own `evaluate`, trial after trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lm_eval
import pytest
import torch
from conftest import TASKS, Trio
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import TaskError
from tvmerge.evaluators import QuestionScore, mean_score, task_scores
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.split import split_questions
from tvmerge.evaluators.tasks import load_tasks
from tvmerge.hub import resolve
from tvmerge.models.transformers import TransformersModel

NAMES = ["tiny_choice", "tiny_extract"]
METRIC = {"tiny_choice": "acc", "tiny_extract": "exact_match"}


def live(folder: Path) -> TransformersModel:
    return TransformersModel.from_folder(folder, checkpoint=Checkpoint(resolve(str(folder))), device="cpu")


def lm_eval_scores(model: TransformersModel, questions: dict[str, list[int]]) -> list[QuestionScore]:
    """The reference: lm-eval builds, runs and scores everything itself."""
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=8),
        tasks=list(questions),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        samples=questions,
        bootstrap_iters=0,
    )
    return [
        QuestionScore(task=name, question=sample["doc_id"], score=sample[METRIC[name]])
        for name in questions
        for sample in results["samples"][name]
    ]


@pytest.mark.filterwarnings("ignore")
def test_scores_equal_lm_eval_for_every_question_and_follow_the_weights(trio: Trio) -> None:
    model = live(trio.target)
    questions = {"tiny_choice": [1, 4, *range(5, 60, 2)], "tiny_extract": [0, 3, 7, 39]}
    evaluator = LmEvalEvaluator(
        tasks=load_tasks(NAMES, task_dir=TASKS),
        questions=questions,
    )
    harness = HarnessModel(model, batch_size=8)
    assert evaluator.n_questions == 34
    seen = []
    for folder in (trio.target, trio.tuned, trio.base, trio.target):
        model.load(Checkpoint(resolve(str(folder))))
        progress: list[int] = []
        scores = evaluator.score(harness, progress.append).scores
        assert sum(progress) == evaluator.n_questions
        assert scores == lm_eval_scores(model, questions)
        seen.append(scores)
    assert seen[0] == seen[3], "the first trial's weights give the first trial's scores"
    assert seen[0] != seen[1], "a stale answer was scored again"


def test_a_model_that_copies_is_right_and_one_that_does_not_is_wrong(trio: Trio) -> None:
    # With all weights zero every token is equally likely: the shortest choice wins, and no answer is ever extracted.
    model = live(trio.target)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.zero_()
    evaluator = LmEvalEvaluator(
        tasks=load_tasks(NAMES, task_dir=TASKS),
        questions={"tiny_choice": list(range(60)), "tiny_extract": list(range(40))},
    )
    scores = evaluator.score(HarnessModel(model, batch_size=16), lambda _: None).scores
    assert task_scores(scores) == {"tiny_choice": pytest.approx(1 / 3), "tiny_extract": 0.0}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["tiny_choice", "tiny_choise"],
            "unknown tasks: tiny_choise .is tiny_choice meant.*in .*tasks are .*jnli, .*tiny_choice, tiny_extract",
        ),
    ],
)
def test_tasks_that_cannot_be_used_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_tasks(names, task_dir=TASKS)


def test_a_broken_task_file_is_refused_in_one_line(tmp_path: Path) -> None:
    text = (TASKS / "tiny_choice.yaml").read_text().replace("tiny_utils.load_choice", "tiny_utils.no_such_function")
    (tmp_path / "tiny_choice.yaml").write_text(text)
    (tmp_path / "tiny_utils.py").write_text((TASKS / "tiny_utils.py").read_text())
    with pytest.raises(TaskError, match="tiny_choice") as caught:
        load_tasks(["tiny_choice"], task_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_question_that_cannot_be_put_is_said_in_one_line(tmp_path: Path) -> None:
    text = (
        (TASKS / "tiny_choice.yaml")
        .read_text()
        .replace("{{question}}", "{{question if label != 2 else question.no.such}}")
    )
    (tmp_path / "tiny_choice.yaml").write_text(text)
    (tmp_path / "tiny_utils.py").write_text((TASKS / "tiny_utils.py").read_text())
    tasks = load_tasks(["tiny_choice"], task_dir=tmp_path)
    with pytest.raises(TaskError, match="task tiny_choice: a question cannot be put: UndefinedError") as caught:
        LmEvalEvaluator(tasks=tasks, questions={"tiny_choice": [0, 2]})
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_all_that_is_asked(tmp_path: Path) -> None:
    def fingerprint(folder: Path, questions: list[int]) -> str:
        return LmEvalEvaluator(
            tasks=load_tasks(["tiny_choice"], task_dir=folder), questions={"tiny_choice": questions}
        ).fingerprint

    assert fingerprint(TASKS, [1, 2]) == fingerprint(TASKS, [1, 2])
    assert fingerprint(TASKS, [1, 2]) != fingerprint(TASKS, [1, 3])
    text = (TASKS / "tiny_choice.yaml").read_text().replace("{{question}}", "{{question}} ")
    (tmp_path / "tiny_choice.yaml").write_text(text)
    (tmp_path / "tiny_utils.py").write_text((TASKS / "tiny_utils.py").read_text())
    assert fingerprint(TASKS, [1, 2]) != fingerprint(tmp_path, [1, 2])


def test_a_task_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no such folder"):
        load_tasks(NAMES, task_dir=tmp_path / "nowhere")


@given(
    n=st.integers(2, 300),
    holdout=st.floats(0, 0.9),
    limit=st.one_of(st.none(), st.integers(1, 400)),
    seed=st.integers(0, 99),
)
def test_the_search_never_sees_a_held_out_question(n: int, holdout: float, limit: int | None, seed: int) -> None:
    def split(limit: int | None) -> tuple[Sequence[int], Sequence[int]]:
        s = split_questions(name="t", n_questions=n, holdout=holdout, limit=limit, seed=seed)
        return s.search, s.heldout

    try:
        search, heldout = split(limit)
    except TaskError:
        assert round(holdout * n) in (0, n)
        return
    assert not set(search) & set(heldout)
    assert len(heldout) == round(holdout * n)
    assert len(search) == min(n - len(heldout), limit or n)
    assert set(search) | set(heldout) <= set(range(n))
    assert (search, heldout) == split(limit)
    more_search, same_heldout = split(None)
    assert same_heldout == heldout, "the limit changed the held-out questions"
    assert set(search) <= set(more_search)


@given(labels=st.lists(st.sampled_from("abc"), min_size=20, max_size=200), limit=st.integers(1, 200))
def test_labels_keep_their_shares_whatever_the_limit(labels: list[str], limit: int) -> None:
    split = split_questions(name="t", n_questions=len(labels), holdout=0.3, limit=limit, seed=0, labels=labels)
    for part in (split.search, split.heldout):
        for label in "abc":
            share = labels.count(label) / len(labels)
            # A stretch of the order holds each label as often as its share says, but for one at either end.
            assert abs(sum(labels[i] == label for i in part) - share * len(part)) <= 2


def test_a_shuffled_subset_is_taken_and_not_the_first_questions() -> None:
    labels = ["a"] * 50 + ["b"] * 50
    parts = [
        split_questions(name="t", n_questions=100, holdout=0, limit=20, seed=seed, labels=labels).search
        for seed in (0, 0, 1)
    ]
    assert parts[0] == parts[1] != parts[2]
    assert max(parts[0]) > 50


def test_split_is_golden() -> None:
    # Held to the digit: another split would silently mix questions into a study that is resumed.
    split = split_questions(name="jnli", n_questions=10, holdout=0.3, limit=4, seed=0)
    assert (split.search, split.heldout) == ([1, 6, 7, 8], [0, 3, 9])
    split = split_questions(name="jnli", n_questions=9, holdout=0.3, limit=3, seed=0, labels="aaabbbccc")
    assert (split.search, split.heldout) == ([1, 4, 6], [0, 3, 8])


def test_unscored_is_not_zero() -> None:
    scores = [QuestionScore("a", 0, 1.0), QuestionScore("a", 1, None), QuestionScore("b", 0, 0.5)]
    assert task_scores(scores) == {"a": 1.0, "b": 0.5}
    assert mean_score(scores) == 0.75
    assert mean_score([*scores, QuestionScore("c", 0, None)]) is None
    assert mean_score([]) is None
