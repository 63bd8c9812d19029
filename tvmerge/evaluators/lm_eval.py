"""Tasks of EleutherAI's lm-evaluation-harness, scored in process on the live model.

Requests are built once. A trial costs the model's forward passes and the tasks' own scoring, nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from tvmerge.errors import RunError, TaskError
from tvmerge.evaluators import AfterStage, Progress, QuestionScore, Scored, unscored_questions
from tvmerge.evaluators.choices import NotPlainError, PlainChoices, is_plain_choice
from tvmerge.evaluators.harness import Answers, HarnessModel, check_numbers, is_none
from tvmerge.evaluators.measure import Measure, choose_measure
from tvmerge.evaluators.prompts import ChatFormat, Question, hint, put_questions
from tvmerge.evaluators.tasks import FEWSHOT_SEED, LoadedTask, one_line

__all__ = ["LmEvalEvaluator"]


_Int64s = npt.NDArray[np.int64]
#: Requests, and a model's answers to them.
_Answered = tuple[Sequence[Instance], Sequence[Any]]
#: What lm-eval asks of a model.
REQUEST_TYPES = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass(frozen=True)
class _Prepared:
    """Requests of one type, ready for a model."""

    instances: list[Instance]
    answers: Answers
    owners: _Int64s  # which question each request is of
    spans: Mapping[str, slice]  # task → its requests


class LmEvalEvaluator:
    """Scores a model on some questions of some tasks. Requests are built here, once.

    Args:
        tasks: name → task, as `load_tasks` gives them.
        questions: task name → sorted indices of its questions, never empty.
        measures: task name → the metric that scores it; the task's first one if it is not named.
        chat: how prompts are put.
        seed: added to lm-eval's own seed of the draws of tasks that sample their answers.
        stages: a division of the questions, which are then asked one part after the other; none: all at once.

    Raises:
        TaskError: a question that the task's own templates cannot put, or a task without a metric.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, LoadedTask],
        questions: Mapping[str, Sequence[int]],
        measures: Mapping[str, Measure] | None = None,
        chat: ChatFormat | None = None,
        seed: int = 0,
        stages: Sequence[Mapping[str, Sequence[int]]] = (),
    ) -> None:
        self._tasks = {name: loaded.task for name, loaded in tasks.items()}
        self._seed = seed
        chosen = measures or {}
        self._measures = {
            name: chosen[name] if name in chosen else choose_measure(name, task) for name, task in self._tasks.items()
        }
        self._questions: dict[str, list[Question]] = {}
        for name, loaded in tasks.items():
            try:
                self._questions[name] = list(put_questions(loaded, set(questions[name]), chat or ChatFormat()))
            except Exception as error:
                raise TaskError(f"task {name}: a question cannot be put: {one_line(error)}{hint(loaded)}") from error
        self._choices: dict[str, PlainChoices] = {}
        for name in self._tasks:
            try:
                for part in self._filter(name).filters:
                    part()  # refuses what it cannot work with
                if choices := self._plain_choices(name):
                    self._choices[name] = choices
                else:
                    self._try_out(name)
            except (TaskError, RunError) as error:
                raise TaskError(str(error)) from error
            except Exception as error:
                raise TaskError(f"task {name}: its answers cannot be scored: {one_line(error)}") from error
        #: Whether it is known that metrics of the tasks' own code are means over questions.
        self.is_checked = False
        self._items: dict[tuple[str, int], tuple[list[Any], Any]] = {}  # of the last answers to each question
        self._prepared: tuple[HarnessModel, list[_Prepared]] | None = None
        parts = [self._part(stage) for stage in stages]
        self._parts = [part for part in parts if part.n_questions] or [self]
        self._units: dict[str, float] = {}

    def _part(self, stage: Mapping[str, Sequence[int]]) -> LmEvalEvaluator:
        """An evaluator of some of the questions."""
        part = copy.copy(self)
        part._parts = [part]
        wanted = {(name, index) for name, indices in stage.items() for index in indices}
        kept = {name: [q for q in known if (name, q.index) in wanted] for name, known in self._questions.items()}
        part._questions = {name: questions for name, questions in kept.items() if questions}
        made = {name: part._plain_choices(name) for name in part._questions if name in self._choices}
        part._choices = {name: choices for name, choices in made.items() if choices}
        return part

    def _plain_choices(self, name: str) -> PlainChoices | None:
        task, measure = self._tasks[name], self._measures[name]
        if not is_plain_choice(task, measure):
            return None
        try:
            return PlainChoices(task, measure, [question.doc for question in self._questions[name]])
        except NotPlainError:
            return None  # left to lm-eval's own scoring

    def _try_out(self, name: str) -> None:
        """Score a made-up answer, so that code which cannot do that is found before a model answers."""
        question, measure = self._questions[name][0], self._measures[name]
        made_up = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0, "generate_until": ""}
        for request in question.requests:
            request.resps = [made_up[request.request_type]] * request.repeats
            request.filtered_resps = {}
        self._filter(name).apply(list(question.requests))
        answers = [request.filtered_resps[measure.filter] for request in question.requests]
        results = _results(self._tasks[name], question, answers)
        if measure.metric not in results:
            known = ", ".join(map(str, results))
            raise TaskError(f"task {name}: gives no {measure.metric} for a question, only {known or 'nothing'}")
        measure.values([results[measure.metric]])

    @property
    def n_without_answer(self) -> dict[str, int]:
        """Task → how many of its questions have no right choice, of those tasks that have such."""
        return {name: n for name, choices in self._choices.items() if (n := choices.n_without_answer)}

    @property
    def n_questions(self) -> int:
        """How many questions one call of `score` scores."""
        return sum(len(questions) for questions in self._questions.values())

    @property
    def fingerprint(self) -> str:
        """A digest of every request: prompts, few-shot examples, answers, generation settings."""
        digest = hashlib.sha256()
        for name, questions in self._questions.items():
            for question in questions:
                for instance in question.requests:
                    kind, arguments = instance.request_type, list(instance.args)
                    asked = [name, question.index, instance.idx, kind, arguments, instance.doc]
                    digest.update(json.dumps(asked, default=str, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def prepare(self, model: HarnessModel) -> None:
        """Make the requests ready for a model, as the first `score` would.

        Raises:
            TaskError: a request that the model cannot take.
        """
        for part in self._parts:
            part._prepare(model)

    def _prepare(self, model: HarnessModel) -> None:
        asked = [question for questions in self._questions.values() for question in questions]
        self._n_requests = np.array([sum(r.repeats for r in question.requests) for question in asked], np.int64)
        self._prepared = (
            model,
            [
                self._lay_out(requests, model.prepare(kind, requests))
                for kind in REQUEST_TYPES
                if (requests := self.requests(kind))
            ],
        )

    def _lay_out(self, requests: list[Instance], answers: Answers) -> _Prepared:
        owner = {
            id(request): index
            for index, question in enumerate(q for questions in self._questions.values() for q in questions)
            for request in question.requests
        }
        spans: dict[str, slice] = {}  # requests are in the order of tasks
        for index, request in enumerate(requests):
            start = spans[request.task_name].start if request.task_name in spans else index
            spans[request.task_name] = slice(start, index + 1)
        owners = np.array([owner[id(request)] for request in requests], np.int64)
        return _Prepared(requests, answers, owners, spans)

    def requests(self, request_type: str) -> list[Instance]:
        """All requests of a type; one that is to be answered several times stands in it several times."""
        return [
            instance
            for questions in self._questions.values()
            for question in questions
            for instance in question.requests
            if instance.request_type == request_type
            for _ in range(instance.repeats)
        ]

    @property
    def n_scores(self) -> int:
        """One for each question."""
        return self.n_questions

    def score(
        self, model: HarnessModel, progress: Progress, *, name: str = "", after_stage: AfterStage | None = None
    ) -> Scored:
        """Score every question once, in the order of tasks and indices.

        Args:
            model: to ask.
            progress: told how many questions are done.
            name: of the model; nothing but scores is kept here.
            after_stage: told what is scored so far, if there are stages.

        Raises:
            RunError: a task's own code failed on an answer, or the model gives NaN to too many questions.
            TaskError: a task's metric gives no score to a question.
        """
        found: dict[tuple[str, int], Any] = {}
        answers: dict[str, list[_Answered]] = {name: [] for name in self._tasks}
        for number, part in enumerate(self._parts):
            if number and after_stage is not None:
                after_stage(number - 1, self._scored(found))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(FEWSHOT_SEED + self._seed)
                answered = part._answer(model, progress)
            for task, those in answered.items():
                answers[task] += those
            check_numbers(answers, n_questions=self.n_questions)
            for task, those in answered.items():
                items = part._items_of(task, those)
                found.update(zip(((task, q.index) for q in part._questions[task]), items, strict=True))
        scored = self._scored(found)
        self.is_checked = True
        return scored

    def _scored(self, found: Mapping[tuple[str, int], Any]) -> Scored:
        """Scores in the order of tasks and indices.

        Args:
            found: task and index → the item of those questions that are answered.
        """
        scores: list[QuestionScore] = []
        for name, questions in self._questions.items():
            indices = [question.index for question in questions if (name, question.index) in found]
            items = values = [found[name, index] for index in indices]
            if name not in self._choices:
                measure, is_all = self._measures[name], len(items) == len(questions)
                if not self.is_checked:
                    measure.check(items)
                values = measure.values(items, unit=None if is_all else self._unit(name))
            scores += [QuestionScore(name, index, value) for index, value in zip(indices, values, strict=True)]
        n, of = unscored_questions(scores)
        return Scored(scores, {"unscored": n / of} if n else {})

    def _unit(self, name: str) -> float | None:
        """How long a task's questions are, if long ones count more: of all, so that it is the same after each stage."""
        measure = self._measures[name]
        if measure.is_weighted and name not in self._units:
            made_up = [[-1.0] * len(question.requests) for question in self._questions[name]]
            pairs = zip(self._questions[name], made_up, strict=True)
            items = [_results(self._tasks[name], question, answers).get(measure.metric) for question, answers in pairs]
            self._units[name] = measure.unit(items)
        return self._units.get(name)

    def _answer(self, model: HarnessModel, progress: Progress) -> dict[str, list[_Answered]]:
        """The model's answers to the requests of each task."""
        if self._prepared is None or self._prepared[0] is not model:
            self._prepare(model)
        assert self._prepared is not None
        left = self._n_requests.copy()  # of each question, unanswered
        answered: dict[str, list[_Answered]] = {name: [] for name in self._questions}
        for prepared in self._prepared[1]:

            def done(indices: Sequence[int], owners: _Int64s = prepared.owners) -> None:
                before = np.count_nonzero(left)
                np.subtract.at(left, owners[np.asarray(indices, np.int64)], 1)
                progress(int(before - np.count_nonzero(left)))

            found = prepared.answers(done)
            for name, span in prepared.spans.items():
                answered[name].append((prepared.instances[span], found[span]))
        return answered

    def _items_of(self, name: str, answered: Sequence[_Answered]) -> Sequence[Any]:
        """What the metric of a task makes of each of its questions; of plain choices the score."""
        if name in self._choices:
            return self._choices[name].scores(np.array([answer[0] for _, answers in answered for answer in answers]))
        questions, measure = self._questions[name], self._measures[name]
        pairs = [pair for instances, answers in answered for pair in zip(instances, answers, strict=True)]
        for instance, _ in pairs:
            # Left in place, an earlier trial's answers would be scored again.
            instance.resps, instance.filtered_resps = [], {}
        for instance, answer in pairs:
            instance.resps.append("" if answer is None else answer)
        unanswered = {id(instance) for instance, answer in pairs if is_none(answer)}
        instances = [instance for question in questions for instance in question.requests]
        self._filter(name).apply(instances)
        items: list[Any] = []
        for question in questions:
            if any(id(instance) in unanswered for instance in question.requests):
                items.append(None)
                continue
            answers = [instance.filtered_resps[measure.filter] for instance in question.requests]
            items.append(self._item(name, question, answers))
        return items

    def _filter(self, name: str) -> Any:
        """What makes answers of a model's texts, for the metric of a task."""
        return next(each for each in self._tasks[name]._filters if each.name == self._measures[name].filter)

    def _item(self, name: str, question: Question, answers: list[Any]) -> Any:
        """What the task's metric makes of the answers to a question."""
        task, metric = self._tasks[name], self._measures[name].metric
        # A task's own code may do what it likes; lm-eval's gives the same for the same text, in every trial.
        if task.OUTPUT_TYPE != "generate_until" or _has_own_results(task):
            return _results(task, question, answers).get(metric)
        key = name, question.index
        if key not in self._items or self._items[key][0] != answers:
            self._items[key] = answers, _results(task, question, answers).get(metric)
        return self._items[key][1]


def _results(task: Any, question: Question, answers: list[Any]) -> Mapping[str, Any]:
    """What the task makes of the answers to a question: metric → its item."""
    # A task's own code may write into the question; lm-eval's does not.
    doc = copy.deepcopy(question.doc) if _has_own_results(task) else question.doc
    try:
        results = task.process_results(doc, answers)
        if not isinstance(results, Mapping):
            raise TypeError(f"process_results must give a mapping, metric → value, got {results!r}")
    except Exception as error:
        raise RunError(f"task {question.task}, question {question.index}: {one_line(error)}") from error
    return results


def _has_own_results(task: Any) -> bool:
    """Whether code of the task's own scores answers."""
    plain = isinstance(task, ConfigurableTask) and type(task).process_results is ConfigurableTask.process_results
    own_metric = any(callable(each["metric"]) for each in task.get_config("metric_list") or [])
    return not plain or own_metric or callable(task.config.process_results)
