"""The settings of a search that is scored by lm-eval's tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tvmerge.config.merge import listed
from tvmerge.config.search import ALL, SearchConfig
from tvmerge.errors import ConfigError

__all__ = ["JglueConfig"]

LARGEST_TASK_WEIGHT = 1_000_000


@dataclass(kw_only=True)
class JglueConfig(SearchConfig):
    """Search the weights of target + Σ w·(tuned − base) that score best on JGLUE tasks, and save the best model.

    Args:
        jglue_tasks: tasks to score, separated by commas; those that come with tvmerge (jcommonsenseqa, jnli, jsquad,
            marc_ja, mgsm_ja, also in the prompt styles of older scripts, as jnli-1.3-0.2), any task or group of
            lm-eval, or of task_dir
        jglue_limit: most questions per task that a trial sees, drawn by question_seed, the shares of labels kept; one
            number for all tasks or one per task, all for all questions; default is about 300 in all, shared over the
            tasks by their weights
        jglue_data: folder with the data of the tasks that come with tvmerge; default is to download it
        task_dir: folder of lm-eval task files
        num_fewshot: examples in a prompt, one number for all tasks or one per task; default is what the task says, 3
            for those that come with tvmerge
        task_metric: task=metric, several separated by spaces; default is acc or exact_match, else the first one that
            the task has
        task_weight: task=weight in the score, several separated by spaces; default is 1, and a negative weight turns
            the direction of the metric around
        apply_chat_template: put every prompt as a chat, with the template of the target's tokenizer
        fewshot_as_multiturn: in a chat, examples are turns of their own, not one text
    """

    NOT_IDENTITY: ClassVar[frozenset[str]] = SearchConfig.NOT_IDENTITY | {"task_dir", "jglue_data"}

    jglue_tasks: str | list[str]
    jglue_limit: int | str | list[int | str] | None = None
    jglue_data: str | None = None
    task_dir: str | None = None
    num_fewshot: int | str | list[int] | None = None
    task_metric: list[str] | str | None = None
    task_weight: list[str] | str | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        self.check_search()
        tasks = self.tasks
        if not tasks or not all(tasks) or len(set(tasks)) != len(tasks):
            raise ConfigError(f"--jglue_tasks must name different tasks, separated by commas, got {self.jglue_tasks!r}")
        _ = self.limits, self.shots, self.metrics, self.task_weights

    @property
    def tasks(self) -> list[str]:
        """Task names, in order."""
        names = self.jglue_tasks.split(",") if isinstance(self.jglue_tasks, str) else self.jglue_tasks
        return [name.strip() for name in names]

    @property
    def limits(self) -> dict[str, int | None] | None:
        """Task name → most questions that a trial sees, None for all; None if nobody says how many.

        Raises:
            ConfigError: not one number, and not one for each task.
        """
        return None if self.jglue_limit is None else self._numbers("jglue_limit", least=1, without=ALL)

    @property
    def shots(self) -> dict[str, int | None]:
        """Task name → examples in a prompt; None for what the task says.

        Raises:
            ConfigError: not one number, and not one for each task.
        """
        return self._numbers("num_fewshot", least=0)

    def _numbers(self, name: str, *, least: int, without: str | None = None) -> dict[str, int | None]:
        raw = getattr(self, name)
        values = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list) else [raw]
        try:
            stripped = [value.strip() if isinstance(value, str) else value for value in values]
            numbers = [None if value in (None, without) else int(value) for value in stripped]
        except ValueError:
            or_all = "" if without is None else f" or {without}"
            raise ConfigError(f"--{name} must be whole numbers{or_all}, separated by commas, got {raw!r}") from None
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
        for entry in listed(getattr(self, name)):
            task, separator, value = (part.strip() for part in entry.partition("="))
            if not task or not separator or not value:
                raise ConfigError(f"--{name} {entry}: must be {form}")
            if task in chosen:
                raise ConfigError(f"--{name} names the task {task} twice")
            chosen[task] = value
        return chosen

    def identity(self) -> dict[str, Any]:
        """Every setting that a score depends on, in one spelling."""
        by_task = {
            "jglue_limit": "shared over the tasks" if self.limits is None else list(self.limits.values()),
            "num_fewshot": list(self.shots.values()),
            "task_metric": self.metrics,
            "task_weight": self.task_weights,
        }
        return {**super().identity(), **by_task, "jglue_tasks": self.tasks}
