"""What a search moves through: named numbers, the model at each point, and what it is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from transformers import PreTrainedTokenizerBase

from tvmerge.checkpoint import Checkpoint, Header
from tvmerge.config import SearchConfig
from tvmerge.hub import ModelId
from tvmerge.models.transformers import TransformersModel, load_tokenizer
from tvmerge.recipe import RECIPE_FILE, Recipe, source_entries
from tvmerge.sources import MergeSettings, Sources, check_finite
from tvmerge.state_dict import StateDict
from tvmerge.study import TrialResult
from tvmerge.vocabulary import vocabulary_digest

__all__ = ["RECOMMENDED", "Column", "Proven", "Space"]

#: What scores.jsonl calls the model that is recommended, of no trial.
RECOMMENDED = "recommended"


@dataclass(frozen=True)
class Column:
    """A model of the table."""

    label: str  # the column's head
    model: str  # as scores.jsonl calls it
    trial: int | None  # None: no trial's model
    state_dict: StateDict
    weights: Mapping[str, float] | None = None  # None: it has none, as the tuned model
    is_target: bool = False


@dataclass(frozen=True)
class Proven:
    """The points whose models are in the table."""

    zero: TrialResult
    one: TrialResult
    best_uniform: TrialResult
    uniform_weight: float  # of best_uniform
    best: TrialResult  # the one of the highest score
    recommended: Mapping[str, float]
    tried: TrialResult | None = None  # the trial that is of the recommended point, if one is


class Space(ABC):
    """The models that a configuration can become.

    Args:
        config: of the run.
        sources: its opened models.
        settings: how they are merged.
    """

    #: What the best model is called in the card and in what is printed.
    noun = "merge"

    def __init__(self, config: SearchConfig, sources: Sources, settings: MergeSettings) -> None:
        self.config = config
        self.sources = sources
        self.settings = settings

    @property
    @abstractmethod
    def ranges(self) -> Mapping[str, FloatDistribution]:
        """Name of each number that is searched, in a stable order → where."""

    @abstractmethod
    def uniform(self, weight: float) -> dict[str, float]:
        """The point at which all weights of task vectors are the same."""

    @abstractmethod
    def at(self, point: Mapping[str, float]) -> StateDict:
        """The model at a point."""

    @abstractmethod
    def open_model(self, *, device: str, recall: Callable[[str], Any]) -> TransformersModel:
        """A live model of the space.

        Args:
            device: where it runs.
            recall: what `remember` kept with the study, by key; None for a new study.

        Raises:
            InputError: it cannot be built.
        """

    def remember(self, keep: Callable[[str, Any], None]) -> None:  # noqa: B027
        """Keep with the study, or beside it, what another process needs to build the same models."""

    @abstractmethod
    def columns(self, proven: Proven, single: Column | None) -> list[Column]:
        """The models of the table, in order, the recommended last; `single` is the best of `singles`."""

    def singles(self, point: Mapping[str, float]) -> list[Column]:
        """Parts of the model at a point that could do as well alone."""
        return []

    def explanation(self) -> str:
        """What is to be said of the table."""
        return ""

    @abstractmethod
    def recipe(self, weights: Mapping[str, float], **more: Any) -> Recipe:
        """What rebuilds the model at a point."""

    @abstractmethod
    def write(self, recipe: Recipe, folder: Path) -> None:
        """Write the model of a recipe."""

    @abstractmethod
    def files(self) -> list[str]:
        """Names of what `write` writes beside weights and recipe."""

    def is_whole(self, recipe: Recipe, folder: Path) -> bool:
        """Whether a folder holds all that `write` writes for this recipe.

        Raises:
            CheckpointError: weights are missing or damaged.
            RecipeError: a recipe, or what belongs to it, is.
        """
        Checkpoint(ModelId(name=str(folder), revision=None, path=folder))
        same = Recipe.load(folder / RECIPE_FILE) == recipe
        return same and all((folder / name).is_file() for name in self.files())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of every model of the space."""
        return load_tokenizer(self.sources.target.model.path)

    def check_finite(self) -> None:
        """Read all weights and refuse NaN and infinity."""
        check_finite(self.sources, self.settings.omit)

    def identity(self) -> dict[str, Any]:
        """Which models these are, by their weights and not by their paths."""
        sources, config = self.sources, self.config
        several = len(sources.tuned) > 1  # then labels are in the weights' names
        targets = [_weights(target) for target in sources.targets]
        tokens = [vocabulary_digest(model) for model in sources.models()]
        return {
            "target_model": targets if len(targets) > 1 else targets[0],
            "tuned_model": [
                f"{entry.label}: {_weights(entry.tuned)}" if several else _weights(entry.tuned)
                for entry in sources.tuned
            ],
            "base_model": [None if entry.base is None else _weights(entry.base) for entry in sources.tuned],
            **({"tokens": tokens} if config.vocabulary != "same" else {}),
        }

    def _recipe(self, weights: Mapping[str, float], **more: Any) -> Recipe:
        settings = self.settings
        entries = source_entries(self.sources, vocabulary=settings.vocabulary)
        return Recipe(
            target=entries["target"],
            task_vectors=entries["task_vectors"],
            granularity=settings.grouping.granularity,
            weights=dict(weights),
            weight_groups=dict(settings.grouping.weight_groups),
            freeze=list(settings.grouping.freeze),
            method=settings.method,
            dtype=settings.dtype,
            vocabulary=settings.vocabulary,
            omit=list(settings.omit),
            **more,
        )

    def _weight_ranges(self, names: Sequence[str]) -> dict[str, FloatDistribution]:
        return dict.fromkeys(names, FloatDistribution(self.config.weight_min, self.config.weight_max))

    def trial_column(self, label: str, result: TrialResult, *, is_target: bool = False) -> Column:
        """The model of a trial."""
        return Column(label, "merge", result.number, self.at(result.weights), result.weights, is_target)

    def best_columns(self, proven: Proven) -> list[Column]:
        """The best trial, and what is recommended if it is another model."""
        best, tried = self.trial_column(f"best trial ({proven.best.number})", proven.best), proven.tried
        if tried is not None and tried.number == proven.best.number:
            return [best]
        again = proven.best.number == proven.best_uniform.number  # which is in the table already
        recommended = (
            Column("recommended", RECOMMENDED, None, self.at(proven.recommended), proven.recommended)
            if tried is None
            else self.trial_column(f"recommended (trial {tried.number})", tried)
        )
        return [*([] if again else [best]), recommended]


def _weights(model: Header) -> str:
    assert isinstance(model, Checkpoint), "a run is of models whose weights are here"
    return f"weights {model.fingerprint}"
