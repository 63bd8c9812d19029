"""The pictures of a report: what they show is what the results say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_results import TASKS, make_results, pareto_results, weight_names
from scipy.stats import binomtest

from tvmerge.evaluators import QuestionScore, TaskGoal
from tvmerge.report.candidates import spread, wilson
from tvmerge.report.contributions import STEP, effects
from tvmerge.report.grid import make_grid, points
from tvmerge.report.pictures import PICTURES, draw_pictures
from tvmerge.report.style import drawing, japanese_font, shorten, to_png, to_svg
from tvmerge.results import Results
from tvmerge.samplers.weight_prior import correlation

PREFIXES = ([""], ["expert1/", "expert2/"], ["math/", "日本語/"], ["expert1/a/", "expert1/b/", "expert2/a/"])


@pytest.mark.parametrize("prefixes", PREFIXES[::3], ids=["one", "both"])
@pytest.mark.parametrize("granularity", ["layer", "block:4", "parameter", "all", "uniform"])
def test_every_granularity_has_its_pictures(granularity: str, prefixes: list[str]) -> None:
    results = make_results(weight_names(granularity, layers=6, prefixes=prefixes), n=30, questions=12)
    figures = {name: each.figure for name, each in draw_pictures(results).items() if each.figure is not None}
    expected = set(PICTURES) - {"pareto_front"}
    if granularity == "uniform" and len(prefixes) == 1:
        expected -= {"weight_map", "contributions"}
    assert set(figures) == expected
    assert list(figures) == [name for name in PICTURES if name in expected]
    figure = figures["weights_by_layer"]
    assert to_png(figure).startswith(b"\x89PNG")
    assert to_svg(figure, name="w", title="<", description="&").startswith("<svg ")


@pytest.mark.parametrize("prefixes", PREFIXES, ids=["one", "experts", "vectors", "both"])
@pytest.mark.parametrize("granularity", ["layer", "block:4", "parameter", "all", "uniform"])
def test_every_weight_has_a_cell_of_its_own(granularity: str, prefixes: list[str]) -> None:
    names = weight_names(granularity, layers=6, prefixes=prefixes)
    grid = make_grid(names)
    filled = grid.fill({name: float(n) for n, name in enumerate(names)})
    assert sorted(filled[~np.isnan(filled)].tolist()) == list(range(len(names)))
    for n, (row, column) in enumerate(grid.places):
        assert filled[row, column] == n


def test_grid_has_layers_across_and_what_is_outside_at_its_ends() -> None:
    grid = make_grid(weight_names("all", layers=12, prefixes=["expert1/x/", "expert2/x/"]))
    assert grid.columns == ["embed_tokens", *map(str, range(12)), "lm_head", "norm"]
    assert grid.layers == [False, *[True] * 12, False, False]
    assert grid.groups == ["expert1 · x", "expert2 · x"]
    assert [kind for _, kind in grid.rows[:10]] == [*sorted(grid.kinds[:9]), "outside the layers"]
    assert make_grid(weight_names("block:5", layers=12)).columns[1:4] == ["0-4", "5-9", "10-11"]
    assert make_grid(["a/uniform", "b/uniform"]).columns == ["a", "b"]
    stacks = make_grid(["encoder.layers.0", "encoder.layers.1", "decoder.layers.0"])
    assert [kind for _, kind in stacks.rows] == ["encoder.layers", "decoder.layers"]


def axes_of(results: Results, name: str) -> list[Any]:
    with drawing():
        drawn = PICTURES[name].draw(results)
    assert drawn is not None
    assert drawn.figure is not None
    return list(drawn.figure.axes)


def test_heat_map_and_lines_show_the_weights() -> None:
    names = weight_names("layer", layers=6)
    results = make_results(names, n=30)
    assert results.recommendation is not None
    point = results.recommendation.point
    order = ["embed_tokens", *(f"layers.{n}" for n in range(6)), "lm_head", "norm"]
    shown = axes_of(results, "weight_map")[0].images[0].get_array()
    assert shown[0].tolist() == pytest.approx([point[name] for name in order])
    lines = {line.get_label(): line.get_ydata() for line in axes_of(results, "weights_by_layer")[0].lines}
    assert lines["saved (recommended)"][1:7].tolist() == pytest.approx([point[name] for name in order[1:7]])
    best = max(results.trials, key=lambda trial: trial.score or 0.0)
    assert lines["best observed"][1:7].tolist() == pytest.approx([best.weights[name] for name in order[1:7]])


def test_score_by_trial_shows_every_trial_and_the_best_so_far() -> None:
    results = make_results(weight_names("layer", layers=6), n=60)
    (axes,) = axes_of(results, "score_by_trial")
    dots = [tuple(dot) for dot in np.concatenate([each.get_offsets() for each in axes.collections[:2]]).tolist()]
    assert sorted(dots) == [(t.number, t.score) for t in results.trials if t.score is not None]
    best = next(line for line in axes.lines if line.get_label() == "best so far")
    assert best.get_ydata()[-1] == max(t.score for t in results.trials if t.score is not None)
    labels = {text.get_text() for legend in axes.figure.legends for text in legend.get_texts()}
    assert {"pruned (4)", "failed (3)", "predicted, recommended", "given: one weight for all"} <= labels


def test_gains_of_the_picture_are_those_of_the_verdict() -> None:
    results = make_results(weight_names("layer", layers=6), n=20)
    whole = axes_of(results, "score_by_task")[-1]
    (low, _), (high, _) = whole.collections[0].get_segments()[-1]
    mean = whole.collections[1].get_offsets()[-1][0]
    assert f"target: {mean:+.3f}, 95% interval {low:+.3f} to {high:+.3f}" in results.verdict


def test_front_is_of_trials_that_none_is_better_than() -> None:
    results = pareto_results()
    (axes,) = axes_of(results, "pareto_front")
    drawn = {tuple(each) for each in axes.lines[0].get_xydata().tolist()}
    dots = [(t.tasks[TASKS[0]] or 0.0, float(np.exp(t.tasks[TASKS[1]] or 0.0))) for t in results.trials if t.tasks]
    front = {one for one in dots if not any(x >= one[0] and y <= one[1] and (x, y) != one for x, y in dots)}
    assert np.array(sorted(drawn)) == pytest.approx(np.array(sorted(front)))
    assert "lower is better" in axes.get_ylabel()


def test_temperatures_are_no_weights() -> None:
    names = [*weight_names("layer", layers=4, prefixes=["expert1/"]), *(f"gate/layers.{n}" for n in range(4))]
    results = replace(make_results(names, n=30), settings={"search_gate": True})
    assert axes_of(results, "weight_map")[0].images[0].get_array().shape == (2, 7)
    titles = [axes.get_title(loc="left") for axes in axes_of(results, "weights_by_layer")]
    assert titles == ["expert1", "temperature of the router"]
    assert axes_of(replace(results, settings={}), "weight_map")[0].images[0].get_array().shape == (4, 7)


def test_a_layer_is_at_one_place_in_all_parts() -> None:
    names = weight_names("layer", layers=4, prefixes=["expert1/", "expert2/"])
    names = [name for name in names if not name.startswith("expert2/") or "layers" in name]
    parts = axes_of(make_results(names, n=30), "weights_by_layer")
    assert [axes.get_title(loc="left") for axes in parts] == ["expert1", "expert2"]
    assert len({axes.get_xlim() for axes in parts}) == 1


def test_saved_recommended_and_best_observed_are_named_once() -> None:
    results = make_results(weight_names("layer", layers=4), n=20)
    assert list(points(results)) == ["saved (recommended)", "best observed"]
    assert list(points(replace(results, chosen=3))) == ["saved (best observed)", "recommended"]
    assert list(points(replace(results, chosen=None, recommendation=None))) == ["best observed"]


def test_what_a_group_does_is_found_if_trials_tell_it() -> None:
    generator = np.random.default_rng(0)
    names = weight_names("layer", layers=6)
    x = np.clip(1 + 0.3 * generator.normal(size=(200, len(names))), 0, 2)
    x[:7] = np.array([[0.0], [1.0], [0.5], [1.5], [0.75], [0.25], [1.25]])
    slopes = np.zeros(len(names))
    slopes[[1, 4]] = 0.2, -0.2
    scores = 0.7 - 0.1 * (x.mean(axis=1) - 1) ** 2 + (x - x.mean(axis=1, keepdims=True)) @ slopes
    found = effects(x, scores + 0.01 * generator.normal(size=200), names, np.eye(len(names)))
    assert found.mean.tolist() == pytest.approx((STEP * slopes).tolist(), abs=0.003)
    clear = np.abs(found.mean) > found.half
    assert clear[[1, 4]].all()
    assert found.n_clear <= 3


def test_intervals_of_effects_hold_the_truth_as_often_as_they_say() -> None:
    """Truths drawn from the prior, at 12 to 40 trials: 95% of the intervals hold them, and no fewer than 90%."""
    generator = np.random.default_rng(1)
    names = weight_names("layer", layers=8)
    d = len(names)
    root = np.linalg.cholesky(correlation(names))
    held = []
    for run in range(60):
        n = 12 + run % 29
        x = np.clip(1 + 0.4 * generator.normal(size=(n, d)), 0, 2)
        slopes = 0.05 * root @ generator.normal(size=d)
        scores = x @ slopes + 0.035 * generator.normal(size=n)
        found = effects(x, scores, names, np.eye(d))
        truth = STEP * (slopes - slopes.mean())
        held.append(np.mean(np.abs(found.mean - truth) <= found.half))
    assert 0.9 <= np.mean(held) <= 1.0


def test_effects_of_nothing_are_not_clear() -> None:
    generator = np.random.default_rng(2)
    names = weight_names("layer", layers=8)
    clear = 0
    for _ in range(20):
        x = np.clip(1 + 0.4 * generator.normal(size=(30, len(names))), 0, 2)
        clear += effects(x, 0.7 + 0.03 * generator.normal(size=30), names, np.eye(len(names))).n_clear
    assert clear / (20 * len(names)) < 0.05


def test_too_few_trials_or_too_many_weights_are_said() -> None:
    few = draw_pictures(make_results(weight_names("layer"), n=12))["contributions"]
    assert few.figure is None
    assert "cannot tell" in few.caption
    many = make_results([f"layers.{n}.{k}" for n in range(67) for k in range(30)], n=9)
    assert "not computed" in draw_pictures(many)["contributions"].caption


@given(st.integers(0, 60), st.integers(0, 60))
def test_interval_of_a_share_is_wilsons(right: int, wrong: int) -> None:
    scores = [QuestionScore("t", n, float(n < right)) for n in range(right + wrong)]
    found = wilson(scores)
    if not scores:
        assert found is None
        return
    other = binomtest(right, right + wrong).proportion_ci(method="wilson")
    assert found == pytest.approx((other.low, other.high), abs=1e-6)


def test_interval_of_what_is_no_share_is_another() -> None:
    assert wilson([QuestionScore("t", 0, 0.5)]) is None
    assert wilson([QuestionScore("t", 0, 1.0), QuestionScore("t", 0, 1.0, turn=2)]) is None


@given(st.lists(st.floats(0, 1), max_size=12))
def test_labels_are_never_over_each_other(heights: list[float]) -> None:
    moved = spread(sorted(heights), gap=0.055)
    assert all(upper - lower >= 0.0549 for lower, upper in pairwise(moved))
    assert not moved or moved[-1] <= 1


@given(st.text(), st.integers(3, 40))
def test_a_shortened_label_fits(text: str, width: int) -> None:
    short = shorten(text, width)
    assert len(short) <= width
    assert short.isprintable()
    assert shorten("日本語" * 20, 11) == "日本…本語", "of ten columns, as eleven would cut a letter in two"


def test_unscored_models_and_perplexities_are_drawn() -> None:
    results = make_results(weight_names("layer", layers=3), n=12, tasks=["ppl", "jnli"])
    nothing = replace(results.candidates[1], scores=[replace(s, score=None) for s in results.candidates[1].scores])
    goals = {"ppl": TaskGoal("perplexity,none", higher_is_better=False, logarithmic=True), "jnli": TaskGoal(weight=0)}
    candidates = [results.candidates[0], nothing, *results.candidates[2:]]
    axes = axes_of(replace(results, candidates=candidates, goals=goals), "score_by_task")
    assert [text.get_text() for text in axes[0].texts] == ["unscored"]
    assert "lower is better" in axes[0].get_title(loc="left")
    shown = axes[0].patches[0].get_width()
    scores = [s.score or 0.0 for s in candidates[0].scores if s.task == "ppl"]
    assert shown == pytest.approx(np.exp(np.mean(scores)))


def test_some_font_here_has_japanese_letters() -> None:
    assert japanese_font() is not None
