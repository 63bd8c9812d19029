"""Baselines and gains, against closed forms."""

from __future__ import annotations

import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from tvmerge.evaluators import QuestionScore, TaskGoal
from tvmerge.search import paired_gain, score_interval, uniform_weights


def scored(**tasks: Sequence[float | None]) -> list[QuestionScore]:
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
    assert (gain.mean, gain.standard_error, gain.low, gain.high, gain.is_clear) == (0.0, 0.0, 0.0, 0.0, False)


def test_questions_that_one_model_has_no_score_for_are_not_compared() -> None:
    gain = paired_gain(scored(a=[1.0, None, 1.0]), scored(a=[0.0, 0.0, None]))
    assert gain is not None
    assert gain.mean == 1.0
    assert (gain.standard_error, gain.low, gain.high) == (math.inf, -math.inf, math.inf)
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


def test_interval_is_the_percentile_bootstrap_of_scipy() -> None:
    generator = np.random.default_rng(3)
    for differences in (generator.normal(0.1, 1.0, 40), generator.choice([-1.0, 0.0, 1.0], 200, p=[0.1, 0.6, 0.3])):
        gain = paired_gain(scored(t=differences.tolist()), scored(t=[0.0] * len(differences)))
        assert gain is not None
        other = bootstrap((differences,), np.mean, method="percentile", n_resamples=20_000, rng=generator)
        error = 0.03 * gain.standard_error * 1.96
        assert gain.low == pytest.approx(other.confidence_interval.low, abs=3 * error)
        assert gain.high == pytest.approx(other.confidence_interval.high, abs=3 * error)


def test_interval_of_many_questions_is_the_normal_one() -> None:
    generator = np.random.default_rng(4)
    goals = {"a": TaskGoal(weight=3), "b": TaskGoal(higher_is_better=False)}
    model = scored(a=generator.normal(0.2, 1, 3000).tolist(), b=generator.normal(0, 3, 1500).tolist())
    gain = paired_gain(model, [QuestionScore(s.task, s.question, 0.0) for s in model], goals)
    assert gain is not None
    assert gain.low == pytest.approx(gain.mean - 1.96 * gain.standard_error, abs=0.06 * gain.standard_error)
    assert gain.high == pytest.approx(gain.mean + 1.96 * gain.standard_error, abs=0.06 * gain.standard_error)


def test_interval_draws_questions_and_not_turns() -> None:
    generator = random.Random(5)
    model = [QuestionScore("chat", q, generator.gauss(0.0, 1), 1) for q in range(300)]
    twice = [*model, *(replace(s, turn=2) for s in model)]
    once, doubled = (
        paired_gain(scores, [replace(s, score=0.0) for s in scores]) for scores in (model, list(reversed(twice)))
    )
    assert once is not None
    assert doubled is not None
    assert (doubled.low, doubled.high) == pytest.approx((once.low, once.high)), "and their order changes nothing"


def test_questions_of_unequal_length_have_the_interval_of_their_ratio() -> None:
    generator = np.random.default_rng(6)
    values = {q: generator.normal(q % 3, 1, 1 + q % 4) for q in range(80)}
    model = [QuestionScore("t", q, float(v), n) for q, of in values.items() for n, v in enumerate(of)]
    gain = paired_gain(model, [replace(s, score=0.0) for s in model])
    assert gain is not None
    means = []
    for _ in range(4000):
        drawn = np.concatenate([values[int(q)] for q in generator.integers(80, size=80)])
        means.append(drawn.mean())
    assert (gain.low, gain.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 300 studies of 60 questions 95% ± 1.3% do, and of models that are the same at most 5% are called different."""
    generator = np.random.default_rng(7)
    held, clear = 0, 0
    for _ in range(300):
        for p, truth in (([0.1, 0.5, 0.4], 0.3), ([0.2, 0.6, 0.2], 0.0)):
            model = scored(**{task: generator.choice([-1.0, 0.0, 1.0], 30, p=p).tolist() for task in "ab"})
            gain = paired_gain(model, [replace(s, score=0.0) for s in model])
            assert gain is not None
            held += bool(truth) and gain.low <= truth <= gain.high
            clear += not truth and gain.is_clear
    assert 0.91 <= held / 300 <= 0.985
    assert clear / 300 <= 0.085


def test_a_handful_of_questions_is_no_gain() -> None:
    """Five that all say the same have p = 0.0625 by their signs, six 0.031."""
    for n, is_clear in ((1, False), (5, False), (6, True)):
        model = scored(t=[1.0] * n + [0.0] * 4)
        gain = paired_gain(model, scored(t=[0.0] * (n + 4)))
        assert gain is not None
        assert gain.is_clear is is_clear
        assert gain.low <= gain.mean <= gain.high
    loss = paired_gain(scored(t=[0.0] * 5), scored(t=[1.0] * 5))
    assert loss is not None
    assert (loss.low, loss.high) == (-1.0, 0.0)


def test_every_process_draws_the_same_interval() -> None:
    code = (
        "from tvmerge.evaluators import QuestionScore as Q\n"
        "from tvmerge.search import paired_gain\n"
        "model, zero = ([Q(t, i, float(i % 3 - s) * (1 - s)) for t in 'ba' for i in range(50)] for s in (0, 1))\n"
        "print(paired_gain(model, zero))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": s},
        ).stdout
        for s in "12"
    }
    assert len(printed) == 1
    assert "low=" in printed.pop()


def test_interval_of_a_score() -> None:
    scores = scored(a=[1.0] * 50 + [0.0] * 50, b=[0.5] * 10)
    low, high = score_interval(scores) or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.5 - 0.05 * 0.98, 0.5 + 0.05 * 0.98), abs=0.006)
    assert score_interval(scored(a=[None])) is None
    assert score_interval(scored(a=[1.0])) == (-math.inf, math.inf)
