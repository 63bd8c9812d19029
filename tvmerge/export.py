"""Recipes for other tools: the same sum of models as a configuration that mergekit reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tvmerge.errors import RecipeError
from tvmerge.files import check_new, staged_directory, write_text
from tvmerge.hub import ModelId
from tvmerge.lora import Adapter
from tvmerge.merge import Merge
from tvmerge.rebuild import rebuild
from tvmerge.recipe import Recipe
from tvmerge.sources import MergeSettings, Sources, TunedModel
from tvmerge.state_dict import MERGEABLE_DTYPES
from tvmerge.task_vector import Difference
from tvmerge.vocabulary import Aligned

__all__ = ["EXPORTS", "MERGEKIT_FILE", "export_recipe", "filters", "mergekit_config"]

MERGEKIT_FILE = "mergekit.yaml"
_COMMENT = """\
# The merge of a recipe of tvmerge: target + Σ w·(tuned − base), each model times what its terms add up to.
# Run: mergekit-yaml {file} OUTPUT{flags}
# Numbers are float64 until they are rounded once, to out_dtype.
"""
_LORA_FLAGS = " --lora-merge-cache CACHE --lora-merge-dtype float32"


def export_recipe(
    path: Path, *, tool: str, output: Path, dtype: str | None = None, cache_dir: str | None = None
) -> Path:
    """Write a recipe as another tool's configuration, into a new folder.

    Args:
        path: a recipe.yaml.
        tool: a key of EXPORTS.
        output: a folder that does not exist or is empty.
        dtype: a key of DTYPES, for a model of another dtype than the recipe's; None for the recipe's.
        cache_dir: the Hub cache; None means the default one.

    Returns:
        The written file.

    Raises:
        InputError: the recipe, its sources or the output folder cannot work, or the other tool cannot express the
            merge; nothing was written.
    """
    output = output.resolve()
    check_new(output)
    recipe = Recipe.load(path)
    if dtype is not None:
        recipe = replace(recipe, dtype=dtype)
    if recipe.mixture is not None:
        raise RecipeError(
            f"{path}: is a mixture of experts, whose weights and router {tool} cannot express: export the recipe of "
            "each expert, which apply --save_experts writes"
        )
    sources = recipe.open_sources(cache_dir=cache_dir)
    rebuild(recipe, sources)  # checks names and shapes
    file, text = EXPORTS[tool](recipe, sources)
    with staged_directory(output) as staging:
        write_text(staging / file, text)
    return output / file


def _mergekit_file(recipe: Recipe, sources: Sources) -> tuple[str, str]:
    flags = _LORA_FLAGS if any(isinstance(entry.tuned, Adapter) for entry in sources.tuned) else ""
    content = yaml.safe_dump(mergekit_config(recipe, sources), sort_keys=False, allow_unicode=True, width=120)
    return MERGEKIT_FILE, _COMMENT.format(file=MERGEKIT_FILE, flags=flags) + content


#: Tool → what writes its file: name and text.
EXPORTS: Mapping[str, Callable[[Recipe, Sources], tuple[str, str]]] = {"mergekit": _mergekit_file}


def mergekit_config(recipe: Recipe, sources: Sources) -> dict[str, Any]:
    """The merge of a recipe as mergekit reads it.

    Its method `linear` is a weighted sum of models, each named once. mergekit adds in the dtype that it reads in and
    rounds to `out_dtype`: in float64 nothing but that last rounding is seen, as here. Of `weight` the first condition
    counts whose filter is part of the tensor's name, and of the vocabulary nothing is said, so that it is the base
    model's, row by row.

    Args:
        recipe: of a dense model.
        sources: its opened models.

    Raises:
        RecipeError: mergekit cannot express it.
    """
    merge = sources.merge(recipe.settings())
    dtype = _check_expressible(recipe, sources, merge)
    names = [name for name in merge.target.names if name in merge.weights_of or _is_float(merge, name)]
    models: list[dict[str, Any]] = []
    for model, weights in _coefficients(recipe, sources, merge, names):
        if any(weights.values()) or not models:  # the target comes first, and is named even if it cancels out
            models.append({"model": model, "parameters": {"weight": filters(weights)}})
    return {
        "merge_method": "linear",
        "base_model": _reference(sources.target.model),
        "models": models,
        "parameters": {"normalize": False},
        "dtype": "float64",
        "out_dtype": dtype,
    }


def _is_float(merge: Merge, name: str) -> bool:
    return merge.target.spec(name).dtype in MERGEABLE_DTYPES


def _check_expressible(recipe: Recipe, sources: Sources, merge: Merge) -> str:
    """The one dtype that mergekit is to write.

    Raises:
        RecipeError: with what mergekit cannot express.
    """
    whole = [name for name in merge.target.names if not _is_float(merge, name)]
    if whole:
        raise RecipeError(f"{whole[0]} holds no floating-point numbers, which mergekit would turn into some")
    dtypes = sorted({merge.spec(name).dtype.name for name in merge.target.names})
    if len(dtypes) > 1:
        raise RecipeError(
            f"the merged model has tensors in {' and '.join(dtypes)}, and mergekit writes all in one: give --dtype"
        )
    settings = recipe.settings()
    for entry in sources.tuned:
        vector = sources.task_vector(entry, settings)
        if isinstance(vector, Difference) and any(isinstance(m, Aligned) for m in (vector.tuned, vector.base)):
            raise RecipeError(
                f"the vocabularies differ (vocabulary: {recipe.vocabulary}), and of a token that a base lacks mergekit "
                f"would add what {entry} has of it, where a recipe adds nothing: only models of one vocabulary are "
                "exported"
            )
        _check_adapter(entry, merge, settings)
    return dtypes[0]


def _check_adapter(entry: TunedModel, merge: Merge, settings: MergeSettings) -> None:
    """Refuse an adapter whose base mergekit could not subtract from the target."""
    if not isinstance(entry.tuned, Adapter) or entry.base is None:
        return
    names = set(entry.base.names) - set(settings.omit)
    for name in merge.target.names:
        if name not in names or entry.base.spec(name).shape != merge.target.spec(name).shape:
            raise RecipeError(
                f"{entry} is of {entry.base.model.name}, whose {name} is not of the target's shape: mergekit adds up "
                "whole models of one shape only"
            )


def _coefficients(
    recipe: Recipe, sources: Sources, merge: Merge, names: Sequence[str]
) -> list[tuple[Any, dict[str, float]]]:
    """Each model, as mergekit names it, and what each of its tensors is multiplied by; the target first."""
    found: dict[str, tuple[Any, dict[str, float]]] = {}

    def add(model: Any, tensor: str, weight: float) -> None:
        weights = found.setdefault(str(model), (model, dict.fromkeys(names, 0.0)))[1]
        weights[tensor] += weight

    target = _reference(sources.target.model)
    for tensor in names:
        add(target, tensor, 1.0)
        for label, name in merge.weights_of.get(tensor, ()):
            entry = next(entry for entry in sources.tuned if entry.label == label)
            weight = float(np.float32(recipe.weights[name]))  # as it is merged
            # An adapter that needs no base is the difference that it makes to any model: to the target.
            base = (entry.base or sources.target).model
            add(_tuned_reference(entry, base), tensor, weight)
            add(_reference(base), tensor, -weight)
    return list(found.values())


def _tuned_reference(entry: TunedModel, base: ModelId) -> Any:
    return _reference(base, entry.tuned.model) if isinstance(entry.tuned, Adapter) else _reference(entry.tuned.model)


def _reference(*models: ModelId) -> Any:
    """A model, or a model and its adapter, as mergekit names it: text where that says it all, else a mapping."""
    parts = [_location(each) for each in models]
    texts = [path + (f"@{revision}" if revision else "") for path, revision in parts]
    if not any(character in path for path, _ in parts for character in "@+"):  # which mean something in text
        return "+".join(texts)
    known = [{"path": path, **({"revision": revision} if revision else {})} for path, revision in parts]
    return dict(zip(("model", "lora"), known, strict=False))


def _location(model: ModelId) -> tuple[str, str | None]:
    """A Hub id and its commit, or a folder's whole path: mergekit may be run from elsewhere."""
    return (model.name, model.revision) if model.revision else (str(model.path.resolve()), None)


def filters(values: Mapping[str, float]) -> float | list[dict[str, Any]]:
    """A number for each tensor name as mergekit's conditions, of which the first counts whose filter is in the name.

    Args:
        values: tensor name → number.

    Returns:
        The number, if it is the same for all; else conditions, the last of them without a filter.
    """
    rest, _ = Counter(values.values()).most_common(1)[0]
    waiting = {name for name, value in values.items() if value != rest}
    if not waiting:
        return rest
    # Filters of several names at once, of one value each: whatever they match in which order is right.
    chosen: dict[str, float] = {}
    for part in sorted({part for name in waiting for part in _parts(name)}):
        matched = [name for name in values if part in name]
        if len(matched) > 1 and len({values[name] for name in matched}) == 1:
            chosen[part] = values[matched[0]]
    chosen = _cover(chosen, waiting)
    exact = {name: values[name] for name in waiting if not any(part in name for part in chosen)}
    while True:
        # A whole name may be part of a longer one, which is therefore asked about first.
        conditions = [*chosen.items(), *sorted(exact.items(), key=lambda item: (-len(item[0]), item[0]))]
        first = {name: next((v for part, v in conditions if part in name), rest) for name in values}
        wrong = {name: value for name, value in values.items() if first[name] != value}
        if not wrong:
            break
        exact |= wrong
    found: list[dict[str, Any]] = [{"filter": part, "value": value} for part, value in conditions]
    return [*found, {"value": rest}]


def _parts(name: str) -> Iterable[str]:
    """Parts of a name that several tensors may share: its layer, its kind, the module in its layer."""
    words = name.split(".")
    layer = next((n for n, word in enumerate(words) if word.isdecimal() and n > 0), None)
    if layer is None:
        return
    stem, inner = ".".join(words[: layer + 1]), words[layer + 1 :]
    yield f"{stem}."
    for n in range(1, len(inner)):
        yield f".{'.'.join(inner[:n])}."
        yield f"{stem}.{'.'.join(inner[:n])}."
    yield f".{'.'.join(inner)}"


def _cover(parts: Mapping[str, float], names: set[str]) -> dict[str, float]:
    """Few of the parts that match as many of the names as all of them do; the widest first."""
    matched = {part: {name for name in names if part in name} for part in parts}
    left, chosen = set(names), {}
    while matched:
        part = max(sorted(matched), key=lambda part: len(matched[part] & left))
        if not matched[part] & left:
            break
        left -= matched.pop(part)
        chosen[part] = parts[part]
    return chosen
