"""The table and the verdict, to the letter."""

from __future__ import annotations

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
    assert "best is clearly better than target: +0.333" in verdict(BEST, [TARGET], heldout=True, goals=goals)


def test_verdict_says_what_was_found_and_on_which_questions() -> None:
    assert verdict(BEST, [TARGET, NOTHING, BEST], heldout=True) == (
        "On questions that the search did not see:\n"
        "- best is clearly better than target: +0.625 ± 0.125 (standard error)\n"
        "- best cannot be compared with tuned: a task has no question scored for both\n"
        "- best is not clearly different from best: +0.000 ± 0.000 (standard error)"
    )
    text = verdict(TARGET, [BEST], heldout=False)
    assert "very questions that were searched on" in text
    assert "target is clearly worse than best: -0.625" in text


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
