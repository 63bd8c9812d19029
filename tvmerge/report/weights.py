"""Pictures of weights: a heat map, and lines over the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tvmerge.report.grid import Grid, make_grid, points, scored_trials, searched_names
from tvmerge.report.style import COLOURS, Drawn, heading, new_figure, shorten
from tvmerge.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["columns_of", "weight_lines", "weight_map"]

Floats = npt.NDArray[np.float64]

#: Of so many points lines are drawn, the first of them with a band; of so many of the best trials faint ones.
LINES, FAINT = 2, 8
COLOURS_OF_LINES = (COLOURS["best"][0], COLOURS["second"][0])
#: More parts of a figure, and more labels beside it or below it, cannot be read.
MAX_PARTS, MAX_ROWS, MAX_COLUMNS = 12, 48, 40


def weight_map(results: Results) -> Drawn | None:
    """The weights of the model that matters most, as a grid of colours."""
    names, _ = searched_names(results)
    shown = points(results)
    if len(names) < 2 or not shown:
        return None
    grid = make_grid(names)
    labels = _row_labels(grid)
    count = len(shown) if len(grid.rows) <= 3 else 1
    kept = dict(list(shown.items())[:count])
    values = np.concatenate([grid.fill(weights) for weights in kept.values()])
    rows = [
        " · ".join(part for part in (name if count > 1 else "", label) if part) for name in kept for label in labels
    ]
    if len(values) == 1:
        rows = [next(iter(kept))]
    figure = new_figure(min(0.9 + 0.21 * max(len(values), 3) + _depth(grid), 10.0))
    axes = figure.add_subplot()
    low, high = _range(values)
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axes.grid(visible=False)
    columns_of(axes, grid)
    _rows(axes, rows, grid if count == 1 else None)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("weight")
    for spine in (*axes.spines.values(), *bar.ax.spines.values()):
        spine.set_visible(False)
    which = " and ".join(f"the {name} point" for name in kept)
    said = f"Weights of {which}, from {np.nanmin(values):.2f} to {np.nanmax(values):.2f}."
    return Drawn(figure, f"{said} 0 is the target itself, 1 the whole task vector.")


def _range(values: Floats) -> tuple[float, float]:
    """The ends of the colours: at least from 0 to 1, so that nearly equal weights look alike."""
    return min(float(np.nanmin(values)), 0.0), max(float(np.nanmax(values)), 1.0)


def _row_labels(grid: Grid) -> list[str]:
    return [" · ".join(part for part in (shorten(group, 22), shorten(kind, 26)) if part) for group, kind in grid.rows]


def _depth(grid: Grid) -> float:
    """Inches that the longest label below the grid takes."""
    names = [shorten(label, 20) for label, layer in zip(grid.columns, grid.layers, strict=True) if not layer]
    return 0.065 * max(map(len, names), default=2)


def columns_of(axes: Axes, grid: Grid, *, room: int = MAX_COLUMNS) -> None:
    """Numbers of layers, as many as there is room for; names of all else, upright."""
    step = math.ceil(len(grid.columns) / room)
    if any("-" in label for label, layer in zip(grid.columns, grid.layers, strict=True) if layer):
        step = math.ceil(2 * len(grid.columns) / room)
    first = grid.layers.index(True) if any(grid.layers) else 0
    kept = [n for n, layer in enumerate(grid.layers) if not layer or (n - first) % step == 0]
    if not any(grid.layers):
        kept = kept[:: math.ceil(len(kept) / room)]
    axes.set_xticks(kept, [shorten(grid.columns[n], 20) for n in kept])
    for n, label in zip(kept, axes.get_xticklabels(), strict=True):
        if not grid.layers[n]:
            # At its end, wherever the letters of a browser's font begin.
            label.set(rotation=90, rotation_mode="anchor", ha="right", va="center")
    if any(grid.layers):
        axes.set_xlabel("layer")


def _rows(axes: Axes, labels: Sequence[str], grid: Grid | None) -> None:
    """Names of the rows; of too many only those at which an expert or task vector begins."""
    kept = list(range(len(labels)))
    starts = [n for n in kept if grid is not None and (not n or grid.rows[n][0] != grid.rows[n - 1][0])]
    if len(kept) > MAX_ROWS and grid is not None:
        kept = starts[:: math.ceil(len(starts) / MAX_ROWS)]
        labels = [shorten(group, 28) for group, _ in grid.rows]
    axes.set_yticks(kept, [labels[n] for n in kept])
    axes.tick_params(axis="both", length=0)
    for n in starts[1:]:
        axes.axhline(n - 0.5, color=COLOURS["paper"][0], linewidth=1.5)


def weight_lines(results: Results) -> Drawn | None:
    """Weights over the layers, a part for each expert and task vector."""
    names, gates = searched_names(results)
    shown = dict(list(points(results).items())[:LINES])
    if not names or not shown:
        return None
    if len(names) == 1:
        return _score_by_weight(results, names[0])
    grid = make_grid(names)
    scored = sorted(scored_trials(results), key=lambda trial: (-(trial.score or 0.0), trial.number))
    faint = [trial.weights for trial in scored if not trial.is_given][1 : 1 + FAINT]
    groups = [(group, [n for n, row in enumerate(grid.rows) if row[0] == group]) for group in grid.groups]
    drawn = groups[: MAX_PARTS - bool(gates)]
    n_parts = len(drawn) + bool(gates)
    across = 1 if n_parts <= 2 else 2
    down = math.ceil(n_parts / across)
    figure = new_figure((1.9 if n_parts > 1 else 2.6) * down + _depth(grid) + 0.5)
    parts = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (group, rows) in zip(parts, drawn, strict=False):
        _lines(axes, grid, rows, shown, faint, room=MAX_COLUMNS // across)
        heading(axes, shorten(group, 50))
    if gates:
        _lines(parts[len(drawn)], make_grid(gates), [0], shown, faint, room=MAX_COLUMNS // across)
        heading(parts[len(drawn)], "temperature of the router")
    for axes in parts[n_parts:]:
        axes.set_visible(False)
    _label(figure, list(parts[:n_parts]), across, gates=bool(gates))
    return Drawn(figure, _said(grid, shown, faint, len(groups) - len(drawn)))


def _lines(
    axes: Axes,
    grid: Grid,
    rows: Sequence[int],
    shown: Mapping[str, Mapping[str, float]],
    faint: Sequence[Mapping[str, float]],
    *,
    room: int,
) -> None:
    """The mean over the rows of a grid, of some points; of the first with a band from the least to the greatest."""
    x = np.arange(len(grid.columns))
    layers = np.array(grid.layers)
    for n, weights in enumerate(faint):
        label = "other good trials" if not n else f"_{n}"
        _line(
            axes,
            x,
            layers,
            _mean(grid.fill(weights)[rows]),
            colour=COLOURS["faint"][0],
            label=label,
            dots=1.5,
            width=0.8,
        )
    for n, (name, weights) in reversed(list(enumerate(shown.items()))):
        values = grid.fill(weights)[rows]
        if not n and len(rows) > 1:
            filled = np.where(np.isnan(values), _mean(values), values)
            ends, label = (filled.min(axis=0), filled.max(axis=0)), f"{name}: least to greatest"
            axes.fill_between(x, *ends, where=layers, color=COLOURS["band"][0], linewidth=0, label=label)
        _line(axes, x, layers, _mean(values), colour=COLOURS_OF_LINES[n], label=name, dots=3.0)
    axes.set_xlim(-0.5, len(grid.columns) - 0.5)  # that of all parts, whichever weights they have
    columns_of(axes, grid, room=room)


def _line(
    axes: Axes,
    x: npt.NDArray[np.int64],
    layers: npt.NDArray[np.bool_],
    values: Floats,
    *,
    colour: str,
    label: str,
    dots: float,
    width: float = 1.4,
) -> None:
    """Layers are joined by a line; embeddings, head and all else are dots."""
    axes.plot(x, np.where(layers, values, math.nan), color=colour, marker="o", ms=dots, linewidth=width, label=label)
    axes.plot(
        x, np.where(layers, math.nan, values), color=colour, marker="o", ms=dots + 1, linewidth=0, label="_outside"
    )


def _mean(values: Floats) -> Floats:
    known = ~np.isnan(values)
    mean: Floats = np.where(known, values, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), math.nan)
    return mean


def _label(figure: Figure, parts: Sequence[Axes], across: int, *, gates: bool) -> None:
    """What parts have in common: their axes and legend. The last is of temperatures, which are no weights."""
    weights = parts[: len(parts) - gates]
    ends = [axes.get_ylim() for axes in weights]
    for n, axes in enumerate(parts):
        if axes in weights:
            axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        if n % across == 0:
            axes.set_ylabel("weight" if axes in weights else "temperature")
        if n + across < len(weights):
            axes.set_xlabel("")
            axes.tick_params(axis="x", labelbottom=False)
    handles, labels = parts[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _said(grid: Grid, shown: Mapping[str, Mapping[str, float]], faint: Sequence[object], left_out: int) -> str:
    whose = "the mean over all kinds of tensors" if len(grid.kinds) > 1 else "each weight"
    said = f"{whose[0].upper()}{whose[1:]}, of {' and '.join(f'the {name} point' for name in shown)}"
    said += f", and of the {len(faint)} next best trials, faint." if faint else "."
    return said + (f" {left_out} more experts or task vectors are in the heat map only." if left_out else "")


def _score_by_weight(results: Results, name: str) -> Drawn | None:
    """The score at each weight, where there is but one."""
    scored = scored_trials(results)
    if not scored:
        return None
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    weights, scores = [trial.weights[name] for trial in scored], [trial.score or 0.0 for trial in scored]
    axes.scatter(weights, scores, s=16, color=COLOURS["trial"][0], linewidths=0, label="trials")
    for (label, weight), colour in zip(points(results).items(), COLOURS_OF_LINES, strict=False):
        axes.axvline(weight[name], color=colour, label=f"{label} ({weight[name]:.2f})")
    axes.set(xlabel="weight of the task vector", ylabel="score on the questions of the search")
    figure.legend(loc="outside lower center", ncols=4)
    return Drawn(figure, "One weight for all tensors, and the score at each that was tried.")
