"""Tasks of EleutherAI's lm-evaluation-harness, scored in process on the live model.

Tasks and requests are built once. A trial costs the model's forward passes and the tasks' own scoring, nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tvmerge.errors import TaskError
from tvmerge.evaluators import Progress, QuestionScore
from tvmerge.models.transformers import TransformersModel

__all__ = ["HarnessModel", "LmEvalEvaluator", "Split", "load_tasks", "split_questions"]

#: The metric that scores a task: the first of these that it has.
ACCURACY_METRICS = ("acc", "exact_match")
#: lm-eval draws few-shot examples from Random(None) unless told otherwise; this is the seed of its command line.
FEWSHOT_SEED = 1234


class HarnessModel(HFLM):  # type: ignore[misc]  # lm_eval ships no types
    """lm-eval's wrapper of a transformers model, which tokenises a text once and not in every trial."""

    def __init__(self, model: TransformersModel, *, batch_size: int) -> None:
        super().__init__(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size)
        self._encoded: dict[Any, list[int]] = {}

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a text, remembered."""
        key = (string, add_special_tokens, left_truncate_len, *sorted(kwargs.items()))
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return list(self._encoded[key])


def load_tasks(names: Sequence[str], *, task_dir: Path | None) -> dict[str, ConfigurableTask]:
    """Load tasks by name, with their questions.

    Args:
        names: tasks of lm-eval or of `task_dir`.
        task_dir: a folder of lm-eval YAML files; its names go before those of lm-eval.

    Raises:
        TaskError: an unknown name, a group, or a task that has no data here or no accuracy.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager = _task_manager(frozenset(names), task_dir)
    tasks = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:
            raise TaskError(f"task {name}: cannot be loaded: {_one_line(error)}") from error
        if list(loaded["tasks"]) != [name]:
            raise TaskError(f"task {name}: is a group, name its tasks instead: {', '.join(loaded['tasks'])}")
        tasks[name] = loaded["tasks"][name]
        _check_task(name, tasks[name])
        tasks[name].set_fewshot_seed(FEWSHOT_SEED)
    return tasks


@functools.cache
def _task_manager(names: frozenset[str], task_dir: Path | None) -> TaskManager:
    local: list[str] = []
    if task_dir is not None:
        if not task_dir.is_dir():
            raise TaskError(f"--task_dir {task_dir}: no such folder")
        manager = TaskManager(include_path=str(task_dir), include_defaults=False)
        local = sorted(manager.all_tasks)
        if names <= set(local):
            return manager
    # The index of lm-eval's own tasks takes ten seconds: made only when a name asks for it.
    manager = TaskManager(include_path=None if task_dir is None else str(task_dir))
    unknown = sorted(names - set(manager.all_tasks))
    if unknown:
        here = f", in {task_dir} are {', '.join(local)}" if local else ""
        raise TaskError(f"unknown tasks: {', '.join(unknown)}: `lm_eval ls tasks` lists those of lm-eval{here}")
    return manager


def _check_task(name: str, task: ConfigurableTask) -> None:
    metrics = [entry["metric"] for entry in task.config.metric_list or []]
    if not any(metric in ACCURACY_METRICS for metric in metrics):
        raise TaskError(
            f"task {name}: has no accuracy to maximise ({' or '.join(ACCURACY_METRICS)}), only "
            f"{', '.join(map(str, metrics)) or 'no metric at all'}"
        )
    if len(task.eval_docs) == 0:
        raise TaskError(f"task {name}: has no questions")


@dataclass(frozen=True)
class Split:
    """The questions of one task, as sorted indices."""

    search: Sequence[int]  # that a search sees
    heldout: Sequence[int]  # to judge what it found


def split_questions(*, name: str, n_questions: int, holdout: float, limit: int | None, seed: int) -> Split:
    """Split a task's questions by seed.

    Args:
        name: the task's name, which seeds its own shuffle.
        n_questions: how many the task has.
        holdout: the share that is held out, in [0, 1).
        limit: the most questions that the search sees; None for all that are not held out.
        seed: of the shuffle.

    Raises:
        TaskError: too few questions to have both.
    """
    order = list(range(n_questions))
    random.Random(f"{seed}/{name}").shuffle(order)
    n_heldout = round(holdout * n_questions)
    heldout, rest = order[:n_heldout], order[n_heldout:]
    if not rest or (holdout > 0 and not heldout):
        raise TaskError(f"task {name}: {n_questions} questions are too few to hold out a share of {holdout}")
    return Split(search=sorted(rest[:limit]), heldout=sorted(heldout))


class LmEvalEvaluator:
    """Scores a model on some questions of some tasks. Requests are built here, once.

    Args:
        tasks: name → task, as `load_tasks` gives them; they belong to this evaluator from now on.
        questions: task name → sorted indices of its questions, never empty.
        seed: of the draws of tasks that sample their answers.

    Raises:
        TaskError: a question that the task's own templates cannot put.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, ConfigurableTask],
        questions: Mapping[str, Sequence[int]],
        seed: int = 0,
    ) -> None:
        self._tasks = dict(tasks)
        self._questions = {name: list(questions[name]) for name in tasks}
        self._seed = seed
        for name, task in self._tasks.items():
            try:
                with redirect_stderr(io.StringIO()):  # a progress bar for each task
                    task.build_all_requests(samples=self._questions[name])
            except Exception as error:
                raise TaskError(f"task {name}: a question cannot be put: {_one_line(error)}") from error

    @property
    def n_questions(self) -> int:
        """How many questions one call of `score` scores."""
        return sum(len(questions) for questions in self._questions.values())

    @property
    def fingerprint(self) -> str:
        """A digest of every request: prompts, few-shot examples, answers, generation settings."""
        digest = hashlib.sha256()
        for name, task in self._tasks.items():
            for instance in task.instances:
                question = self._questions[name][instance.doc_id]
                asked = [name, question, instance.idx, instance.request_type, list(instance.args), instance.doc]
                digest.update(json.dumps(asked, default=str, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def score(self, model: HarnessModel, progress: Progress) -> list[QuestionScore]:
        """Score every question once, in the order of tasks and indices."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self._run(model, progress)
        return [score for name in self._tasks for score in self._collect(name)]

    def _run(self, model: HarnessModel, progress: Progress) -> None:
        done: set[tuple[str, int]] = set()
        requests: dict[str, list[Instance]] = {}
        for task in self._tasks.values():
            for instance in task.instances:
                # Left in place, an earlier trial's answers would be scored again.
                instance.resps, instance.filtered_resps = [], {}
                requests.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
        for request_type, instances in requests.items():
            waiting = iter(instances)
            # Long enough for lm-eval to sort by length inside of it, short enough for the bar to move.
            while chunk := list(islice(waiting, 16 * model.batch_size)):
                answers = getattr(model, request_type)(chunk, disable_tqdm=True)
                for instance, answer in zip(chunk, answers, strict=True):
                    instance.resps.append(answer)
                asked = {(instance.task_name, instance.doc_id) for instance in chunk}
                progress(len(asked - done))
                done |= asked

    def _collect(self, name: str) -> list[QuestionScore]:
        task, questions = self._tasks[name], self._questions[name]
        task.apply_filters()
        by_question: dict[int, list[Instance]] = {}
        for instance in task.instances:
            by_question.setdefault(instance.doc_id, []).append(instance)
        key = next(iter(task.instances[0].filtered_resps))
        scores = []
        # Position in `samples`, not the index: the iterator counts from 0 over the questions that were asked for.
        for position, doc in task.doc_iterator(samples=questions):
            instances = sorted(by_question[position], key=lambda instance: instance.idx)
            answers = [instance.filtered_resps[key] for instance in instances]
            # Of likelihoods that are no numbers lm-eval takes the first as the greatest.
            score = None if any(map(_is_nan, answers)) else _accuracy(task.process_results(doc, answers))
            scores.append(QuestionScore(task=name, question=questions[position], score=score))
        return scores


def _accuracy(metrics: Mapping[str, Any]) -> float | None:
    """The accuracy of one question, None if the task gave none."""
    for metric in ACCURACY_METRICS:
        if metric in metrics:
            value = float(metrics[metric])
            return value if math.isfinite(value) else None
    return None


def _is_nan(answer: Any) -> bool:
    """Whether a model's answer is a log-likelihood that is no number."""
    return isinstance(answer, tuple) and isinstance(answer[0], float) and math.isnan(answer[0])


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
