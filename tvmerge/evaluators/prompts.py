"""How the questions of lm-eval's tasks are put to a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerBase

from tvmerge.evaluators.tasks import FEWSHOT_SEED, LoadedTask

__all__ = ["ChatFormat", "Question", "hint", "put_questions"]


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
class Question:
    """A question of a task and its requests, one for each choice."""

    task: str
    index: int
    doc: Mapping[str, Any]
    requests: Sequence[Instance]


def put_questions(loaded: LoadedTask, asked: set[int], chat: ChatFormat) -> Iterator[Question]:
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
        yield Question(loaded.name, index, doc, requests if isinstance(requests, list) else [requests])


def hint(loaded: LoadedTask) -> str:
    """What may be wrong if a question cannot be put."""
    wanted, pool = loaded.task.get_config("num_fewshot") or 0, getattr(getattr(loaded.task, "sampler", None), "df", ())
    return f" ({wanted} examples are asked for, of {len(pool)})" if wanted > len(pool) else ""
