"""Tasks of EleutherAI's lm-evaluation-harness, scored in process on the live model.

Requests are built once. A trial costs the model's forward passes and the tasks' own scoring, nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerBase

from tvmerge.errors import RunError, TaskError
from tvmerge.evaluators import Progress, QuestionScore, Scored, unscored_questions
from tvmerge.evaluators.choices import NotPlainError, PlainChoices, is_plain_choice
from tvmerge.evaluators.harness import Answers, HarnessModel, check_numbers, is_none
from tvmerge.evaluators.measure import Measure, choose_measure
from tvmerge.evaluators.tasks import FEWSHOT_SEED, LoadedTask, one_line

__all__ = ["ChatFormat", "LmEvalEvaluator"]


_Int64s = npt.NDArray[np.int64]
#: Requests, and a model's answers to them.
_Answered = tuple[Sequence[Instance], Sequence[Any]]
#: What lm-eval asks of a model.
REQUEST_TYPES = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass(frozen=True)
class ChatFormat:
    """How a prompt is put: as it is, or as a chat."""

    system_instruction: str | None = None  # goes before the task's own description
    tokenizer: PreTrainedTokenizerBase | None = None  # whose chat template is applied; None: none is
    fewshot_as_multiturn: bool = True  # examples as turns of the chat, not as one text

    def settings(self) -> dict[str, Any]:
        """As lm-eval's tasks take them."""
        return {
            "system_instruction": self.system_instruction,
            "apply_chat_template": self.tokenizer is not None,
            "fewshot_as_multiturn": self.tokenizer is not None and self.fewshot_as_multiturn,
            "chat_template": None if self.tokenizer is None else self.render,
        }

    @property
    def takes_system(self) -> bool:
        """Whether the chat template takes a message of the system."""
        assert self.tokenizer is not None
        try:
            chat = [{"role": role, "content": "a"} for role in ("system", "user")]
            self.tokenizer.apply_chat_template(chat, tokenize=False)
        except jinja2.TemplateError:
            return False
        return True

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; without the system's message if the template refuses one, as in lm-eval."""
        assert self.tokenizer is not None
        settings = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self.tokenizer.apply_chat_template(messages, **settings))
        except jinja2.TemplateError:
            rest = [message for message in messages if message["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(rest, **settings))


@dataclass(frozen=True)
class _Question:
    """A question of a task and its requests, one for each choice."""

    task: str
    index: int
    doc: Mapping[str, Any]
    requests: Sequence[Instance]


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
    ) -> None:
        self._tasks = {name: loaded.task for name, loaded in tasks.items()}
        self._seed = seed
        chosen = measures or {}
        self._measures = {
            name: chosen[name] if name in chosen else choose_measure(name, task) for name, task in self._tasks.items()
        }
        self._questions: dict[str, list[_Question]] = {}
        for name, loaded in tasks.items():
            try:
                self._questions[name] = list(_put(loaded, set(questions[name]), chat or ChatFormat()))
            except Exception as error:
                raise TaskError(f"task {name}: a question cannot be put: {one_line(error)}{_hint(loaded)}") from error
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
        self._n_requests = np.array(
            [sum(r.repeats for r in q.requests) for questions in self._questions.values() for q in questions], np.int64
        )
        self._prepared: tuple[HarnessModel, list[_Prepared]] | None = None

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

    def score(self, model: HarnessModel, progress: Progress, *, name: str = "") -> Scored:
        """Score every question once, in the order of tasks and indices.

        Args:
            model: to ask.
            progress: told how many questions are done.
            name: of the model; nothing but scores is kept here.

        Raises:
            RunError: a task's own code failed on an answer, or the model gives NaN to too many questions.
            TaskError: a task's metric gives no score to a question.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(FEWSHOT_SEED + self._seed)
            answers = self._answer(model, progress)
        check_numbers(answers, n_questions=self.n_questions)
        scores = []
        for name, questions in self._questions.items():
            values = self._values(name, answers[name])
            scores += [QuestionScore(name, question.index, v) for question, v in zip(questions, values, strict=True)]
        self.is_checked = True
        n, of = unscored_questions(scores)
        return Scored(scores, {"unscored": n / of} if n else {})

    def _answer(self, model: HarnessModel, progress: Progress) -> dict[str, list[_Answered]]:
        """The model's answers to the requests of each task."""
        if self._prepared is None or self._prepared[0] is not model:
            self.prepare(model)
        assert self._prepared is not None
        left = self._n_requests.copy()  # of each question, unanswered
        answered: dict[str, list[_Answered]] = {name: [] for name in self._tasks}
        for prepared in self._prepared[1]:

            def done(indices: Sequence[int], owners: _Int64s = prepared.owners) -> None:
                before = np.count_nonzero(left)
                np.subtract.at(left, owners[np.asarray(indices, np.int64)], 1)
                progress(int(before - np.count_nonzero(left)))

            found = prepared.answers(done)
            for name, span in prepared.spans.items():
                answered[name].append((prepared.instances[span], found[span]))
        return answered

    def _values(self, name: str, answered: Sequence[_Answered]) -> Sequence[float | None]:
        """The score of each question of a task."""
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
        if not self.is_checked:
            measure.check(items)
        return measure.values(items)

    def _filter(self, name: str) -> Any:
        """What makes answers of a model's texts, for the metric of a task."""
        return next(each for each in self._tasks[name]._filters if each.name == self._measures[name].filter)

    def _item(self, name: str, question: _Question, answers: list[Any]) -> Any:
        """What the task's metric makes of the answers to a question."""
        task, metric = self._tasks[name], self._measures[name].metric
        # A task's own code may do what it likes; lm-eval's gives the same for the same text, in every trial.
        if task.OUTPUT_TYPE != "generate_until" or _has_own_results(task):
            return _results(task, question, answers).get(metric)
        key = name, question.index
        if key not in self._items or self._items[key][0] != answers:
            self._items[key] = answers, _results(task, question, answers).get(metric)
        return self._items[key][1]


def _put(loaded: LoadedTask, asked: set[int], chat: ChatFormat) -> Iterator[_Question]:
    """Put questions as lm-eval would put all of the task's: each has the same examples, whatever else is asked."""
    task = loaded.task
    settings = chat.settings()
    n = task.get_config("num_fewshot") or 0
    task.set_fewshot_seed(FEWSHOT_SEED)
    for index, doc in enumerate(loaded.questions[: max(asked) + 1]):
        if index not in asked and type(task).fewshot_context is ConfigurableTask.fewshot_context:
            if n:  # drawn for the questions between, as lm-eval does
                own = task.fewshot_cfg.split == task.config.test_split
                task.sampler.sample(n=n, eval_doc=doc if own else None)
            continue
        context = task.fewshot_context(doc, num_fewshot=n, gen_prefix=task.doc_to_prefix(doc), **settings)
        if index not in asked:
            continue
        metadata = (loaded.name, index, task.config.repeats)
        template = {key: settings[key] for key in ("apply_chat_template", "chat_template")}
        requests = task.construct_requests(doc=doc, ctx=context, metadata=metadata, **template)
        yield _Question(loaded.name, index, doc, requests if isinstance(requests, list) else [requests])


def _results(task: Any, question: _Question, answers: list[Any]) -> Mapping[str, Any]:
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


def _hint(loaded: LoadedTask) -> str:
    """What may be wrong if a question cannot be put."""
    wanted, pool = loaded.task.get_config("num_fewshot") or 0, getattr(getattr(loaded.task, "sampler", None), "df", ())
    return f" ({wanted} examples are asked for, of {len(pool)})" if wanted > len(pool) else ""


def _has_own_results(task: Any) -> bool:
    """Whether code of the task's own scores answers."""
    plain = isinstance(task, ConfigurableTask) and type(task).process_results is ConfigurableTask.process_results
    own_metric = any(callable(each["metric"]) for each in task.get_config("metric_list") or [])
    return not plain or own_metric or callable(task.config.process_results)
