"""What a run says of its result on a terminal: the score table and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tvmerge.evaluators import Goals, QuestionScore, TaskGoal, mean_score, task_scores, unscored_questions
from tvmerge.results import Candidate
from tvmerge.search import Gain, paired_gain

__all__ = ["named_rows", "score_table", "verdict"]


def score_table(
    candidates: Sequence[Candidate],
    goals: Goals | None = None,
    categories: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A Markdown table, aligned for a terminal: a row for each task and one for the score, a column for each model.

    Args:
        candidates: models scored on the same questions, in the order of their columns.
        goals: how the scores of tasks make that of a model.
        categories: task → the category of each of its questions; such a task has a row for each of them.
    """
    goals = goals or {}
    by_task = [task_scores(named_rows(candidate.scores, categories or {})) for candidate in candidates]
    counts = {task: 0 for task in by_task[0]}
    for task, _ in {(s.task, s.question) for s in named_rows(candidates[0].scores, categories or {})}:
        counts[task] += 1
    rows = [["task", "questions", *(candidate.label for candidate in candidates)]]
    for task, n in counts.items():
        goal = goals.get(task, TaskGoal())
        rows.append(
            [_label(task, goal).replace("|", r"\|"), str(n), *(_shown(scores[task], goal) for scores in by_task)]
        )
    means = [_number(mean_score(candidate.scores, goals)) for candidate in candidates]
    alike = len({(goal.weight, goal.higher_is_better, goal.logarithmic) for goal in goals.values()}) <= 1
    is_mean = alike and all(goal.higher_is_better for goal in goals.values())
    rows.append(["**mean**" if is_mean else "**score**", str(sum(counts.values())), *means])
    unscored = [unscored_questions(candidate.scores) for candidate in candidates]
    if any(n for n, _ in unscored):
        rows.append(["unscored", "", *(f"{n / of:.1%}" for n, of in unscored)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_row(row, widths) for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    return "\n".join(lines)


def named_rows(scores: Sequence[QuestionScore], categories: Mapping[str, Sequence[str]]) -> list[QuestionScore]:
    """Scores, named by what their rows are called."""
    return [replace(s, task=categories[s.task][s.question]) if s.task in categories else s for s in scores]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    padded[0] = cells[0].ljust(widths[0])
    return "| " + " | ".join(padded) + " |"


def _label(task: str, goal: TaskGoal) -> str:
    """A task, with what the reader could not guess of its goal."""
    metric = goal.metric.removesuffix(",none")
    parts = [metric] if metric not in ("acc", "exact_match") or not goal.higher_is_better else []
    parts += ["lower is better"] if not goal.higher_is_better else []
    parts += [f"weight {goal.weight:g}"] if goal.weight != 1 else []
    return f"{task} ({', '.join(parts)})" if parts else task


def _shown(mean: float | None, goal: TaskGoal) -> str:
    return _number(None if mean is None else goal.shown(mean))


def _number(score: float | None) -> str:
    return "unscored" if score is None else f"{score:.3f}"


def verdict(best: Candidate, references: Sequence[Candidate], *, heldout: bool, goals: Goals | None = None) -> str:
    """In words: is the best merge better than each of the other models, on the questions of the table?

    The first sentence says so if it is not clearly better than the target, or than one of several.

    Args:
        best: the model that the run recommends.
        references: the models it is compared with. Targets are those that say so; if none does, the first is.
        heldout: whether the search never saw these questions.
        goals: how the scores of tasks make that of a model.
    """
    gains = [(reference, paired_gain(best.scores, reference.scores, goals)) for reference in references]
    lines = []
    for reference, gain in gains:
        if gain is None:
            lines.append(
                f"{best.label} cannot be compared with {reference.label}: a task has no question scored for both"
            )
            continue
        relation, word = _comparison(gain)
        numbers = f"{gain.mean:+.3f}, 95% interval {_end(gain.low)} to {_end(gain.high)}"
        lines.append(f"{best.label} is {relation} {reference.label}: {numbers}: {word}")
    where = "questions that the search did not see" if heldout else "the very questions that were searched on"
    said = f"On {where}:\n" + "\n".join(f"- {line}" for line in lines)
    targets = [each for each in gains if each[0].is_target] or gains[:1]
    missed = [target.label for target, gain in targets if gain is None or not gain.is_clear or gain.mean < 0]
    if missed:
        said = f"Nothing was found that is clearly better than {' or '.join(missed)}.\n\n{said}"
    return said


def _comparison(gain: Gain) -> tuple[str, str]:
    if not gain.is_clear:
        return "not clearly different from", "no clear gain"
    return ("clearly better than", "a gain") if gain.mean > 0 else ("clearly worse than", "a loss")


def _end(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "unknown"
