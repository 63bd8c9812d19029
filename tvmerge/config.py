"""The configuration of a run: the flags of the command line, the keys of its YAML file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tvmerge.errors import ConfigError

__all__ = ["ApplyConfig", "JglueConfig"]

#: Settings that change where or how long a run runs, and no score: a study may be resumed with others.
NOT_IDENTITY = frozenset({"n_trials", "cache_dir", "output_dir", "task_dir"})


@dataclass(kw_only=True)
class JglueConfig:
    """Search the weights of target + w·(tuned − base) that score best on JGLUE tasks, and save the best model.

    Args:
        target_model: model that the task vector is added to; a folder, a Hub id, or id@revision
        base_model: model that tuned_model was tuned from
        tuned_model: model whose task vector, tuned − base, is added
        weight_min: least weight searched
        weight_max: greatest weight searched
        optimize_mode: one weight per tensor (all), per layer or per parameter kind
        optuna_sampler: how the search chooses the next weights
        n_trials: trials in all, those of an earlier run with the same output_dir counted in
        optuna_seed: seed of the sampler
        jglue_tasks: tasks to score, separated by commas
        jglue_limit: most questions per task that a trial sees; one number for all tasks or one per task
        task_dir: folder of lm-eval task files, besides lm-eval's own tasks
        holdout: share of each task's questions that the search never sees, to judge the best model on
        question_seed: seed of the choice of questions
        batch_size: requests that the model answers at a time
        device: where the model runs: auto, cpu, cuda, cuda:1, ...
        cache_dir: where models of the Hub are kept; default is the Hub's own cache
        output_dir: folder of this run; the best model is saved in output_dir/best
    """

    target_model: str
    base_model: str
    tuned_model: str
    weight_min: float = 0.0
    weight_max: float = 2.0
    optimize_mode: Literal["all", "layer", "parameter"] = "layer"
    optuna_sampler: Literal["TPE", "CMA-ES"] = "TPE"
    n_trials: int = 100
    optuna_seed: int = 42
    jglue_tasks: str | list[str]
    jglue_limit: int | str | list[int] | None = None
    task_dir: str | None = None
    holdout: float = 0.3
    question_seed: int = 0
    batch_size: int = 16
    device: str = "auto"
    cache_dir: str | None = None
    output_dir: str = "output"

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        self._require_known()
        for name in ("weight_min", "weight_max"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"--{name} must be a finite number, got {getattr(self, name)}")
        if self.weight_min >= self.weight_max:
            raise ConfigError(
                f"--weight_min must be less than --weight_max, got {self.weight_min} and {self.weight_max}"
            )
        for name, least in (("n_trials", 2), ("optuna_seed", 0), ("question_seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} must be at least {least}, got {getattr(self, name)}")
            if getattr(self, name) >= 1 << 63:
                raise ConfigError(f"--{name} must be less than 2^63, got {getattr(self, name)}")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"--holdout must be a share from 0 to less than 1, got {self.holdout}")
        tasks = self.tasks
        if not tasks or not all(tasks) or len(set(tasks)) != len(tasks):
            raise ConfigError(f"--jglue_tasks must name different tasks, separated by commas, got {self.jglue_tasks!r}")
        _ = self.limits

    def _require_known(self) -> None:
        for name in ("target_model", "base_model", "tuned_model", "output_dir"):
            if not getattr(self, name).strip():
                raise ConfigError(f"--{name} is empty, name a folder{'' if name == 'output_dir' else ' or a Hub id'}")

    @property
    def tasks(self) -> list[str]:
        """Task names, in order."""
        names = self.jglue_tasks.split(",") if isinstance(self.jglue_tasks, str) else self.jglue_tasks
        return [name.strip() for name in names]

    @property
    def limits(self) -> dict[str, int | None]:
        """Task name → most questions that a trial sees; None for all.

        Raises:
            ConfigError: not one number, and not one for each task.
        """
        raw = self.jglue_limit
        values = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list) else [raw]
        try:
            numbers = [None if value is None else int(value) for value in values]
        except ValueError:
            raise ConfigError(f"--jglue_limit must be whole numbers separated by commas, got {raw!r}") from None
        if any(number is not None and number < 1 for number in numbers):
            raise ConfigError(f"--jglue_limit must be at least 1, got {raw!r}")
        tasks = self.tasks
        if len(numbers) == 1:
            numbers *= len(tasks)
        if len(numbers) != len(tasks):
            raise ConfigError(
                f"--jglue_limit must be one number or one for each of the {len(tasks)} tasks, got {len(numbers)}"
            )
        return dict(zip(tasks, numbers, strict=True))

    def identity(self) -> dict[str, Any]:
        """Every setting that a score depends on, in one spelling."""
        same = {key: value for key, value in asdict(self).items() if key not in NOT_IDENTITY}
        return {**same, "jglue_tasks": self.tasks, "jglue_limit": list(self.limits.values())}


@dataclass(kw_only=True)
class ApplyConfig:
    """Rebuild the model of a recipe, byte for byte.

    Args:
        recipe: a recipe.yaml that a run has written
        output_dir: folder to write the model into; it must not exist or be empty
        cache_dir: where models of the Hub are kept; default is the Hub's own cache
    """

    recipe: str
    output_dir: str
    cache_dir: str | None = None
