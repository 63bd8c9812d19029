"""Baselines and gains, against closed forms."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmerge.evaluators import QuestionScore, TaskGoal
from tvmerge.search import paired_gain, uniform_weights


def scored(**tasks: list[float | None]) -> list[QuestionScore]:
    return [QuestionScore(task, i, value) for task, values in tasks.items() for i, value in enumerate(values)]


def test_target_and_whole_task_vector_are_always_scored_first() -> None:
    assert uniform_weights(weight_min=0, weight_max=2) == [0, 1, 0.5, 1.5, 0.75, 0.25, 1.25]
    assert uniform_weights(weight_min=0.3, weight_max=0.6) == [0, 1, 0.5]
    assert uniform_weights(weight_min=3, weight_max=4) == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=50))
def test_gain_on_one_task_is_the_paired_t_statistic(pairs: list[tuple[int, int]]) -> None:
    differences = [float(a - b) for a, b in pairs]
    gain = paired_gain(scored(t=[float(a) for a, _ in pairs]), scored(t=[float(b) for _, b in pairs]))
    assert gain is not None
    assert gain.mean == pytest.approx(statistics.fmean(differences))
    assert gain.standard_error == pytest.approx(statistics.stdev(differences) / math.sqrt(len(pairs)))


def test_tasks_count_alike_whatever_their_size() -> None:
    model, reference = scored(a=[1.0] * 100, b=[0.0, 1.0]), scored(a=[0.0] * 100, b=[0.0, 0.0])
    gain = paired_gain(model, reference)
    assert gain is not None
    assert gain.mean == pytest.approx((1 + 0.5) / 2)
    # Var(mean of b's differences 0 and 1) = 0.5 / 2 = 0.25; two tasks: sqrt(0 + 0.25) / 2.
    assert gain.standard_error == pytest.approx(0.25)
    assert gain.is_clear


def test_the_same_model_has_no_gain() -> None:
    gain = paired_gain(scored(a=[0.0, 1.0]), scored(a=[0.0, 1.0]))
    assert gain is not None
    assert (gain.mean, gain.standard_error, gain.is_clear) == (0.0, 0.0, False)


def test_questions_that_one_model_has_no_score_for_are_not_compared() -> None:
    gain = paired_gain(scored(a=[1.0, None, 1.0]), scored(a=[0.0, 0.0, None]))
    assert gain is not None
    assert gain.mean == 1.0
    assert gain.standard_error == math.inf
    assert not gain.is_clear
    assert paired_gain(scored(a=[None]), scored(a=[1.0])) is None
    assert paired_gain(scored(a=[1.0], b=[None]), scored(a=[1.0], b=[1.0])) is None


def test_weights_and_directions_make_the_gain() -> None:
    goals = {"a": TaskGoal(weight=3), "b": TaskGoal(weight=1, higher_is_better=False), "c": TaskGoal(weight=0)}
    model = scored(a=[1.0, 0.0], b=[1.0, 4.0], c=[None])
    reference = scored(a=[0.0, 0.0], b=[2.0, 3.0], c=[1.0])
    gain = paired_gain(model, reference, goals)
    assert gain is not None
    # Differences 1, 0 of a, and -1, 1 of b, whose share is -1/4; their means have variances 1/4 and 1.
    assert gain.mean == pytest.approx(0.75 * 0.5 - 0.25 * 0.0)
    assert gain.standard_error == pytest.approx(math.sqrt(0.75**2 * 0.25 + 0.25**2 * 1.0))
    assert paired_gain(scored(a=[None, None], b=[1.0, 4.0]), reference, goals) is None
    lower = paired_gain(scored(a=[0.0, 0.0], b=[1.0, 1.0], c=[1.0]), reference, goals)
    assert lower is not None
    assert lower.mean == pytest.approx(0.25 * 1.5), "less of what is minimised is a gain"


def test_turns_of_a_question_count_as_one() -> None:
    """Clustered standard errors: the formula of arXiv:2411.00640 written out, and resampling of questions."""
    generator = random.Random(0)
    model, reference = [], []
    for question in range(60):
        shared = generator.gauss(0.3, 1)
        for turn in (1, 2):
            model.append(QuestionScore("chat", question, shared + generator.gauss(0, 0.2), turn))
            reference.append(QuestionScore("chat", question, 0.0, turn))
    gain = paired_gain(model, reference)
    assert gain is not None
    values = [[s.score or 0.0 for s in model if s.question == question] for question in range(60)]
    mean = sum(map(sum, values)) / 120
    clustered = math.sqrt(sum(sum(v - mean for v in each) ** 2 for each in values)) / 120 * math.sqrt(60 / 59)
    assert gain.mean == pytest.approx(mean)
    assert gain.standard_error == pytest.approx(clustered)
    resampled = [sum(sum(generator.choice(values)) for _ in range(60)) / 120 for _ in range(4000)]
    assert gain.standard_error == pytest.approx(statistics.stdev(resampled), rel=0.05)
    naive = statistics.stdev([v for each in values for v in each]) / math.sqrt(120)
    assert gain.standard_error > 1.3 * naive
