"""Tasks of EleutherAI's lm-evaluation-harness: found, loaded and checked."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import json
import logging
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import datasets
import lm_eval.utils
import numpy as np
import torch
import yaml
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from tvmerge.errors import TaskError

__all__ = ["FEWSHOT_SEED", "LoadedTask", "load_tasks", "one_line"]

#: lm-eval draws few-shot examples from Random(None) unless told otherwise; this is the seed of its command line.
FEWSHOT_SEED = 1234
#: More labels than this are no labels, but answers.
MAX_LABELS = 20


@dataclass(frozen=True)
class LoadedTask:
    """A task and its questions."""

    name: str
    entry: str  # what the user named: the task, or a group or tag that it is of
    task: Task  # lm-eval's
    questions: Sequence[Mapping[str, Any]]
    groups: tuple[str, ...] = ()  # all that it is in, the largest first

    @property
    def labels(self) -> list[Hashable] | None:
        """The label of each question; None if it is no task of a few labels.

        Raises:
            TaskError: the task's own code fails on a question.
        """
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return None
        target = self.task.doc_to_text if getattr(self.task, "multiple_input", 0) else self.task.doc_to_target
        labels: list[Hashable] = []
        for index, question in enumerate(self.questions):
            try:
                label = target(question)
            except Exception as error:
                raise TaskError(f"task {self.name}, question {index}: {one_line(error)}") from error
            if not isinstance(label, (Integral, str)):
                return None
            labels.append(label if isinstance(label, str) else int(label))
        return labels if len(set(labels)) <= MAX_LABELS else None

    @property
    def scoring(self) -> str:
        """A digest of how the task makes scores of answers: its metrics, its filters, and code of its own."""
        config = self.task.config
        listed = [self.task.OUTPUT_TYPE, config.metric_list, config.filter_list]
        digest = hashlib.sha256(json.dumps(listed, default=lambda code: getattr(code, "__qualname__", "")).encode())
        metrics = [value for metric in config.metric_list or [] for value in metric.values()]
        for code in (type(self.task), config.process_results, *metrics):
            # The whole file, as functions call others of it. lm-eval's own class changes with lm-eval only.
            if callable(code) and code is not ConfigurableTask and (path := inspect.getsourcefile(code)):
                digest.update(Path(path).read_bytes())
        return digest.hexdigest()[:16]


def load_tasks(
    names: Sequence[str],
    *,
    task_dir: Path | None = None,
    jglue_data: Path | None = None,
    num_fewshot: Mapping[str, int | None] | None = None,
) -> dict[str, LoadedTask]:
    """Load tasks by name, with their questions.

    Args:
        names: tasks, groups or tags, of `task_dir`, of those that come with the code or of lm-eval, looked for in this
            order.
        task_dir: a folder of lm-eval YAML files.
        jglue_data: a folder with the data of the tasks that come with the code; None: it is downloaded.
        num_fewshot: name → number of examples in a prompt; None, or a name that is missing: what the task says. As in
            lm-eval, it does not change a task that says 0.

    Returns:
        Task → task. A group or tag becomes its tasks.

    Raises:
        TaskError: an unknown name, a task that is named twice, or one that has no data here, or whose data is broken.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    _compile_templates_once()
    manager = _task_manager(frozenset(names), task_dir, jglue_data)
    tasks: dict[str, LoadedTask] = {}
    for entry in names:
        found, groups = _load(manager, entry)
        if not found:
            raise TaskError(f"task {entry}: is a group without a task")
        for task in found:
            name = task.task_name
            if name in tasks:
                raise TaskError(f"task {name}: is named twice, by {tasks[name].entry} and by {entry}")
            prepared = _prepare(name, entry, task, (num_fewshot or {}).get(entry))
            within = [group for group, members in groups.items() if name in members]
            tasks[name] = replace(prepared, groups=tuple(sorted(within, key=lambda group: -len(groups[group]))))
    return tasks


def one_line(error: BaseException) -> str:
    """An error of somebody else's code as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _load(manager: TaskManager, entry: str) -> tuple[list[Task], dict[str, set[str]]]:
    """The tasks of an entry, and of each group in it the names of its tasks."""
    try:
        with _seeded():
            loaded = manager.load([entry])
        groups = loaded.get("groups", {})
        members = {name: {task.task_name for task in group.get_all_tasks()} for name, group in groups.items()}
        return list(loaded["tasks"].values()), members
    except (ValueError, FileNotFoundError, ConnectionError) as error:  # of our own task files, and of datasets
        raise TaskError(f"task {entry}: {' '.join(str(error).split())[:400]}") from error
    except Exception as error:
        if isinstance(error, IndexError) and "size 0" in str(error):  # datasets, of the first question
            raise TaskError(f"task {entry}: has no questions: its split is empty") from error
        raise TaskError(f"task {entry}: cannot be loaded: {one_line(error)}") from error


def _prepare(name: str, entry: str, task: Task, num_fewshot: int | None) -> LoadedTask:
    for attribute, what in (("MULTIMODAL", "is of images or sounds"), ("UNSAFE_CODE", "runs code that a model wrote")):
        if getattr(task, attribute, False):
            raise TaskError(f"task {name}: {what}, which is not supported")
    repeats = task.get_config("repeats")
    if repeats is not None and not (isinstance(repeats, int) and repeats >= 1):
        raise TaskError(f"task {name}: repeats must be a whole number of at least 1, got {repeats!r}")
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    with _seeded():
        questions = list(task.eval_docs)
    if not questions:
        raise TaskError(f"task {name}: has no questions: its split is empty")
    for method in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        if hasattr(task, method):
            setattr(task, method, _remembered(getattr(task, method), questions))
    return LoadedTask(name=name, entry=entry, task=task, questions=questions)


def _remembered(function: Callable[..., Any], questions: Sequence[Any]) -> Callable[..., Any]:
    """A function that fills in a template of a question, called once for each: every trial would ask it again."""
    known = {id(question): question for question in questions}  # alive, so that nothing else gets their ids
    values: dict[int, Any] = {}

    @functools.wraps(function)
    def remembered(doc: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or id(doc) not in known:
            return function(doc, *args, **kwargs)
        if id(doc) not in values:
            values[id(doc)] = function(doc)
        return values[id(doc)]

    return remembered


def _compile_templates_once() -> None:
    """Keep lm-eval from compiling a template anew for every question."""
    environment = lm_eval.utils.env
    if not hasattr(environment.from_string, "cache_info"):
        environment.from_string = functools.lru_cache(maxsize=1024)(environment.from_string)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global generators as lm-eval's command line does, for tasks that shuffle with them, and restore them."""
    legacy = np.random.mtrand._rand  # the global generator, which a task's own code may draw from
    states = random.getstate(), legacy.get_state(), torch.get_rng_state()
    random.seed(0)
    legacy.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        legacy.set_state(states[1])
        torch.set_rng_state(states[2])


def _own_tasks() -> Path | None:
    """The folder of the tasks that come with the code: beside it in a clone, else in it."""
    package = Path(__file__).parents[1]
    folders = [root / "benchmarks" / "jglue" for root in (package.parent, package)]
    return next((folder for folder in folders if folder.is_dir()), None)


@functools.cache
def _task_manager(names: frozenset[str], task_dir: Path | None, jglue_data: Path | None) -> TaskManager:
    if task_dir is not None and not task_dir.is_dir():
        raise TaskError(f"--task_dir {task_dir}: no such folder")
    if jglue_data is not None and not jglue_data.is_dir():
        raise TaskError(f"--jglue_data {jglue_data}: no such folder")
    folders = [str(folder) for folder in (_own_tasks(), task_dir) if folder is not None]
    metadata = None if jglue_data is None else {"jglue_data": str(jglue_data)}
    try:
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    except Exception as error:  # a name that is no text
        raise TaskError(f"--task_dir {task_dir}: a file in it names no task: {one_line(error)}") from error
    ours = sorted(manager.all_tasks)
    if names <= set(ours):
        return manager
    # The index of lm-eval's own tasks takes ten seconds: made only when a name asks for it.
    manager = TaskManager(include_path=folders, metadata=metadata)
    if unknown := sorted(names - set(manager.all_tasks)):
        _check_files(task_dir)
        likely = difflib.get_close_matches(unknown[0], manager.all_tasks, n=1)
        hint = f" (is {likely[0]} meant?)" if likely else ""
        own = [name for name in ours if "-" not in name]  # those in the prompt styles of older scripts are many
        raise TaskError(
            f"unknown tasks: {', '.join(unknown)}{hint}: in {' and '.join(folders)} are {', '.join(own)}, and "
            "`lm_eval ls tasks` lists those of lm-eval"
        )
    return manager


def _check_files(task_dir: Path | None) -> None:
    """Refuse a file that lm-eval cannot read: it passes over it in silence, and its task is unknown."""
    for path in [] if task_dir is None else sorted(task_dir.glob("**/*.yaml")):
        try:
            document = yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise TaskError(f"{path}: cannot be read as YAML: {one_line(error)}") from error
        if not isinstance(document, yaml.MappingNode):
            raise TaskError(f"{path}: is no task: it must be a mapping with a key task")
        included = {key.value: value.value for key, value in document.value}.get("include")
        if isinstance(included, str) and not (path.parent / included).is_file():
            raise TaskError(f"{path}: includes {included}, which is not there")
