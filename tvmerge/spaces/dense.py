"""The space of dense merges: one target + Σ w·(tuned − base)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution

from tvmerge.config import SearchConfig
from tvmerge.models.transformers import TransformersModel, unread_by_all
from tvmerge.rebuild import write_model
from tvmerge.recipe import Recipe
from tvmerge.sources import open_sources
from tvmerge.spaces import Column, Proven, Space
from tvmerge.state_dict import StateDict
from tvmerge.writer import model_files

__all__ = ["DenseSpace"]


class DenseSpace(Space):
    """All merges of one target.

    Args:
        config: of the run.

    Raises:
        InputError: its models cannot be found, or do not fit together.
    """

    def __init__(self, config: SearchConfig) -> None:
        sources = open_sources(**config.models)
        omit = unread_by_all(sources.whole_models())
        super().__init__(config, sources, replace(config.merge_settings, omit=omit))
        self._merge = sources.merge(self.settings, keep=config.delta_storage == "memory")

    @property
    def ranges(self) -> Mapping[str, FloatDistribution]:
        """One for each weight."""
        return self._weight_ranges(self._merge.weight_names)

    def uniform(self, weight: float) -> dict[str, float]:
        """All weights are the same."""
        return dict.fromkeys(self._merge.weight_names, weight)

    def at(self, point: Mapping[str, float]) -> StateDict:
        """The merge."""
        return self._merge.at(point)

    def open_model(self, *, device: str, recall: Callable[[str], Any]) -> TransformersModel:
        """The target, loaded."""
        folder = self.sources.target.model.path
        return TransformersModel.from_folder(
            folder, checkpoint=self._merge.target, device=device, dtype=self.config.dtype
        )

    def columns(self, proven: Proven, single: Column | None) -> list[Column]:
        """The target, the tuned models, the merges of one weight for all, the best trial, and what is recommended."""
        tuned = [(entry, self.sources.tuned_state_dict(entry, self.settings)) for entry in self.sources.tuned]
        several = len(tuned) > 1
        return [
            self.trial_column("target", proven.zero, is_target=True),
            *(
                Column(entry.label if several else "tuned", f"tuned/{entry.label}" if several else "tuned", None, model)
                for entry, model in tuned
                if model is not None
            ),
            self.trial_column("uniform 1", proven.one),
            self.trial_column(f"best uniform ({proven.uniform_weight:g})", proven.best_uniform),
            *self.best_columns(proven),
        ]

    def recipe(self, weights: Mapping[str, float], **more: Any) -> Recipe:
        """Sources, grouping and weights."""
        return self._recipe(weights, **more)

    def write(self, recipe: Recipe, folder: Path) -> None:
        """Write the merge."""
        write_model(recipe, self.sources, folder)

    def files(self) -> list[str]:
        """Those of the target."""
        return [path.name for path in model_files(self.sources.target.model.path)]
