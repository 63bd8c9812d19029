"""What is merged, and how; and what needs no more than that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tvmerge.errors import ConfigError
from tvmerge.granularity import Grouping
from tvmerge.hub import split_name

if TYPE_CHECKING:
    from tvmerge.sources import MergeSettings

__all__ = ["ApplyConfig", "MergeConfig", "listed"]


@dataclass(kw_only=True)
class MergeConfig:
    """What is merged, and how.

    Args:
        target_model: model that the task vectors are added to; a folder, a Hub id, or id@revision; 2 to 8, separated by
            spaces, become the experts of a mixture (also as target_model_1, target_model_2, ...)
        tuned_model: models or LoRA adapters whose task vectors, tuned − base, are added; name or name:base, several
            separated by spaces
        base_model: model that tuned_model was tuned from; not needed where each tuned model names its own
        optimize_mode: one weight in all (uniform), per layer, per k layers (block:k), per parameter kind (parameter) or
            per tensor (all)
        weight_groups: name=expression, several separated by spaces; tensors whose names hold the regular expression get
            weights of their own, as in attention=self_attn mlp=mlp
        freeze: regular expressions, several separated by spaces; tensors whose names hold one keep the target's values
        vocabulary: what to do if vocabularies differ; same refuses, intersect merges the rows of shared tokens, union
            gives a mixture the tokens of all its experts
        dtype: of the merged model; auto is that of the target
        delta_storage: where differences are kept; mmap computes them from the files, memory keeps one copy of them
        cache_dir: where models of the Hub are kept; default is the Hub's own cache
    """

    target_model: list[str] | str
    tuned_model: list[str] | str
    base_model: str | None = None
    optimize_mode: str = "layer"
    weight_groups: list[str] | str | None = None
    freeze: list[str] | str | None = None
    vocabulary: Literal["same", "intersect", "union"] = "same"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    delta_storage: Literal["mmap", "memory"] = "mmap"
    cache_dir: str | None = None

    def check_merge(self) -> None:
        """Check every setting of the merge that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        if not self.target_models or not all(str(name).strip() for name in self.target_models):
            raise ConfigError("--target_model is empty, name a folder or a Hub id")
        if self.base_model is not None and not str(self.base_model).strip():
            raise ConfigError("--base_model is empty, name a folder or a Hub id")
        if not self.tuned_models or not all(name.strip() for name in self.tuned_models):
            raise ConfigError("--tuned_model is empty, name a folder or a Hub id")
        if len(set(self.tuned_models)) != len(self.tuned_models):
            raise ConfigError(f"--tuned_model names a model twice: {' '.join(self.tuned_models)}")
        for name in self.tuned_models:
            split_name(name)
        if not all(isinstance(name, str) for name in self.target_models):
            raise ConfigError(f"--target_model must be text, got {self.target_model!r}")
        if not isinstance(self.optimize_mode, str):
            raise ConfigError(f"--optimize_mode must be text, got {self.optimize_mode!r}")
        _ = self.grouping

    @property
    def target_models(self) -> list[str]:
        """Names of the target models: one, or one for each expert of a mixture."""
        return list(self.target_model) if isinstance(self.target_model, (list, tuple)) else [self.target_model]

    @property
    def tuned_models(self) -> list[str]:
        """Names of the tuned models, each with its base if it has its own."""
        return [self.tuned_model] if isinstance(self.tuned_model, str) else list(self.tuned_model)

    @property
    def models(self) -> dict[str, Any]:
        """What `open_sources` takes."""
        return {
            "target": self.target_models,
            "tuned": self.tuned_models,
            "base": self.base_model,
            "vocabulary": self.vocabulary,
            "cache_dir": self.cache_dir,
        }

    @property
    def grouping(self) -> Grouping:
        """Which tensors share one weight.

        Raises:
            ConfigError: an unknown mode, or what is no regular expression.
        """
        groups = {}
        for entry in listed(self.weight_groups):
            name, separator, pattern = entry.partition("=")
            if not separator or not pattern:
                raise ConfigError(f"--weight_groups {entry}: must be name=expression, as in attention=self_attn")
            if name in groups:
                raise ConfigError(f"--weight_groups names {name!r} twice: join its expressions as one|other")
            groups[name] = pattern
        try:
            return Grouping(self.optimize_mode, groups, tuple(listed(self.freeze)))
        except ConfigError as error:
            raise ConfigError(f"--optimize_mode, --weight_groups or --freeze: {error}") from error

    @property
    def merge_settings(self) -> MergeSettings:
        """How the models are put together, before it is known which tensors a model does not read."""
        from tvmerge.sources import MergeSettings  # not before a command runs: --help must be fast

        dtype = None if self.dtype == "auto" else self.dtype
        return MergeSettings(grouping=self.grouping, dtype=dtype, vocabulary=self.vocabulary)


def listed(value: Sequence[str] | str | None) -> list[str]:
    """A setting that takes several values, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


@dataclass(kw_only=True)
class ApplyConfig:
    """Rebuild the model of a recipe, byte for byte, or in another dtype.

    Args:
        recipe: a recipe.yaml that a run has written
        output_dir: folder to write the model into; it must not exist or be empty
        dtype: of the model; auto is what the recipe says
        save_experts: write each expert of a mixture too, as a model of its own
        export: write no model but what another tool makes it from; mergekit is its configuration, mergekit.yaml
        cache_dir: where models of the Hub are kept; default is the Hub's own cache
    """

    recipe: str
    output_dir: str
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    save_experts: bool = False
    export: Literal["mergekit"] | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything.

        Raises:
            ConfigError: settings that contradict each other.
        """
        if self.export and self.save_experts:
            raise ConfigError(f"--save_experts writes models and --export {self.export} writes none: leave one out")
