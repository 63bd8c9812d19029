"""Multiple choice scored at once, against lm-eval's own scoring of one question after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import TASKS
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from tvmerge.evaluators.choices import NotPlainError, PlainChoices, is_plain_choice
from tvmerge.evaluators.measure import Measure, choose_measure
from tvmerge.evaluators.tasks import load_tasks

TASK: Any = load_tasks(["tiny_choice"], task_dir=TASKS)["tiny_choice"].task
#: Few values, so that many are equal.
LIKELIHOODS = st.sampled_from([-3.0, -2.0, -1.5, -1.0, -0.5, -float("inf")])
TEXTS = st.text("ab東京", min_size=1, max_size=4)


class Fake(ConfigurableTask):  # type: ignore[misc]  # lm_eval ships no types
    """lm-eval's own scoring, over questions that are given."""

    def __init__(self, metric: str, *, several: bool) -> None:
        self._config = TASK.config
        self._metric_fn_list = {metric: None}
        self.multiple_input, self.multiple_target = 0, int(several)
        self.OUTPUT_TYPE = "multiple_choice"

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        return doc["choices"]

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        return doc["gold"]


@st.composite
def questions(draw: st.DrawFn, several: bool) -> dict[str, Any]:
    choices = draw(st.lists(TEXTS, min_size=1, max_size=5, unique=True))
    index = st.integers(0, len(choices))
    right = st.integers(0, len(choices) - 1)  # lm-eval fails on a number of numpy that is none of them
    one = st.booleans() | index | right.map(np.int32) | right.map(np.int64) | st.sampled_from([*choices, "no choice"])
    gold = draw(st.lists(index, max_size=3) if several else one)
    likelihoods = draw(st.lists(LIKELIHOODS, min_size=len(choices), max_size=len(choices)))
    return {"choices": choices, "gold": gold, "likelihoods": likelihoods}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("metric", ["acc", "acc_norm", "acc_bytes"])
@given(data=st.data())
def test_every_question_scores_as_in_lm_eval(metric: str, several: bool, data: st.DataObject) -> None:
    docs = data.draw(st.lists(questions(several), min_size=1, max_size=6))
    task = Fake(metric, several=several)
    expected = [task.process_results(doc, [(ll, False) for ll in doc["likelihoods"]])[metric] for doc in docs]
    measure = Measure("t", metric, "none", True, np.mean)
    flat = np.array([ll for doc in docs for ll in doc["likelihoods"]])
    assert PlainChoices(task, measure, docs).scores(flat) == expected


def test_a_question_with_nan_is_unscored_and_no_other() -> None:
    docs = [{"choices": ["a", "b"], "gold": 1, "likelihoods": []}] * 3
    choices = PlainChoices(Fake("acc", several=False), Measure("t", "acc", "none", True, np.mean), docs)
    assert choices.scores(np.array([-1.0, np.nan, -2.0, -1.0, -1.0, -2.0])) == [None, 1.0, 0.0]


def test_questions_without_a_right_choice_are_counted() -> None:
    docs = [{"choices": ["a", "b"], "gold": gold} for gold in (1, 2, -1, "c", "b")]
    choices = PlainChoices(Fake("acc", several=False), Measure("t", "acc", "none", True, np.mean), docs)
    assert choices.n_without_answer == 3


def test_a_question_without_choices_is_left_to_lm_eval() -> None:
    docs = [{"choices": ["a"], "gold": 0}, {"choices": [], "gold": 0}]
    with pytest.raises(NotPlainError):
        PlainChoices(Fake("acc", several=False), Measure("t", "acc", "none", True, np.mean), docs)


@pytest.mark.parametrize(("gold", "several"), [(None, False), ([0], False), (1.0, False), (0, True), (["a"], True)])
def test_targets_of_another_kind_are_left_to_lm_eval(gold: Any, several: bool) -> None:
    docs = [{"choices": ["a", "b"], "gold": gold}]
    with pytest.raises(NotPlainError):
        PlainChoices(Fake("acc", several=several), Measure("t", "acc", "none", True, np.mean), docs)


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"process_results": len}, False),
        ({"filter_list": [{"name": "x", "filter": [{"function": "take_first"}]}]}, False),
        ({"repeats": 2}, False),
    ],
)
def test_what_has_a_scoring_of_its_own_is_left_to_it(
    change: dict[str, Any], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in change.items():
        monkeypatch.setattr(TASK.config, key, value)
    assert is_plain_choice(TASK, choose_measure("t", TASK)) is plain
    assert not is_plain_choice(TASK, Measure("t", "brier_score", "none", False, mean))
    assert not is_plain_choice(TASK, Measure("t", "acc", "none", True, max)), "an aggregation of its own"
