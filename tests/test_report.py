"""The table and the verdict, to the letter."""

from __future__ import annotations

from dataclasses import replace

from tvmerge.evaluators import QuestionScore, TaskGoal
from tvmerge.report.tables import score_table, verdict
from tvmerge.results import Candidate


def candidate(label: str, a: list[float | None], b: list[float]) -> Candidate:
    scores = [QuestionScore(task, i, v) for task, values in (("jnli", a), ("jsquad", b)) for i, v in enumerate(values)]
    return Candidate(label=label, scores=scores)


TARGET = candidate("target", [1.0, 0.0, 0.0, 0.0], [0.5, 0.0])
BEST = candidate("best", [1.0, 1.0, 1.0, 1.0], [1.0, 0.5])
NOTHING = candidate("tuned", [None, None, None, None], [0.0, 0.0])


def test_table_is_golden() -> None:
    assert score_table([TARGET, NOTHING, BEST]) == (
        "| task     | questions | target |    tuned |  best |\n"
        "|----------|----------:|-------:|---------:|------:|\n"
        "| jnli     |         4 |  0.250 | unscored | 1.000 |\n"
        "| jsquad   |         2 |  0.250 |    0.000 | 0.750 |\n"
        "| **mean** |         6 |  0.250 | unscored | 0.875 |\n"
        "| unscored |           |   0.0% |    66.7% |  0.0% |"
    )


def test_table_with_goals_is_golden() -> None:
    goals = {"jnli": TaskGoal("acc_norm,none", weight=2), "jsquad": TaskGoal("perplexity,x", False, 1, True)}
    assert score_table([TARGET, BEST], goals) == (
        "| task                                   | questions | target |  best |\n"
        "|----------------------------------------|----------:|-------:|------:|\n"
        "| jnli (acc_norm, weight 2)              |         4 |  0.250 | 1.000 |\n"
        "| jsquad (perplexity,x, lower is better) |         2 |  1.284 | 2.117 |\n"
        "| **score**                              |         6 |  0.083 | 0.417 |"
    )
    assert "best is not clearly different from target: +0.333, 95% interval +0.000 to +0.500" in verdict(
        BEST, [TARGET], heldout=True, goals=goals
    )


def test_verdict_says_what_was_found_and_on_which_questions() -> None:
    half, zero, one = (candidate(label, [v] * 40, [v] * 10) for label, v in (("half", 0.5), ("zero", 0.0), ("1", 1.0)))
    mixed = candidate("mixed", [0.0, 1.0] * 20, [0.0, 1.0] * 5)
    assert verdict(half, [zero, NOTHING, one, mixed, half], heldout=True) == (
        "On questions that the search did not see:\n"
        "- half is clearly better than zero: +0.500, 95% interval +0.500 to +0.500: a gain\n"
        "- half cannot be compared with tuned: a task has no question scored for both\n"
        "- half is clearly worse than 1: -0.500, 95% interval -0.500 to -0.500: a loss\n"
        "- half is not clearly different from mixed: +0.000, 95% interval -0.175 to +0.175: no clear gain\n"
        "- half is not clearly different from half: +0.000, 95% interval +0.000 to +0.000: no clear gain"
    )
    assert "very questions that were searched on" in verdict(half, [zero], heldout=False)


def test_verdict_begins_with_the_target_that_nothing_beats() -> None:
    zero, one = candidate("zero", [0.0] * 9, [0.0] * 9), candidate("one", [1.0] * 9, [1.0] * 9)
    assert verdict(zero, [one], heldout=True).startswith("Nothing was found that is clearly better than one.\n\nOn ")
    assert verdict(zero, [NOTHING], heldout=True).startswith("Nothing was found that is clearly better than tuned.\n\n")
    assert verdict(one, [zero, one], heldout=True).startswith("On questions")
    targets = [replace(zero, is_target=True, label="target 1"), replace(one, is_target=True, label="target 2"), one]
    assert verdict(one, targets, heldout=True).startswith("Nothing was found that is clearly better than target 2.\n")


def test_verdict_of_one_question_knows_no_interval() -> None:
    one, zero = Candidate("best", [QuestionScore("a", 0, 1.0)]), Candidate("target", [QuestionScore("a", 0, 0.0)])
    assert "target: +1.000, 95% interval unknown to unknown: no clear gain" in verdict(one, [zero], heldout=True)


def test_a_task_of_categories_has_a_row_for_each_and_counts_questions_not_turns() -> None:
    scores = [QuestionScore("chat", question, float(question + turn), turn) for question in (0, 2) for turn in (1, 2)]
    table = score_table([Candidate("target", scores)], {"chat": TaskGoal("rating")}, {"chat": ["a", "b", "c"]})
    assert table == (
        "| task     | questions | target |\n"
        "|----------|----------:|-------:|\n"
        "| a        |         1 |  1.500 |\n"
        "| c        |         1 |  3.500 |\n"
        "| **mean** |         2 |  2.500 |"
    )
