"""All pictures of a report, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvmerge.report.candidates import heldout_scatter, score_by_task
from tvmerge.report.contributions import contributions
from tvmerge.report.style import Drawn, drawing, to_png
from tvmerge.report.trials import cost_by_trial, pareto_front, score_by_trial
from tvmerge.report.weights import weight_lines, weight_map
from tvmerge.results import Results

__all__ = ["PICTURES", "Picture", "draw_pictures", "weights_picture"]


@dataclass(frozen=True)
class Picture:
    """A kind of picture."""

    title: str
    draw: Callable[[Results], Drawn | None]  # None: such a run has none


#: Name, also of the PNG → picture, in the order of the report.
PICTURES: Mapping[str, Picture] = {
    "score_by_task": Picture("Scores by task", score_by_task),
    "score_by_trial": Picture("Score by trial", score_by_trial),
    "weight_map": Picture("Weights", weight_map),
    "weights_by_layer": Picture("Weights by layer", weight_lines),
    "contributions": Picture("What each group contributes", contributions),
    "search_and_heldout": Picture("What the search saw, and what it did not see", heldout_scatter),
    "pareto_front": Picture("Pareto front", pareto_front),
    "cost_by_trial": Picture("Time and cost", cost_by_trial),
}


def draw_pictures(results: Results) -> dict[str, Drawn]:
    """The pictures that a run has so far, some of them only a sentence that says why there is none."""
    with drawing():
        drawn = {name: picture.draw(results) for name, picture in PICTURES.items()}
    return {name: each for name, each in drawn.items() if each is not None}


def weights_picture(results: Results) -> bytes | None:
    """The picture of the weights as a PNG; None if there is none of such weights."""
    with drawing():
        drawn = weight_map(results)
        if drawn is None or drawn.figure is None:
            drawn = weight_lines(results)
        return None if drawn is None or drawn.figure is None else to_png(drawn.figure)
