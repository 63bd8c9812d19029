"""The configuration of a run: the flags of the command line, the keys of its YAML file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from tvmerge.errors import ConfigError
from tvmerge.granularity import Grouping
from tvmerge.hub import split_name

if TYPE_CHECKING:
    from tvmerge.sources import MergeSettings

__all__ = ["LIST_SETTINGS", "SWITCHES", "ApplyConfig", "JglueConfig", "MergeConfig", "PlanConfig"]

#: Settings that change where or how long a run runs, and no score: a study may be resumed with others.
NOT_IDENTITY = frozenset({"n_trials", "cache_dir", "output_dir", "task_dir", "jglue_data", "delta_storage"})
#: Weights are float32 numbers.
LARGEST_WEIGHT = 3e38
LARGEST_TASK_WEIGHT = 1_000_000
#: Settings that take several values on the command line: `--tuned_model a b`.
LIST_SETTINGS = frozenset({"tuned_model", "weight_groups", "freeze", "task_metric", "task_weight"})
#: Settings that are switched on by their name alone: `--apply_chat_template`.
SWITCHES = frozenset({"apply_chat_template"})


@dataclass(kw_only=True)
class MergeConfig:
    """What is merged, and how.

    Args:
        target_model: model that the task vectors are added to; a folder, a Hub id, or id@revision
        tuned_model: models or LoRA adapters whose task vectors, tuned − base, are added; name or name:base, several
            separated by spaces
        base_model: model that tuned_model was tuned from; not needed where each tuned model names its own
        optimize_mode: one weight in all (uniform), per layer, per k layers (block:k), per parameter kind (parameter) or
            per tensor (all)
        weight_groups: name=expression, several separated by spaces; tensors whose names hold the regular expression get
            weights of their own, as in attention=self_attn mlp=mlp
        freeze: regular expressions, several separated by spaces; tensors whose names hold one keep the target's values
        vocabulary: what to do if vocabularies differ; same refuses, intersect merges the rows of shared tokens
        dtype: of the merged model; auto is that of the target
        delta_storage: where differences are kept; mmap computes them from the files, memory keeps one copy of them
        cache_dir: where models of the Hub are kept; default is the Hub's own cache
    """

    target_model: str
    tuned_model: list[str] | str
    base_model: str | None = None
    optimize_mode: str = "layer"
    weight_groups: list[str] | str | None = None
    freeze: list[str] | str | None = None
    vocabulary: Literal["same", "intersect"] = "same"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    delta_storage: Literal["mmap", "memory"] = "mmap"
    cache_dir: str | None = None

    def check_merge(self) -> None:
        """Check every setting of the merge that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        for name in ("target_model", "base_model"):
            value = getattr(self, name)
            if value is not None and not str(value).strip():
                raise ConfigError(f"--{name} is empty, name a folder or a Hub id")
        if not self.tuned_models or not all(name.strip() for name in self.tuned_models):
            raise ConfigError("--tuned_model is empty, name a folder or a Hub id")
        if len(set(self.tuned_models)) != len(self.tuned_models):
            raise ConfigError(f"--tuned_model names a model twice: {' '.join(self.tuned_models)}")
        for name in self.tuned_models:
            split_name(name)
        for name in ("target_model", "optimize_mode"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"--{name} must be text, got {getattr(self, name)!r}")
        _ = self.grouping

    @property
    def tuned_models(self) -> list[str]:
        """Names of the tuned models, each with its base if it has its own."""
        return [self.tuned_model] if isinstance(self.tuned_model, str) else list(self.tuned_model)

    @property
    def models(self) -> dict[str, Any]:
        """What `open_sources` takes."""
        return {
            "target": self.target_model,
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
        for entry in _listed(self.weight_groups):
            name, separator, pattern = entry.partition("=")
            if not separator or not pattern:
                raise ConfigError(f"--weight_groups {entry}: must be name=expression, as in attention=self_attn")
            if name in groups:
                raise ConfigError(f"--weight_groups names {name!r} twice: join its expressions as one|other")
            groups[name] = pattern
        try:
            return Grouping(self.optimize_mode, groups, tuple(_listed(self.freeze)))
        except ConfigError as error:
            raise ConfigError(f"--optimize_mode, --weight_groups or --freeze: {error}") from error

    @property
    def merge_settings(self) -> MergeSettings:
        """How the models are put together, before it is known which tensors a model does not read."""
        from tvmerge.sources import MergeSettings  # not before a command runs: --help must be fast

        dtype = None if self.dtype == "auto" else self.dtype
        return MergeSettings(grouping=self.grouping, dtype=dtype, vocabulary=self.vocabulary)


def _listed(value: Sequence[str] | str | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


@dataclass(kw_only=True)
class PlanConfig(MergeConfig):
    """Say what a merge would need, and whether it can work, from headers alone: no weights are downloaded or read.

    Args:
        output_dir: folder of the run to be
    """

    output_dir: str = "output"

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening anything."""
        self.check_merge()


@dataclass(kw_only=True)
class JglueConfig(MergeConfig):
    """Search the weights of target + Σ w·(tuned − base) that score best on JGLUE tasks, and save the best model.

    Args:
        weight_min: least weight searched
        weight_max: greatest weight searched
        optuna_sampler: how the search chooses the next weights
        n_trials: trials in all, those of an earlier run with the same output_dir counted in
        optuna_seed: seed of the sampler
        jglue_tasks: tasks to score, separated by commas; those that come with tvmerge (jcommonsenseqa, jnli, jsquad,
            marc_ja, mgsm_ja, also in the prompt styles of older scripts, as jnli-1.3-0.2), any task or group of
            lm-eval, or of task_dir
        jglue_limit: most questions per task that a trial sees, drawn by question_seed, the shares of labels kept; one
            number for all tasks or one per task
        jglue_data: folder with the data of the tasks that come with tvmerge; default is to download it
        task_dir: folder of lm-eval task files
        num_fewshot: examples in a prompt, one number for all tasks or one per task; default is what the task says, 3
            for those that come with tvmerge
        task_metric: task=metric, several separated by spaces; default is acc or exact_match, else the first one that
            the task has
        task_weight: task=weight in the score, several separated by spaces; default is 1, and a negative weight turns
            the direction of the metric around
        apply_chat_template: put every prompt as a chat, with the template of the target's tokenizer
        system_instruction: text that goes before every prompt, or is the system's message of a chat
        fewshot_as_multiturn: in a chat, examples are turns of their own, not one text
        holdout: share of each task's questions that the search never sees, to judge the best model on
        question_seed: seed of the choice of questions
        batch_size: requests of full length that the model answers at a time, of shorter ones more; auto takes many, and
            halves them until they fit in memory
        device: where the model runs: auto, cpu, cuda, cuda:1, ...
        output_dir: folder of this run; the best model is saved in output_dir/best
    """

    weight_min: float = 0.0
    weight_max: float = 2.0
    optuna_sampler: Literal["TPE", "CMA-ES"] = "TPE"
    n_trials: int = 100
    optuna_seed: int = 42
    jglue_tasks: str | list[str]
    jglue_limit: int | str | list[int] | None = None
    jglue_data: str | None = None
    task_dir: str | None = None
    num_fewshot: int | str | list[int] | None = None
    task_metric: list[str] | str | None = None
    task_weight: list[str] | str | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    holdout: float = 0.3
    question_seed: int = 0
    batch_size: int | str = 16
    device: str = "auto"
    output_dir: str = "output"

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        self.check_merge()
        if not isinstance(self.output_dir, str) or not self.output_dir.strip():
            raise ConfigError("--output_dir is empty, name a folder")
        for name in ("weight_min", "weight_max"):
            if not abs(getattr(self, name)) < LARGEST_WEIGHT:  # also if it is no number
                raise ConfigError(f"--{name} must be a number that float32 can hold, got {getattr(self, name)}")
        if self.weight_min >= self.weight_max:
            raise ConfigError(
                f"--weight_min must be less than --weight_max, got {self.weight_min} and {self.weight_max}"
            )
        for name, least in (("n_trials", 2), ("optuna_seed", 0), ("question_seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if name == "batch_size" and isinstance(value, str):
                if value != "auto":
                    raise ConfigError(f"--batch_size must be a whole number or auto, got {value!r}")
                continue
            if value < least:
                raise ConfigError(f"--{name} must be at least {least}, got {value}")
            if value >= 1 << 63:
                raise ConfigError(f"--{name} must be less than 2^63, got {value}")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"--holdout must be a share from 0 to less than 1, got {self.holdout}")
        tasks = self.tasks
        if not tasks or not all(tasks) or len(set(tasks)) != len(tasks):
            raise ConfigError(f"--jglue_tasks must name different tasks, separated by commas, got {self.jglue_tasks!r}")
        try:
            (self.system_instruction or "").encode()
        except UnicodeEncodeError:
            raise ConfigError("--system_instruction is not text in the encoding of this terminal") from None
        _ = self.limits, self.shots, self.metrics, self.task_weights

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
        return self._numbers("jglue_limit", least=1)

    @property
    def shots(self) -> dict[str, int | None]:
        """Task name → examples in a prompt; None for what the task says.

        Raises:
            ConfigError: not one number, and not one for each task.
        """
        return self._numbers("num_fewshot", least=0)

    def _numbers(self, name: str, *, least: int) -> dict[str, int | None]:
        raw = getattr(self, name)
        values = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list) else [raw]
        try:
            numbers = [None if value is None else int(value) for value in values]
        except ValueError:
            raise ConfigError(f"--{name} must be whole numbers separated by commas, got {raw!r}") from None
        if any(number is not None and number < least for number in numbers):
            raise ConfigError(f"--{name} must be at least {least}, got {raw!r}")
        tasks = self.tasks
        if len(numbers) == 1:
            numbers *= len(tasks)
        if len(numbers) != len(tasks):
            raise ConfigError(
                f"--{name} must be one number or one for each of the {len(tasks)} tasks, got {len(numbers)}"
            )
        return dict(zip(tasks, numbers, strict=True))

    @property
    def metrics(self) -> dict[str, str]:
        """Task → metric, of those that were chosen.

        Raises:
            ConfigError: an entry that is not task=metric.
        """
        return self._by_task("task_metric", "task=metric, as in gsm8k=exact_match,flexible-extract")

    @property
    def task_weights(self) -> dict[str, float]:
        """Task → weight, of those that were chosen.

        Raises:
            ConfigError: an entry that is not task=number.
        """
        weights = {}
        for task, text in self._by_task("task_weight", "task=number, as in jnli=0.5").items():
            try:
                weights[task] = float(text)
            except ValueError:
                weights[task] = math.nan
            if not abs(weights[task]) <= LARGEST_TASK_WEIGHT:  # also if it is no number
                raise ConfigError(f"--task_weight {task}={text}: must be a number, {LARGEST_TASK_WEIGHT:,} at most")
        return weights

    def _by_task(self, name: str, form: str) -> dict[str, str]:
        chosen: dict[str, str] = {}
        for entry in _listed(getattr(self, name)):
            task, separator, value = (part.strip() for part in entry.partition("="))
            if not task or not separator or not value:
                raise ConfigError(f"--{name} {entry}: must be {form}")
            if task in chosen:
                raise ConfigError(f"--{name} names the task {task} twice")
            chosen[task] = value
        return chosen

    def identity(self) -> dict[str, Any]:
        """Every setting that a score depends on, in one spelling."""
        same = {key: value for key, value in asdict(self).items() if key not in NOT_IDENTITY}
        lists = {"weight_groups": _listed(self.weight_groups), "freeze": _listed(self.freeze)}
        by_task = {
            "jglue_limit": list(self.limits.values()),
            "num_fewshot": list(self.shots.values()),
            "task_metric": self.metrics,
            "task_weight": self.task_weights,
        }
        return {**same, **lists, **by_task, "jglue_tasks": self.tasks}


@dataclass(kw_only=True)
class ApplyConfig:
    """Rebuild the model of a recipe, byte for byte, or in another dtype.

    Args:
        recipe: a recipe.yaml that a run has written
        output_dir: folder to write the model into; it must not exist or be empty
        dtype: of the model; auto is what the recipe says
        cache_dir: where models of the Hub are kept; default is the Hub's own cache
    """

    recipe: str
    output_dir: str
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    cache_dir: str | None = None
