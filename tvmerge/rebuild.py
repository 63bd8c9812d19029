"""The model that a recipe describes, rebuilt from its sources: as a lazy state dict, and as a folder, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tvmerge.errors import ConfigError, RecipeError, RunError
from tvmerge.files import check_new, staged_directory
from tvmerge.merge import Merge
from tvmerge.mixture import MixtureMerge, MixtureSettings
from tvmerge.moe_config import DenseModel, find_layout, moe_config
from tvmerge.recipe import RECIPE_FILE, MixtureRecipe, Recipe
from tvmerge.router import PROMPTED, drawn_gates, router_digest
from tvmerge.sources import Sources, check_finite
from tvmerge.state_dict import Array, StateDict
from tvmerge.union import UnitedVocabulary
from tvmerge.writer import NotFiniteError, copy_model_files, write_config, write_weights

__all__ = [
    "EXPERTS_FOLDER",
    "ROUTER_FILE",
    "apply_recipe",
    "expert_recipes",
    "library_versions",
    "load_router",
    "mixture_config",
    "mixture_merge",
    "rebuild",
    "router_shape",
    "write_experts",
    "write_mixture_files",
    "write_model",
]

#: The router's values, beside the recipe of a mixture: (layers, experts, hidden), float32.
ROUTER_FILE = "router.npy"
#: A search does not come near it; with less a router's scores could be infinite.
LEAST_TEMPERATURE = 1e-3
#: Where the experts of a mixture lie, in its folder.
EXPERTS_FOLDER = "experts"


def mixture_config(sources: Sources, settings: MixtureSettings, *, dtype: str | None) -> dict[str, Any]:
    """The content of a mixture's config.json; see `moe_config`, also for what it raises."""
    experts = [
        DenseModel(f"the target model {target.model.name}", target.config, target.dtype) for target in sources.targets
    ]
    size = None if sources.united is None else sources.united.size
    return moe_config(experts, experts_per_token=settings.experts_per_token, dtype=dtype, vocabulary_size=size)


def mixture_merge(sources: Sources, merges: Sequence[Merge], settings: MixtureSettings, router: Array) -> MixtureMerge:
    """The merges of all experts as one model, whose weights are not known yet."""
    layout = find_layout(DenseModel(sources.target.model.name, sources.target.config))
    labels = [f"the target model {target.model.name}" for target in sources.targets]
    return MixtureMerge(merges=merges, layout=layout, router=router, settings=settings, labels=labels)


def write_mixture_files(
    dense: Path, config: Mapping[str, Any], folder: Path, *, united: UnitedVocabulary | None
) -> None:
    """Write what a mixture's folder holds beside its weights: configuration, tokenizer, licence.

    Args:
        dense: the folder of the model that they are taken from.
        config: the mixture's config.json.
        folder: an existing folder.
        united: the vocabulary of all experts; None where they share one.
    """
    copy_model_files(dense, folder)
    if united is not None:
        united.write_tokenizer(folder)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def router_shape(sources: Sources, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(layers, experts, hidden) of a mixture's router."""
    return int(config["num_hidden_layers"]), len(sources.targets), int(config["hidden_size"])


def load_router(folder: Path, mixture: MixtureRecipe, shape: tuple[int, int, int]) -> Array:
    """The router of a recipe: read from the file beside it, or drawn again.

    Args:
        folder: that of the recipe.
        mixture: of the recipe.
        shape: `(layers, experts, hidden)`.

    Raises:
        RecipeError: the file is not there and the router cannot be drawn, or it is another one.
    """
    path = folder / ROUTER_FILE
    try:
        router: Array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        if mixture.gate_mode in PROMPTED:
            raise RecipeError(f"{path}: no such file, which holds the router: keep it beside the recipe") from None
        router = drawn_gates(mixture.gate_mode, shape, seed=mixture.gate_seed)
    except (OSError, ValueError, EOFError) as error:
        raise RecipeError(f"{path}: cannot be read as an array: restore it") from error
    if router.shape != shape or router.dtype != np.float32 or router_digest(router) != mixture.router:
        raise RecipeError(f"{path}: holds another router than that of the recipe: restore it")
    return router


def rebuild(recipe: Recipe, sources: Sources, *, router: Array | None = None) -> StateDict:
    """The model that a recipe describes, as a lazy state dict.

    Args:
        recipe: what to build.
        sources: its opened models.
        router: of a mixture.

    Raises:
        RecipeError: the weights are not those of the sources' tensors.
        IncompatibleError: the sources do not fit together.
    """
    if recipe.mixture is None:
        merge = sources.merge(recipe.settings())
        _check_names(recipe, merge.weight_names)
        return merge.at(recipe.weights)
    assert router is not None, "a mixture has one"
    mixture = mixture_merge(sources, sources.merges(recipe.settings()), recipe.mixture.settings(), router)
    _check_names(recipe, [*mixture.weight_names, *mixture.gate_names])
    if low := [name for name in mixture.gate_names if recipe.weights[name] < LEAST_TEMPERATURE]:
        raise RecipeError(
            f"the recipe's {low[0]} is a temperature, which must be at least {LEAST_TEMPERATURE}: "
            f"{recipe.weights[low[0]]}"
        )
    return mixture.at(recipe.weights)


def _check_names(recipe: Recipe, names: Sequence[str]) -> None:
    different = sorted(set(names) ^ set(recipe.weights))
    if different:
        raise RecipeError(
            f"the recipe's weights do not match the tensors of its sources: {len(different)} names differ, "
            f"the first is {different[0]}"
        )


def expert_recipes(recipe: Recipe, sources: Sources) -> list[Recipe]:
    """For each expert of a mixture the recipe of a dense model: its target plus its own weights times the task vectors.

    A weight that moves nothing in the mixture was not searched, and is 0 here. Each expert has its own vocabulary and
    the dtypes of its own target.
    """
    assert recipe.mixture is not None, "only a mixture has experts"
    merges = sources.merges(recipe.settings())
    settings = recipe.mixture.settings()
    shape = router_shape(sources, mixture_config(sources, settings, dtype=None))
    mixture = mixture_merge(sources, merges, settings, np.zeros(shape, np.float32))
    dense = replace(
        recipe,
        mixture=None,
        score={},
        vocabulary="intersect" if recipe.vocabulary == "union" else recipe.vocabulary,
    )
    targets = [recipe.target, *recipe.mixture.further_targets]
    return [
        replace(dense, target=target, weights=mixture.expert_weights(n, recipe.weights))
        for n, target in enumerate(targets)
    ]


def library_versions() -> dict[str, str]:
    """The versions that a rebuilt model and its score depend on."""
    return {
        name: version(name)
        for name in (
            *("numpy", "numba", "ml_dtypes", "safetensors", "torch", "transformers", "lm-eval", "optuna", "cmaes"),
        )
    }


def write_model(recipe: Recipe, sources: Sources, folder: Path, *, router: Array | None = None) -> None:
    """Write the model of a recipe: weights, configuration, tokenizer, the recipe itself, and a mixture's router.

    Args:
        recipe: what to build.
        sources: its opened models.
        folder: an existing folder, usually staged; the caller makes it appear.
        router: of a mixture.

    Raises:
        CheckpointError: a source holds NaN or infinity, or was changed meanwhile.
        RunError: the merged values are too large for the dtype, or the disk is full.
    """
    sources.check_unchanged()
    try:
        write_weights(rebuild(recipe, sources, router=router), folder)
        sources.check_unchanged()
        if recipe.mixture is not None and router is not None:
            config = mixture_config(sources, recipe.mixture.settings(), dtype=recipe.dtype)
            write_mixture_files(sources.target.model.path, config, folder, united=sources.united)
            np.save(folder / ROUTER_FILE, router, allow_pickle=False)
        else:
            copy_model_files(sources.target.model.path, folder)
            if recipe.dtype is not None:
                write_config(folder, dtype=recipe.dtype)
        recipe.save(folder / RECIPE_FILE)
    except NotFiniteError as error:
        check_finite(sources, omit=recipe.omit)
        raise RunError(
            f"{error}: merged values are too large for its dtype: use smaller weights, or --dtype bfloat16 or float32"
        ) from error
    except OSError as error:
        raise RunError(f"{folder.parent}: cannot be written, nothing was kept: {error.strerror or error}") from error


def write_experts(recipe: Recipe, sources: Sources, folder: Path) -> None:
    """Write each expert of a mixture as a model of its own, with a recipe of its own: `experts/expert1`, ...

    Args:
        recipe: of the mixture.
        sources: its opened models.
        folder: that of the mixture.

    Raises:
        CheckpointError: a source holds NaN or infinity, or was changed meanwhile.
        RunError: the merged values are too large for the dtype, or the disk is full.
    """
    for n, (target, own) in enumerate(zip(sources.targets, expert_recipes(recipe, sources), strict=True), start=1):
        into = folder / EXPERTS_FOLDER / f"expert{n}"
        into.mkdir(parents=True)
        write_model(own, Sources(targets=[target], tuned=sources.tuned), into)


def apply_recipe(
    path: Path,
    *,
    output: Path,
    dtype: str | None = None,
    cache_dir: str | None = None,
    save_experts: bool = False,
) -> None:
    """Rebuild the model of a recipe in a new folder, byte for byte.

    Args:
        path: a recipe.yaml.
        output: a folder that does not exist or is empty.
        dtype: a key of DTYPES, for a model of another dtype than the recipe's; None for the recipe's.
        cache_dir: the Hub cache; None means the default one.
        save_experts: whether each expert of a mixture is written too.

    Raises:
        InputError: the recipe, its sources or the output folder cannot work; nothing was written.
    """
    output = output.resolve()
    check_new(output)
    recipe = Recipe.load(path)
    if save_experts and recipe.mixture is None:
        raise ConfigError(f"--save_experts: {path} is the recipe of one dense model, which has no experts")
    if dtype is not None:
        recipe = replace(recipe, dtype=dtype, score={})  # which was that of another model
    sources = recipe.open_sources(cache_dir=cache_dir)
    router = None
    if recipe.mixture is not None:
        config = mixture_config(sources, recipe.mixture.settings(), dtype=recipe.dtype)
        router = load_router(path.parent, recipe.mixture, router_shape(sources, config))
    rebuild(recipe, sources, router=router)  # checks names and shapes before anything is written
    with staged_directory(output) as staging:
        write_model(recipe, sources, staging, router=router)
        if save_experts:
            write_experts(recipe, sources, staging)
