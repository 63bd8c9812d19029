"""Granularity: which tensors share one weight, and what that weight is called.

A weight's name is what people read in the dashboard and in a recipe: `layers.3`, `embed_tokens`, `q_proj`. It is
made from the tensor names alone, so that no architecture is hard-coded and every process finds the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["GRANULARITIES", "group_tensors", "natural_key"]

Path = tuple[str, ...]


def group_tensors(names: Iterable[str], granularity: str) -> dict[str, str]:
    """Map every tensor name to the name of its weight.

    Args:
        names: tensor names of one model, in any order.
        granularity: a key of GRANULARITIES: `all` gives every tensor its own weight, `layer` one to each transformer
            layer and to each module outside of the layers, `parameter` one to each kind of module over all layers.

    Returns:
        Tensor name → weight name, ordered by weight name (numbers by value), then by tensor name.

    Raises:
        KeyError: an unknown granularity.
    """
    groups = GRANULARITIES[granularity](sorted(names))
    return dict(sorted(groups.items(), key=lambda item: (natural_key(item[1]), natural_key(item[0]))))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts `layers.10` behind `layers.9`."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _by_tensor(names: Sequence[str]) -> dict[str, str]:
    layers = _by_layer(names)
    groups = {}
    for name in names:
        key = _layer_path(name)
        inner = _without_suffix(name, ("weight",))[len(key) :]
        groups[name] = ".".join((layers[name], *inner))
    return groups


def _by_layer(names: Sequence[str]) -> dict[str, str]:
    keys = {name: _layer_path(name) for name in names}
    labels = _shortest_labels({_stem(key) for key in keys.values()})
    return {name: ".".join((labels[_stem(key)], *key[len(_stem(key)) :])) for name, key in keys.items()}


def _by_parameter(names: Sequence[str]) -> dict[str, str]:
    kinds = {name: _without_numbers(_without_suffix(name, ("weight", "bias"))) for name in names}
    labels = _shortest_labels(set(kinds.values()))
    return {name: labels[kind] for name, kind in kinds.items()}


#: Name → grouping of sorted tensor names.
GRANULARITIES: Mapping[str, Callable[[Sequence[str]], dict[str, str]]] = {
    "all": _by_tensor,
    "layer": _by_layer,
    "parameter": _by_parameter,
}


def _layer_path(name: str) -> Path:
    """The path up to and including the first number: the layer. Outside of the layers, the module's path."""
    parts = tuple(name.split("."))
    for i, part in enumerate(parts):
        if part.isdecimal() and i > 0:
            return parts[: i + 1]
    return _without_suffix(name, ("weight", "bias"))


def _stem(path: Path) -> Path:
    return path[:-1] if path[-1].isdecimal() and len(path) > 1 else path


def _without_suffix(name: str, suffixes: tuple[str, ...]) -> Path:
    parts = tuple(name.split("."))
    return parts[:-1] if parts[-1] in suffixes and len(parts) > 1 else parts


def _without_numbers(path: Path) -> Path:
    return tuple(part for part in path if not part.isdecimal()) or path


def _shortest_labels(paths: Iterable[Path]) -> dict[Path, str]:
    """For each path its shortest ending that is the ending of no other path, joined by dots; else the whole path."""
    known = sorted(set(paths))
    endings: dict[Path, int] = {}
    for path in known:
        for start in range(len(path)):
            endings[path[start:]] = endings.get(path[start:], 0) + 1
    labels = {}
    for path in known:
        unique = (path[start:] for start in reversed(range(len(path))) if endings[path[start:]] == 1)
        labels[path] = ".".join(next(unique, path))
    return labels
