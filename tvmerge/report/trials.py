"""Pictures of trials: their scores, what they took, and the Pareto front of two tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from tvmerge.evaluators import TaskGoal
from tvmerge.report.grid import best_observed, scored_trials
from tvmerge.report.style import COLOURS, Drawn, heading, new_figure, shorten
from tvmerge.results import Results, TrialRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cost_by_trial", "pareto_front", "score_by_trial"]

BEST, SECOND, TRIAL, OTHER = (COLOURS[name][0] for name in ("best", "second", "trial", "other"))
#: How states without a score are drawn, on the lower edge.
UNSCORED = {"pruned": ("v", COLOURS["pruned"][0]), "failed": ("x", COLOURS["failed"][0])}


def score_by_trial(results: Results) -> Drawn:
    """The score of each trial, and the best so far."""
    scored = scored_trials(results)
    if not scored:
        return Drawn(None, "No trial has a score yet.")
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    given = [trial for trial in scored if trial.is_given]
    searched = [trial for trial in scored if not trial.is_given]
    if given:
        first, last = given[0].number, max(given[-1].number, given[0].number)
        axes.axvspan(first - 0.5, last + 0.5, color=COLOURS["stage"][0], label="given: one weight for all")
    small = 24.0 if len(scored) <= 150 else 6.0
    _dots(axes, given, marker="s", size=small + 4, colour=OTHER, label="_given")
    _dots(axes, searched, marker="o", size=small, colour=TRIAL, label="drawn by the sampler")
    _unscored(axes, results.trials)
    best = list(accumulate((trial.score or 0.0 for trial in scored), max))
    numbers = [trial.number for trial in scored]
    end = max(trial.number for trial in results.trials)
    axes.step([*numbers, end], [*best, best[-1]], where="post", color=SECOND, label="best so far")
    _predicted(axes, results, end)
    axes.set(xlabel="trial", ylabel="score on the questions of the search")
    _whole_numbers(axes)
    figure.legend(loc="outside lower center", ncols=4)
    return Drawn(figure, _said(results, scored))


def _dots(axes: Axes, trials: Sequence[TrialRow], *, marker: str, size: float, colour: str, label: str) -> None:
    if trials:
        numbers, scores = [trial.number for trial in trials], [trial.score or 0.0 for trial in trials]
        axes.scatter(numbers, scores, marker=marker, s=size, color=colour, linewidths=0, label=label, zorder=3)


def _unscored(axes: Axes, trials: Sequence[TrialRow]) -> None:
    """Trials that have no score, on the lower edge."""
    for state, (marker, colour) in UNSCORED.items():
        numbers = [trial.number for trial in trials if trial.state == state]
        if numbers:
            axes.scatter(
                numbers,
                [0.03] * len(numbers),
                marker=marker,
                s=18,
                color=colour,
                linewidths=1.0 if marker == "x" else 0.0,
                transform=axes.get_xaxis_transform(),
                label=f"{state} ({len(numbers)})",
                zorder=4,
            )


def _predicted(axes: Axes, results: Results, end: int) -> None:
    """What the recommended point is believed to score, right of the trials."""
    told = results.recommendation
    if told is None or told.score is None:
        return
    low, high = told.interval or (told.score, told.score)
    at = end + max(1.0, 0.03 * end)
    error = [[told.score - low], [high - told.score]]
    axes.errorbar([at], [told.score], yerr=error, fmt="D", ms=5, capsize=3, color=BEST, label="predicted, recommended")


def _said(results: Results, scored: Sequence[TrialRow]) -> str:
    best, n = best_observed(results), len(scored)
    assert best is not None, "some are scored"
    said = f"{n} scored {_plural('trial', n)}; the best, trial {best.number}, has {best.score:.3f}."
    said += " The best of many noisy scores is a lucky one: what it is worth the held-out questions say."
    told = results.recommendation
    if told is not None and told.score is not None:
        interval = "" if told.interval is None else f", 95% interval {told.interval[0]:.3f} to {told.interval[1]:.3f}"
        said += f" The recommended point (by {told.by}) is predicted to score {told.score:.3f}{interval}."
    return said


def _plural(noun: str, n: int) -> str:
    return noun if n == 1 else f"{noun}s"


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def cost_by_trial(results: Results) -> Drawn | None:
    """Seconds and US dollars by trial, and their sums."""
    known = [trial for trial in results.trials if trial.seconds is not None]
    if not known:
        return None
    paid = [trial for trial in results.trials if trial.cost is not None]
    figure = new_figure(2.4 if not paid else 4.4)
    parts = figure.subplots(2 if paid else 1, 2, squeeze=False)
    total = _spent(parts[0], known, [trial.seconds or 0.0 for trial in known], noun="time")
    said = f"{len(known)} {_plural('trial', len(known))} took {total} in all."
    if paid:
        cost = _spent(parts[1], paid, [trial.cost or 0.0 for trial in paid], noun="cost")
        said += f" The judge took {cost} in all."
    for axes in parts[-1]:
        axes.set_xlabel("trial")
    return Drawn(figure, said)


def _spent(parts: Sequence[Axes], trials: Sequence[TrialRow], each: Sequence[float], *, noun: str) -> str:
    """What each trial took, on the left; their sum, on the right.

    Returns:
        The whole sum, with its unit.
    """
    numbers, sums = [trial.number for trial in trials], list(accumulate(each))
    many = len(trials) > 150
    for axes, values, what in ((parts[0], each, "of each trial"), (parts[1], sums, "in all so far")):
        divisor, unit = _unit(max(values), noun)
        scaled = [value / divisor for value in values]
        if values is sums:
            axes.step([numbers[0], *numbers], [0.0, *scaled], where="post", color=BEST)
        elif many:
            axes.scatter(numbers, scaled, s=5, color=TRIAL, linewidths=0)
        else:
            axes.vlines(numbers, 0.0, scaled, colors=TRIAL, linewidth=max(1.5, min(150 / len(numbers), 8.0)))
        heading(axes, f"{noun} {what}")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0, top=max(scaled) * 1.06 or 1.0)
        _whole_numbers(axes)
    divisor, unit = _unit(sums[-1], noun)
    return f"{sums[-1] / divisor:.3g} {unit}"


def _unit(largest: float, noun: str) -> tuple[float, str]:
    if noun == "cost":
        return 1.0, "US dollars"
    return (3600.0, "hours") if largest >= 7200 else (60.0, "minutes") if largest >= 180 else (1.0, "seconds")


def pareto_front(results: Results) -> Drawn | None:
    """Trials by their scores of the first two tasks, where these were objectives of their own."""
    if results.settings.get("optuna_sampler") != "NSGA-II":
        return None
    trials = [trial for trial in results.trials if trial.state == "complete"]
    tasks = list(dict.fromkeys(task for trial in trials for task in trial.tasks))[:2]
    if len(tasks) < 2:
        return None
    rows = [(trial, [trial.tasks.get(task) for task in tasks]) for trial in trials]
    kept = [(trial, values) for trial, values in rows if None not in values]
    if not kept:
        return None
    goals = [results.goals.get(task, TaskGoal()) for task in tasks]
    scores = np.array([[value for value in values if value is not None] for _, values in kept])
    signed = scores * [1.0 if goal.higher_is_better else -1.0 for goal in goals]
    front = [
        n for n, each in enumerate(signed) if not ((signed >= each).all(axis=1) & (signed > each).any(axis=1)).any()
    ]
    shown = np.array([[goal.shown(value) for goal, value in zip(goals, row, strict=True)] for row in scores.tolist()])
    figure = new_figure(4.4)
    axes = figure.add_subplot()
    axes.scatter(shown[:, 0], shown[:, 1], s=16, color=TRIAL, linewidths=0, label="trials")
    line = sorted(front, key=lambda n: (signed[n, 0], -signed[n, 1]))
    axes.plot(shown[line, 0], shown[line, 1], "o-", color=BEST, ms=5, label="Pareto front")
    previous: list[float] = []
    for n in line:
        if all(abs(shown[n, 0] - x) > 0.03 * max(float(np.ptp(shown[:, 0])), 1e-9) for x in previous):
            axes.annotate(f"{kept[n][0].number}", shown[n], xytext=(4, 4), textcoords="offset points", fontsize=7)
            previous.append(float(shown[n, 0]))
    names = [
        shorten(task) + ("" if goal.higher_is_better else " (lower is better)")
        for task, goal in zip(tasks, goals, strict=True)
    ]
    axes.set(xlabel=names[0], ylabel=names[1])
    figure.legend(loc="outside lower center", ncols=2)
    more = " Other tasks were objectives too and are not seen here." if len(kept[0][0].tasks) > 2 else ""
    said = f"{len(front)} of {len(kept)} trials are such that none is better in both tasks."
    return Drawn(figure, f"{said} Numbers are trials.{more}")
