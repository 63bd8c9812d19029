"""Metrics as numbers of questions, against lm-eval's own aggregations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.registry import AGGREGATION_REGISTRY

from tvmerge.errors import TaskError
from tvmerge.evaluators import QuestionScore, TaskGoal, mean_score, score_range, task_shares
from tvmerge.evaluators.measure import Measure, choose_measure
from tvmerge.samplers import Recommendation

LIKELIHOODS = st.floats(-50, -0.001)


def measure(aggregation: str | Callable[..., Any]) -> Measure:
    aggregate = AGGREGATION_REGISTRY[aggregation] if isinstance(aggregation, str) else aggregation
    return Measure("t", aggregation if isinstance(aggregation, str) else "own", "none", True, aggregate)


def shown(aggregation: str, items: list[Any]) -> float:
    values = [value for value in measure(aggregation).values(items) if value is not None]
    assert len(values) == len(items)
    return measure(aggregation).goal(weight=1).shown(math.fsum(values) / len(values))


@given(st.lists(LIKELIHOODS, min_size=1, max_size=20))
def test_a_perplexity_is_that_of_lm_eval(items: list[float]) -> None:
    assert shown("perplexity", items) == pytest.approx(AGGREGATION_REGISTRY["perplexity"](items))


@given(st.lists(st.tuples(LIKELIHOODS, st.integers(1, 99)), min_size=1, max_size=20))
@pytest.mark.parametrize("name", ["weighted_perplexity", "bits_per_byte"])
def test_long_texts_count_more_as_in_lm_eval(name: str, items: list[tuple[float, int]]) -> None:
    assert shown(name, items) == pytest.approx(AGGREGATION_REGISTRY[name](items))


@given(st.lists(st.tuples(st.integers(0, 2), st.tuples(*[st.floats(0, 1)] * 3)), min_size=1, max_size=20))
def test_a_brier_score_is_a_mean_over_questions(items: list[tuple[int, tuple[float, float, float]]]) -> None:
    assert shown("brier_score", items) == pytest.approx(float(AGGREGATION_REGISTRY["brier_score"](items)))


def test_what_is_no_finite_number_is_unscored() -> None:
    assert measure("mean").values([1, True, None, math.nan, 0.5]) == [1.0, 1.0, None, None, 0.5]
    assert measure("perplexity").values([-math.inf, -1.0]) == [None, 1.0]
    assert measure("weighted_perplexity").values([(-2.0, 1), None, (math.nan, 3)]) == [1.0, None, None]


def test_a_metric_over_all_questions_at_once_is_refused() -> None:
    def best(items: list[float]) -> float:
        return max(items)

    def fails(items: list[float]) -> float:
        return items[1]

    for aggregate in (best, fails, lambda items: 1 / 0, lambda items: "good"):
        with pytest.raises(TaskError, match="task t: its metric own is computed over all questions at once"):
            measure(aggregate).check([0.0, 1.0, None])
    with pytest.raises(TaskError, match="over all questions at once"):
        measure(fails).values([0.0, 1.0])
    percent = measure(lambda items: sum(items) / len(items) / 100)
    percent.check([50, None, 100])
    assert percent.values([50, None, 100]) == [0.5, None, 1.0]


class Task:
    """What choose_measure asks of a task of lm-eval."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self._filters = [type("Filter", (), {"name": name})() for name in ("strict", "loose")]

    def aggregation(self) -> dict[str, Any]:
        known = {"ppl": "perplexity", "f1": "f1", "mcc": "matthews_corrcoef"}
        return {name: AGGREGATION_REGISTRY[known.get(name, "mean")] for name in self._names}

    def higher_is_better(self) -> dict[str, bool]:
        return {name: None if name == "own" else name != "ppl" for name in self._names}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("names", "wanted", "metric", "higher"),
    [
        (["acc_norm", "acc"], None, "acc,strict", True),
        (["f1", "exact_match"], None, "exact_match,strict", True),
        (["mcc", "ppl", "bits"], None, "ppl,strict", False),
        (["acc", "acc_norm"], "acc_norm", "acc_norm,strict", True),
        (["acc", "exact_match"], "exact_match,loose", "exact_match,loose", True),
    ],
)
def test_the_metric_that_is_chosen(names: list[str], wanted: str | None, metric: str, higher: bool) -> None:
    goal = choose_measure("t", Task(*names), wanted).goal(weight=2)
    assert goal == TaskGoal(metric, higher, 2, logarithmic="ppl" in metric)


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["acc"], "f2", "task t: has no metric 'f2', its metrics are acc, its filters strict, loose"),
        (["acc"], "acc,wide", "has no metric 'acc,wide'"),
        (["acc", "mcc"], "mcc", "its metric mcc is computed over all questions at once.*--task_metric t=METRIC"),
        (["mcc"], None, "has no metric that gives each question a score, only mcc"),
        ([], None, "only no metric at all"),
        (["own"], None, "does not say whether a higher own is better: add higher_is_better"),
    ],
)
def test_a_metric_that_cannot_be_is_refused(names: list[str], wanted: str | None, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        choose_measure("t", Task(*names), wanted)


def test_a_negative_weight_turns_the_direction_around() -> None:
    assert measure("mean").goal(weight=-2) == TaskGoal("mean,none", higher_is_better=False, weight=2)
    assert choose_measure("t", Task("ppl")).goal(weight=-1).higher_is_better


def test_weights_and_directions_make_the_score() -> None:
    goals = {
        "a": TaskGoal(weight=3),
        "b": TaskGoal(weight=1, higher_is_better=False),
        "c": TaskGoal(weight=0),
    }
    scores = [QuestionScore("a", 0, 1.0), QuestionScore("b", 0, 2.0), QuestionScore("c", 0, None)]
    assert task_shares("abc", goals) == {"a": 0.75, "b": -0.25, "c": 0.0}
    assert mean_score(scores, goals) == 0.75 - 0.5
    assert mean_score([QuestionScore("a", 0, None), *scores[1:]], goals) is None
    assert mean_score(scores[2:], goals) is None, "no task counts"


def test_the_range_of_a_score_has_the_worst_and_the_best_of_each_task() -> None:
    scores = [QuestionScore("a", n, score) for n, score in enumerate((0.0, 1.0, None))]
    scores += [QuestionScore("b", n, score) for n, score in enumerate((2.0, 4.0))]
    scores += [QuestionScore("shown only", 0, 99.0)]
    goals = {"a": TaskGoal(weight=3), "b": TaskGoal(higher_is_better=False), "shown only": TaskGoal(weight=0)}
    assert score_range(scores, goals) == (0.75 * 0 - 0.25 * 4, 0.75 * 1 - 0.25 * 2)
    assert score_range([]) is None


def test_a_prediction_keeps_within_what_can_be() -> None:
    told = Recommendation({"a": 1.0}, "surface", 1.01, (0.94, 1.08)).within(0.0, 1.0)
    assert told == Recommendation({"a": 1.0}, "surface", 1.0, (0.94, 1.0))
    # A surface may be wrong altogether; the ends of an interval keep their order.
    assert Recommendation({}, "surface", 1.5, (1.2, 1.8)).within(0.0, 1.0).interval == (1.0, 1.0)
    assert Recommendation({}, "surface", -1.5, (-1.8, -1.2)).within(0.0, 1.0).interval == (0.0, 0.0)
    assert Recommendation({}, "best observed", None, None).within(0.0, 1.0).score is None


def test_a_perplexity_beyond_all_numbers_is_shown_as_infinite() -> None:
    assert TaskGoal(logarithmic=True).shown(1e6) == math.inf
