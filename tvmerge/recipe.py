"""Recipes: a merge as YAML, and the model folder that it rebuilds, byte for byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tvmerge import __version__
from tvmerge.checkpoint import Checkpoint, copy_model_files, resolve, write_weights
from tvmerge.errors import ConfigError, RecipeError
from tvmerge.files import check_writable, local_path, staged_directory, write_text
from tvmerge.granularity import GRANULARITIES
from tvmerge.merge import Merge
from tvmerge.methods import METHODS
from tvmerge.state_dict import StateDict, Without, check_same_tensors
from tvmerge.task_vector import TaskVector

__all__ = ["RECIPE_FILE", "Recipe", "Sources", "apply_recipe", "library_versions", "source_entry", "write_model"]

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Sources:
    """The opened models of a merge."""

    target: Checkpoint
    base: Checkpoint
    tuned: Checkpoint

    def merge(self, *, granularity: str, method: str, omit: Sequence[str]) -> Merge:
        """The merge of these models.

        Args:
            granularity: a key of GRANULARITIES.
            method: a key of METHODS.
            omit: tensor names to leave out of all three: duplicates of tied tensors and what the model does not read.

        Raises:
            IncompatibleError: the tensors of the three differ in name, shape or kind.
        """
        target, base, tuned = (Without(model, omit) for model in (self.target, self.base, self.tuned))
        for name, other in (("base", base), ("tuned", tuned)):
            whose = f"the {name} model {getattr(self, name).model.name}"
            target_name = f"the target model {self.target.model.name}"
            check_same_tensors(target, other, reference_name=target_name, other_name=whose)
        task_vectors = [TaskVector(tuned=tuned, base=base)]
        return Merge(target=target, task_vectors=task_vectors, granularity=granularity, method=method)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a merged model, and what was measured on it."""

    target: Mapping[str, str | None]  # {model: folder or Hub id, revision: commit or null, fingerprint}
    base: Mapping[str, str | None]
    tuned: Mapping[str, str | None]
    granularity: str
    weights: Mapping[str, float]  # weight name → w
    method: str = "task_arithmetic"
    omit: Sequence[str] = ()  # tensors of the sources that the merged model does not hold
    score: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read and check a recipe.

        Raises:
            RecipeError: no such file, not YAML, a key that is missing or unknown, a value that cannot be.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such recipe") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{path}: not a recipe, which is a mapping of keys to values")
        content.pop("tvmerge", None)
        known = {f.name for f in fields(cls)}
        needed = {"target", "base", "tuned", "granularity", "weights"}
        for problem, keys in (("unknown", content.keys() - known), ("missing", needed - content.keys())):
            if keys:
                raise RecipeError(f"{path}: {problem} keys: {', '.join(sorted(map(str, keys)))}")
        recipe = cls(**content)
        recipe._check(path)
        return recipe

    def _check(self, path: Path) -> None:
        for role in ("target", "base", "tuned"):
            source = getattr(self, role)
            if not isinstance(source, dict) or not isinstance(source.get("model"), str):
                raise RecipeError(f"{path}: {role} must hold a model: a folder or a Hub id")
            if not all(isinstance(value, (str, type(None))) for value in source.values()):
                raise RecipeError(f"{path}: {role} must hold text only: model, revision, fingerprint")
        for key, value, registry in (
            ("granularity", self.granularity, GRANULARITIES),
            ("method", self.method, METHODS),
        ):
            if not isinstance(value, str) or value not in registry:
                raise RecipeError(f"{path}: unknown {key} {value!r}, known are {', '.join(registry)}")
        if not isinstance(self.omit, (list, tuple)) or not all(isinstance(name, str) for name in self.omit):
            raise RecipeError(f"{path}: omit must be a list of tensor names")
        if not isinstance(self.weights, dict):
            raise RecipeError(f"{path}: weights must map weight names to numbers")
        for name, weight in self.weights.items():
            if not isinstance(name, str):
                raise RecipeError(f"{path}: {name!r} is no name of a weight")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise RecipeError(f"{path}: the weight of {name} is {weight!r}, not a finite number")

    def save(self, path: Path) -> None:
        """Write the recipe as YAML."""
        content = {"tvmerge": __version__, **asdict(self), "omit": list(self.omit)}
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))

    def open_sources(self, *, cache_dir: str | None = None) -> Sources:
        """Find and open the three models, at the recorded commits.

        Raises:
            CheckpointError: one of them cannot be found or read.
            RecipeError: a local folder has gone, or holds other weights than when the recipe was written.
        """
        found = {}
        for role in ("target", "base", "tuned"):
            source = getattr(self, role)
            name, revision = source["model"], source.get("revision")
            if not revision and not local_path(name, flag=f"the recipe's {role} model").is_dir():
                raise RecipeError(
                    f"the {role} model was the local folder {name}, which is not here: run from the folder that "
                    "it is relative to, or mend the recipe"
                )
            found[role] = Checkpoint(resolve(name + (f"@{revision}" if revision else ""), cache_dir=cache_dir))
            if source.get("fingerprint") not in (None, found[role].fingerprint):
                raise RecipeError(
                    f"the weights in {name} are not those of the recipe's {role} model: they were changed"
                )
        return Sources(**found)

    def rebuild(self, sources: Sources) -> StateDict:
        """The merged model that the recipe describes.

        Raises:
            RecipeError: the weights are not those of the sources' tensors.
            IncompatibleError: the sources do not fit together.
        """
        merge = sources.merge(granularity=self.granularity, method=self.method, omit=self.omit)
        different = sorted(set(merge.weight_names) ^ set(self.weights))
        if different:
            raise RecipeError(
                f"the recipe's weights do not match the tensors of its sources: {len(different)} names differ, "
                f"the first is {different[0]}"
            )
        return merge.at(self.weights)


def source_entry(checkpoint: Checkpoint) -> dict[str, str | None]:
    """A model as a recipe holds it."""
    model = checkpoint.model
    return {"model": model.name, "revision": model.revision, "fingerprint": checkpoint.fingerprint}


def library_versions() -> dict[str, str]:
    """The versions that a rebuilt model and its score depend on."""
    return {name: version(name) for name in ("torch", "transformers", "safetensors", "lm-eval", "optuna", "cmaes")}


def write_model(recipe: Recipe, sources: Sources, folder: Path) -> None:
    """Write the model of a recipe: weights, configuration, tokenizer and the recipe itself.

    Args:
        recipe: what to build.
        sources: its opened models.
        folder: an existing folder, usually staged; the caller makes it appear.
    """
    write_weights(recipe.rebuild(sources), folder)
    copy_model_files(sources.target.model.path, folder)
    recipe.save(folder / RECIPE_FILE)


def apply_recipe(path: Path, *, output: Path, cache_dir: str | None = None) -> None:
    """Rebuild the model of a recipe in a new folder, byte for byte.

    Args:
        path: a recipe.yaml.
        output: a folder that does not exist or is empty.
        cache_dir: the Hub cache; None means the default one.

    Raises:
        InputError: the recipe, its sources or the output folder cannot work; nothing was written.
    """
    output = output.resolve()
    check_writable(output.parent)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output_dir {output}: exists and is not empty, name a new folder")
    recipe = Recipe.load(path)
    sources = recipe.open_sources(cache_dir=cache_dir)
    recipe.rebuild(sources)  # checks names and shapes before anything is written
    with staged_directory(output) as staging:
        write_model(recipe, sources, staging)
