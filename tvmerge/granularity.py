"""Granularity: which tensors share one weight, and what that weight is called.

A weight's name is what people read in the dashboard and in a recipe: `layers.3`, `embed_tokens`, `q_proj`. It is
made from the tensor names alone, so that no architecture is hard-coded and every process finds the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tvmerge.errors import ConfigError

__all__ = ["GRANULARITIES", "Grouping", "check_granularity", "group_tensors", "natural_key"]

Path = tuple[str, ...]


@dataclass(frozen=True)
class Grouping:
    """Which tensors share one weight, and which get none."""

    granularity: str = "layer"  # a key of GRANULARITIES; `block:k`
    weight_groups: Mapping[str, str] = field(default_factory=dict)  # name → regular expression, found in tensor names
    freeze: Sequence[str] = ()  # regular expressions: tensors that keep the target's value

    def __post_init__(self) -> None:
        """Check what can be checked without tensor names.

        Raises:
            ConfigError: an unknown granularity, or what is no regular expression.
        """
        check_granularity(self.granularity)
        for name, pattern in (*self.weight_groups.items(), *(("freeze", pattern) for pattern in self.freeze)):
            if not name or "/" in name or name == "uniform":
                raise ConfigError(f"weight group {name!r}: a name is not empty, holds no slash and is not 'uniform'")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{name}: {pattern!r} is no regular expression: {error}") from error


def check_granularity(granularity: str) -> None:
    """Refuse what is no key of GRANULARITIES.

    Raises:
        ConfigError: with the known ones.
    """
    name, separator, size = granularity.partition(":")
    if name not in GRANULARITIES or (name == "block") != bool(separator):
        known = ", ".join("block:k" if key == "block" else key for key in GRANULARITIES)
        raise ConfigError(f"unknown granularity {granularity!r}, known are {known}")
    if name == "block" and not (size.isdecimal() and len(size) < 10 and int(size) > 0):
        raise ConfigError(f"granularity {granularity!r}: k of block:k is a number of layers, as in block:4")


def group_tensors(names: Iterable[str], grouping: Grouping) -> dict[str, str]:
    """Map every tensor name that is not frozen to the name of its weight.

    Args:
        names: tensor names of one model, in any order.
        grouping: its granularity gives one weight to all tensors (`uniform`), to each tensor (`all`), to each
            transformer layer and each module outside of the layers (`layer`), to k consecutive layers (`block:k`), or
            to each kind of module over all layers (`parameter`). Each of these is split by the first weight group
            whose expression is found in the name, if any is.

    Returns:
        Tensor name → weight name, ordered by weight name (numbers by value), then by tensor name.

    Raises:
        ConfigError: an expression that is found in no name.
    """
    known = sorted(names)
    kind, _, size = grouping.granularity.partition(":")
    groups = GRANULARITIES[kind](known, int(size or 0))
    found: set[str] = set()
    for name in known:
        group, pattern = next(((g, p) for g, p in grouping.weight_groups.items() if re.search(p, name)), ("", ""))
        if group:
            found.add(pattern)
            groups[name] = group if kind == "uniform" else f"{groups[name]}.{group}"
    frozen = {name for name in known for pattern in grouping.freeze if re.search(pattern, name)}
    idle = [p for p in grouping.freeze if not any(re.search(p, name) for name in known)]
    for pattern in (*(p for p in grouping.weight_groups.values() if p not in found), *idle):
        raise ConfigError(
            f"{pattern!r} is found in no tensor name that is left for it; one is {next(iter(known), None)}"
        )
    kept = ((name, group) for name, group in groups.items() if name not in frozen)
    return dict(sorted(kept, key=lambda item: (natural_key(item[1]), natural_key(item[0]))))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts `layers.10` behind `layers.9`."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _by_tensor(names: Sequence[str], _: int = 0) -> dict[str, str]:
    layers = _by_layer(names)
    groups = {}
    for name in names:
        key = _layer_path(name)
        inner = _without_suffix(name, ("weight",))[len(key) :]
        groups[name] = ".".join((layers[name], *inner))
    return groups


def _by_layer(names: Sequence[str], _: int = 0) -> dict[str, str]:
    keys = {name: _layer_path(name) for name in names}
    labels = _shortest_labels({_stem(key) for key in keys.values()})
    return {name: ".".join((labels[_stem(key)], *key[len(_stem(key)) :])) for name, key in keys.items()}


def _by_parameter(names: Sequence[str], _: int = 0) -> dict[str, str]:
    kinds = {name: _without_numbers(_without_suffix(name, ("weight", "bias"))) for name in names}
    labels = _shortest_labels(set(kinds.values()))
    return {name: labels[kind] for name, kind in kinds.items()}


def _by_block(names: Sequence[str], size: int) -> dict[str, str]:
    groups = _by_layer(names)
    layers = {name: key for name in names if _is_layer(key := _layer_path(name))}
    last: dict[Path, int] = {}
    for key in layers.values():
        last[_stem(key)] = max(int(key[-1]), last.get(_stem(key), 0))
    for name, key in layers.items():
        first = int(key[-1]) // size * size
        end = min(first + size - 1, last[_stem(key)])
        groups[name] = f"{groups[name].rpartition('.')[0]}.{first}" + (f"-{end}" if end > first else "")
    return groups


def _uniformly(names: Sequence[str], _: int = 0) -> dict[str, str]:
    return dict.fromkeys(names, "uniform")


#: Name → grouping of sorted tensor names, given the k of `block:k`.
GRANULARITIES: Mapping[str, Callable[[Sequence[str], int], dict[str, str]]] = {
    "uniform": _uniformly,
    "block": _by_block,
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


def _is_layer(path: Path) -> bool:
    return path[-1].isdecimal() and len(path) > 1


def _stem(path: Path) -> Path:
    return path[:-1] if _is_layer(path) else path


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
