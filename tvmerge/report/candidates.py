"""Pictures of the models of the table: their scores by task, and what the search promised against what is held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tvmerge.evaluators import Goals, QuestionScore, TaskGoal, mean_score, task_scores
from tvmerge.report.style import COLOURS, Drawn, heading, intervals, new_figure, shorten
from tvmerge.report.tables import named_rows
from tvmerge.results import Candidate, Results
from tvmerge.search import Gain, paired_gain, score_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heldout_scatter", "score_by_task"]

#: More tasks than that are in the table only.
MAX_TASKS = 10
#: Of a normal distribution's middle 95%.
Z95 = 1.959964


def score_by_task(results: Results) -> Drawn | None:
    """The scores of all models, by task, with 95% intervals, and their gains over the target."""
    candidates = results.candidates
    if not candidates:
        return None
    scores = [named_rows(each.scores, results.categories) for each in candidates]
    tasks = list(task_scores(scores[0]))
    drawn: list[str | None] = [*tasks[:MAX_TASKS], *([None] if len(tasks) > 1 else [])]
    target = next((n for n, each in enumerate(candidates) if each.is_target), 0)
    height = 0.45 + 0.17 * len(candidates)
    figure = new_figure(height * len(drawn) + 0.5)
    parts = figure.subplots(len(drawn), 2, squeeze=False, width_ratios=[3, 2])
    for (left, right), task in zip(parts, drawn, strict=True):
        goals = results.goals if task is None else {task: replace(results.goals.get(task, TaskGoal()), weight=1.0)}
        # Questions of categories count alike in the whole, whatever the size of their category.
        whole = [each.scores for each in candidates]
        of_task = whole if task is None else [[s for s in each if s.task == task] for each in scores]
        # A task that has no weight has no part in the whole, but its own score.
        _bars(left, of_task, goals, results, task=task)
        _gains(right, of_task, goals, results, target)
        heading(left, "score" if task is None else _title(task, goals[task]))
    heading(parts[0][1], f"gain over {shorten(candidates[target].label)}")
    left_out = len(tasks) - len(tasks[:MAX_TASKS])
    more = f" {left_out} more tasks are in the table only." if left_out else ""
    where = "questions that the search did not see" if results.heldout else "the very questions that were searched on"
    return Drawn(
        figure,
        f"Means over {where}, and gains, paired over questions, each with its 95% interval. Gains in colour have an "
        f"interval without 0; right is better.{more}",
    )


def _title(task: str, goal: TaskGoal) -> str:
    return shorten(task, 40) + ("" if goal.higher_is_better else " (lower is better)")


def _bars(
    axes: Axes, scores: Sequence[Sequence[QuestionScore]], goals: Goals, results: Results, *, task: str | None
) -> None:
    goal = goals.get(task or "", TaskGoal())
    # The score of a model has a sign for each task; the mean of a task is shown as its metric is.
    plain = goals if task is None else {task: TaskGoal()}
    for n, each in enumerate(scores):
        mean, ends = mean_score(each, plain), wilson(each) if task is not None else None
        ends = ends or score_interval(each, plain)
        if mean is None or ends is None:
            axes.text(0.01, n, "unscored", va="center", color=COLOURS["muted"][0], transform=axes.get_yaxis_transform())
            continue
        value, low, high = (mean, *ends) if task is None else map(goal.shown, (mean, *ends))
        axes.barh([n], [value], height=0.72, color=COLOURS["best" if n == results.chosen else "band"][0])
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [n, n], color=COLOURS["ink"][0], linewidth=1.1)
    axes.set_yticks(range(len(scores)), [shorten(each.label, 26) for each in results.candidates])
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=6)


def wilson(scores: Sequence[QuestionScore]) -> tuple[float, float] | None:
    """The 95% interval of a share, which has a width also where all questions were right.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22.

    Returns:
        None if the scores are not one 0 or 1 for each question.
    """
    known = [each.score for each in scores if each.score is not None]
    if not known or set(known) - {0.0, 1.0} or len({(s.task, s.question) for s in scores}) < len(scores):
        return None
    n, p, z = len(known), math.fsum(known) / len(known), Z95
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


def _gains(axes: Axes, scores: Sequence[Sequence[QuestionScore]], goals: Goals, results: Results, target: int) -> None:
    axes.axvline(0, color=COLOURS["muted"][0], linewidth=0.8)
    gains = [(n, paired_gain(each, scores[target], goals)) for n, each in enumerate(scores) if n != target]
    known = [(n, gain) for n, gain in gains if gain is not None and math.isfinite(gain.low)]
    ends = [(gain.low, gain.high) for _, gain in known]
    intervals(axes, [n for n, _ in known], [gain.mean for _, gain in known], ends, [_colour(gain) for _, gain in known])
    axes.set_yticks(range(len(scores)), [""] * len(scores))
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)


def _colour(gain: Gain) -> str:
    return COLOURS["other" if not gain.is_clear else "best" if gain.mean > 0 else "failed"][0]


def heldout_scatter(results: Results) -> Drawn | None:
    """The score that the search saw against the one on questions that it did not see."""
    rows = [(n, each) for n, each in enumerate(results.candidates) if each.search] if results.heldout else []
    known = [(n, each, _with_interval(each.search, results), _with_interval(each.scores, results)) for n, each in rows]
    drawn = [(n, each, x, y) for n, each, x, y in known if x is not None and y is not None]
    if not drawn:
        return None
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    for n, _, (x, *across), (y, *up) in drawn:
        colour = COLOURS["best" if n == results.chosen else "trial"][0]
        axes.plot(across, [y, y], color=colour, linewidth=0.8)
        axes.plot([x, x], up, color=colour, linewidth=0.8)
        axes.plot([x], [y], "o", color=colour, ms=5)
    ends = [end for _, _, x, y in drawn for end in (*x, *y)]
    axes.axline((min(ends), min(ends)), slope=1, color=COLOURS["other"][0], linewidth=0.8, linestyle=(0, (4, 3)))
    _names(axes, [(each, x[0], y[0]) for _, each, x, y in drawn])
    axes.set(xlabel="score on the questions of the search", ylabel="score on held-out questions")
    return Drawn(
        figure,
        "Below the dashed line a model does worse on questions that the search did not see. Crosses are 95% intervals. "
        "Of models that the search chose the score that it saw is too high on average, of the others it is not.",
    )


def _with_interval(scores: Sequence[QuestionScore], results: Results) -> tuple[float, float, float] | None:
    mean, ends = mean_score(scores, results.goals), score_interval(scores, results.goals)
    return None if mean is None or ends is None or not math.isfinite(ends[0]) else (mean, *ends)


def _names(axes: Axes, dots: Sequence[tuple[Candidate, float, float]]) -> None:
    """Labels in a column right of the picture, in the order of their dots and never over each other."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    ordered = sorted(dots, key=lambda dot: dot[2])
    heights = spread([(y - low) / (high - low) for _, _, y in ordered], gap=0.055)
    for (candidate, x, y), height in zip(ordered, heights, strict=True):
        axes.annotate(
            shorten(candidate.label, 26),
            (x, y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            arrowprops={"arrowstyle": "-", "color": COLOURS["grid"][0], "shrinkB": 4, "linewidth": 0.7},
            zorder=1,  # below the crosses
            fontsize=7.5,
        )


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Ascending heights within 0 to 1, moved by one pass up and one down until they are a gap apart."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap if moved else 0.0))
    top = 1.0
    for n in reversed(range(len(moved))):
        moved[n] = min(moved[n], top)
        top = moved[n] - gap
    return moved
