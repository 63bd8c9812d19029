"""The questions of a run: tasks, what counts of them, and which of their questions are asked when."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from tvmerge.config import JglueConfig
from tvmerge.config.search import N_QUESTIONS
from tvmerge.errors import ConfigError
from tvmerge.evaluators import Goals, TaskGoal
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.measure import Measure, choose_measure
from tvmerge.evaluators.prompts import ChatFormat
from tvmerge.evaluators.split import (
    STAGES,
    Split,
    n_heldout,
    share_out,
    split_questions,
    why_so_few_heldout,
    why_so_many,
)
from tvmerge.evaluators.tasks import LoadedTask, load_tasks
from tvmerge.files import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tvmerge.models.transformers import TransformersModel

__all__ = ["TaskQuestions", "Tasks", "ask_questions", "open_tasks"]

_Value = TypeVar("_Value")

#: Questions of each task, if it has as many and nobody says how many: fewer say nothing of it.
LEAST_QUESTIONS = 5


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run, and what counts of them."""

    loaded: Mapping[str, LoadedTask]
    measures: Mapping[str, Measure]
    goals: Goals

    @property
    def scoring(self) -> dict[str, str]:
        """Task → what its scores mean."""
        return {
            name: f"{goal.metric}, {'higher' if goal.higher_is_better else 'lower'} is better, weight {goal.weight:g}, "
            f"code {self.loaded[name].scoring}"
            for name, goal in self.goals.items()
        }


@dataclass(frozen=True)
class TaskQuestions:
    """The questions of lm-eval's tasks, ready to be asked."""

    search: LmEvalEvaluator
    heldout: LmEvalEvaluator | None  # None: none is held out
    goals: Goals
    scoring: Mapping[str, str]  # task → what its scores mean
    notes: Sequence[str]  # what the user should know of them
    batch_size: int | str = 16
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    explanation: str = ""  # lm-eval's metrics explain themselves

    def open_model(self, model: TransformersModel, *, tokens: int | None) -> HarnessModel:
        """Make a live model and all questions ready for each other.

        Raises:
            TaskError: one that the model cannot take.
        """
        harness = HarnessModel(model, batch_size=self.batch_size, tokens=tokens)
        self.search.prepare(harness)
        if self.heldout is not None:
            self.heldout.prepare(harness)
            self.heldout.is_checked = True  # if the questions of the search are
        return harness

    def resume(self, finished: Collection[int]) -> None:
        """Metrics are looked at with the first trial, or never: a search that is under way is not to be lost."""
        self.search.is_checked = bool(finished)

    def cost(self) -> str:
        """Free."""
        return ""


def open_tasks(config: JglueConfig) -> Tasks:
    """Load the tasks of a configuration and choose their metrics, which no model is needed for.

    Raises:
        ConfigError: a setting names a task that is not asked.
        TaskError: a task that cannot be loaded or scored.
    """
    task_dir = None if config.task_dir is None else local_path(config.task_dir, flag="--task_dir")
    jglue_data = None if config.jglue_data is None else local_path(config.jglue_data, flag="--jglue_data")
    loaded = load_tasks(config.tasks, task_dir=task_dir, jglue_data=jglue_data, num_fewshot=config.shots)
    metrics = _by_task(config.metrics, loaded.values(), flag="--task_metric")
    weights = _by_task(config.task_weights, loaded.values(), flag="--task_weight")
    entries = [task.entry for task in loaded.values()]
    measures, goals = {}, {}
    for name, task in loaded.items():
        measures[name] = choose_measure(name, task.task, metrics.get(name))
        # The tasks of a group share the group's weight: one of fifty tasks is to count as much as any other entry.
        share = 1 if name in config.task_weights else 1 / entries.count(task.entry)
        goals[name] = measures[name].goal(weight=weights.get(name, 1.0) * share)
    if not any(goal.weight for goal in goals.values()):
        raise ConfigError("--task_weight leaves no task a weight: at least one must count")
    return Tasks(loaded=loaded, measures=measures, goals=goals)


def ask_questions(config: JglueConfig, tasks: Tasks, tokenizer: PreTrainedTokenizerBase) -> TaskQuestions:
    """Choose the questions of each task and build all their requests.

    Args:
        config: of the run.
        tasks: of the run.
        tokenizer: of the target model, whose template makes chats.

    Raises:
        ConfigError: a chat template is asked for, and there is none.
        TaskError: a question that cannot be put, or too few of them.
    """
    chat = _chat(config, tokenizer)
    splits = _splits(config, tasks)
    notes = _how_many(config, tasks, splits)
    for name, task in tasks.loaded.items():
        notes += _notes(config, task, n_search=len(splits[name].search), goal=tasks.goals[name])
    searched = {name: split.search for name, split in splits.items()}
    heldout = {name: split.heldout for name, split in splits.items()}
    n_stages = len(STAGES) if config.pruner != "none" else 0
    stages = [{name: split.stages[stage] for name, split in splits.items()} for stage in range(n_stages)]

    def evaluator(
        questions: Mapping[str, Sequence[int]], stages: Sequence[Mapping[str, Sequence[int]]] = ()
    ) -> LmEvalEvaluator:
        return LmEvalEvaluator(
            tasks=tasks.loaded,
            questions=questions,
            measures=tasks.measures,
            chat=chat,
            seed=config.question_seed,
            stages=stages,
        )

    if chat.tokenizer is not None and config.system_instruction and not chat.takes_system:
        notes.append("the chat template takes no system message: --system_instruction is left out")
    search = evaluator(searched, stages)
    for name, n in search.n_without_answer.items():
        notes.append(f"task {name}: {n} of its questions have no right choice: every answer to them is wrong")
    return TaskQuestions(
        search=search,
        heldout=evaluator(heldout) if config.holdout else None,
        goals=tasks.goals,
        scoring=tasks.scoring,
        notes=notes,
        batch_size=config.batch_size,
    )


def _splits(config: JglueConfig, tasks: Tasks) -> dict[str, Split]:
    """Which questions of each task are asked when."""
    sizes = {name: len(task.questions) for name, task in tasks.loaded.items()}
    kept_out = {name: n_heldout(n, config.holdout) for name, n in sizes.items()}
    weights = {name: goal.weight for name, goal in tasks.goals.items()}
    limits: Mapping[str, int | None]
    if config.limits is not None:
        limits = {name: config.limits[task.entry] for name, task in tasks.loaded.items()}
    else:
        left = {name: n - kept_out[name] for name, n in sizes.items()}
        limits = share_out(N_QUESTIONS, available=left, weights=weights, least=LEAST_QUESTIONS)
    most = sum(kept_out.values()) if config.most_heldout is None else config.most_heldout
    asked = share_out(most, available=kept_out, weights=weights, least=LEAST_QUESTIONS)
    return {
        name: split_questions(
            name=name,
            n_questions=sizes[name],
            holdout=config.holdout,
            limit=limits[name],
            seed=config.question_seed,
            labels=task.labels,
            heldout_limit=asked[name] if config.most_heldout is not None else None,
        )
        for name, task in tasks.loaded.items()
    }


def _how_many(config: JglueConfig, tasks: Tasks, splits: Mapping[str, Split]) -> list[str]:
    """How many questions are asked when, and why."""
    sizes = {name: len(task.questions) for name, task in tasks.loaded.items()}
    n_out = sum(n_heldout(n, config.holdout) for n in sizes.values())
    n_asked = sum(len(split.search) for split in splits.values())
    n_asked_out = sum(len(split.heldout) for split in splits.values())
    notes = []
    if config.limits is None:
        notes.append(why_so_many(n_asked, sum(sizes.values()) - n_out, flag="--jglue_limit"))
    return notes + ([why_so_few_heldout(n_asked_out, n_out)] if n_asked_out < n_out else [])


def _chat(config: JglueConfig, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    if config.apply_chat_template and not tokenizer.chat_template:
        raise ConfigError("--apply_chat_template: the target's tokenizer has no chat template")
    return ChatFormat(
        system_instruction=config.system_instruction,
        tokenizer=tokenizer if config.apply_chat_template else None,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
    )


def _notes(config: JglueConfig, task: LoadedTask, *, n_search: int, goal: TaskGoal) -> list[str]:
    limit, shots = (config.limits or {}).get(task.entry), config.shots[task.entry]
    used = task.task.get_config("num_fewshot")
    notes = []
    if limit is not None and limit > n_search:
        notes.append(f"task {task.name}: the limit of {limit} is more than the {n_search} questions left to search on")
    if shots is not None and shots != used:
        notes.append(f"task {task.name}: is asked with {used} examples, as it says itself, not {shots}")
    if not goal.higher_is_better:
        notes.append(f"task {task.name}: {goal.metric} is minimised")
    return notes


def _by_task(chosen: Mapping[str, _Value], tasks: Iterable[LoadedTask], *, flag: str) -> dict[str, _Value]:
    """The setting of each task: its own, or that of the group that named it."""
    tasks = list(tasks)
    known = {name for task in tasks for name in (task.name, task.entry, *task.groups)}
    if unknown := sorted(set(chosen) - known):
        raise ConfigError(f"{flag} {unknown[0]}: no such task is asked, they are {', '.join(sorted(known))}")
    return {
        task.name: chosen[name] for task in tasks for name in (task.entry, *task.groups, task.name) if name in chosen
    }
