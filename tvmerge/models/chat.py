"""A live model that is asked questions and answers them."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from tvmerge.models.batching import START_TOKENS, TokenBudget, does_not_fit, is_out_of_memory
from tvmerge.models.chat_template import ChatTemplate
from tvmerge.models.generation import (
    DOES_NOT_FIT,
    NOT_FINITE,
    Answer,
    GenerationRequest,
    Generator,
    can_generate_here,
)
from tvmerge.models.sampling import Sampling, uniform
from tvmerge.models.stop_strings import answer_text
from tvmerge.models.transformers import TransformersModel

__all__ = ["ChatAnswer", "ChatModel", "ChatRequest", "max_length"]

#: Below it FastChat's answers are greedy.
_LEAST_TEMPERATURE = 1e-4
#: Tokens of prompts that are remembered, at 4 bytes each, beside their texts.
_REMEMBERED_TOKENS = 1 << 22
#: What a model takes, prompt and answer, where nothing says how much; as lm-eval has it.
_DEFAULT_LENGTH = 2048
_SLOW = (
    "answers are made by model.generate, one prompt at a time, which is slow: the model keeps no cache of the usual "
    "kind, or its generation_config.json has settings that are not known here"
)
#: Tokenizers that know no greatest length say a number like 10^30.
_NO_LENGTH = 10**18


@dataclass(frozen=True)
class ChatRequest:
    """One turn to answer."""

    messages: Sequence[Mapping[str, str]]  # `role` and `content` of all turns so far; the last one is the user's
    temperature: float  # 0: greedy
    seed: int  # of the draws; of no account if greedy


@dataclass(frozen=True)
class ChatAnswer:
    """What the model said."""

    text: str | None  # without special tokens, cut at stop strings, stripped; None: there is no answer
    reason: str | None  # why not
    n_tokens: int  # generated ones, what ended the answer included
    n_prompt: int = field(default=0, compare=False)  # tokens that it goes on from


class ChatModel:
    """A live model, a template, and how many tokens fit.

    Args:
        model: the live model and its tokenizer, with the weights of any real model of its kind: how it can generate is
            found out by trying, here and only here.
        template: how a chat is put to it.
        max_new_tokens: of an answer; fewer where the model takes no more.
        batch_size: requests at a time; `auto`: as many as fit. Both are halved when they do not.
        tokens: with `auto`, how many tokens of a batch an earlier process has found to fit.
        more_notes: gives what else the user should know, of a judge beside it.
    """

    def __init__(
        self,
        model: TransformersModel,
        *,
        template: ChatTemplate,
        max_new_tokens: int,
        batch_size: int | Literal["auto"],
        tokens: int | None = None,
        more_notes: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._more_notes = more_notes
        self._model, self._tokenizer, self._template = model.model, model.tokenizer, template
        self._max_new_tokens = max_new_tokens
        self._max_rows = None if batch_size == "auto" else batch_size
        start = START_TOKENS.get(model.model.device.type, START_TOKENS["cuda"]) if batch_size == "auto" else _NO_LENGTH
        #: Tokens at a time; with `auto` worth telling the next process.
        self.budget = TokenBudget(tokens if tokens and batch_size == "auto" else start)
        self._max_length = max_length(model.model.config, model.tokenizer)
        self._generator = Generator(model.tokenizer, alone=True)
        self._remembered: OrderedDict[str, array[int]] = OrderedDict()
        self._n_remembered = 0
        self._here = can_generate_here(model.model, drawn=True)

    @property
    def notes(self) -> list[str]:
        """What the user should know of how answers are made; there may be more after each trial."""
        slow = [] if self._here else [_SLOW]
        halved = self.budget.was_halved and self._max_rows is not None
        return [*slow, *([does_not_fit(self._max_rows or 0)] if halved else []), *self._more_notes()]

    def answer(
        self, requests: Sequence[ChatRequest], done: Callable[[int, ChatAnswer], None] | None = None
    ) -> list[ChatAnswer]:
        """Answer requests; what one is answered does not depend on the others.

        Args:
            requests: in any order.
            done: called with the index of a request and its answer as soon as it is there, in any order.

        Returns:
            The answers, in the order of the requests.
        """
        answers: dict[int, ChatAnswer] = {}

        def tell(index: int, answer: ChatAnswer) -> None:
            answers[index] = answer
            if done is not None:
                done(index, answer)

        asked: dict[int, GenerationRequest] = {}
        for index, request in enumerate(requests):
            made = self._prepare(request)
            if isinstance(made, str):
                tell(index, ChatAnswer(None, made, 0))
            else:
                asked[index] = made
        self._generate(asked, lambda index, answer: tell(index, self._chat_answer(asked[index], answer)))
        return [answers[index] for index in range(len(requests))]

    def _prepare(self, request: ChatRequest) -> GenerationRequest | str:
        """What the model is to go on from, or why it cannot."""
        try:
            prompt = self._encode(self._template.render(request.messages))
        except jinja2.TemplateError as error:
            return f"the chat template refuses this chat: {' '.join(str(error).split())}"
        room = self._max_length - len(prompt)
        if self._model.config.is_encoder_decoder:
            room = self._max_new_tokens if room >= 0 else 0  # the answer has a place of its own
        if room < 1:
            return f"prompt of {len(prompt)} tokens, the model takes {self._max_length}"
        if not prompt:
            return "prompt of 0 tokens"
        drawn = request.temperature >= _LEAST_TEMPERATURE
        return GenerationRequest(
            prompt=prompt,
            max_new_tokens=min(self._max_new_tokens, room),
            stop=self._template.stop,
            stop_ids=self._template.stop_token_ids,
            sampling=Sampling(request.temperature, request.seed) if drawn else None,
        )

    def _encode(self, text: str) -> array[int]:
        """Token ids of a prompt, remembered: the first turns are the same in all trials."""
        if text in self._remembered:
            self._remembered.move_to_end(text)
            return self._remembered[text]
        ids = self._remembered[text] = array("i", self._template.encode(self._tokenizer, text))
        self._n_remembered += len(ids)
        while self._n_remembered > _REMEMBERED_TOKENS and len(self._remembered) > 1:
            self._n_remembered -= len(self._remembered.popitem(last=False)[1])
        return ids

    def _generate(self, asked: Mapping[int, GenerationRequest], done: Callable[[int, Answer], None]) -> None:
        if not self._here:
            for index, request in asked.items():
                done(index, self._slowly(request))
            return
        indices = list(asked)
        self._generator.run(
            self._model,
            list(asked.values()),
            budget=self.budget,
            done=lambda row, answer: done(indices[row], answer),
            max_rows=self._max_rows,
        )

    def _chat_answer(self, request: GenerationRequest, answer: Answer) -> ChatAnswer:
        if answer.reason is not None:
            return ChatAnswer(None, answer.reason, len(answer.ids), len(request.prompt))
        ids = answer.ids
        # What ends an answer need not be a special token.
        if ids and (ids[-1] in request.stop_ids or ids[-1] in self._generator.ends(self._model)):
            ids = ids[:-1]
        text = answer_text(self._tokenizer, ids, request.stop).strip()
        return ChatAnswer(text, None, len(answer.ids), len(request.prompt))

    def _slowly(self, request: GenerationRequest) -> Answer:
        """The model's own way."""
        ends = self._generator.ends(self._model) | request.stop_ids
        settings: dict[str, Any] = {"do_sample": request.sampling is not None}
        if request.sampling is not None:
            # 0: as `Filters` has it, nothing is applied that the checkpoint does not set.
            top_k = self._model.generation_config.top_k or 0
            settings |= {"temperature": request.sampling.temperature, "top_k": top_k}
        if ends:
            settings["eos_token_id"] = sorted(ends)
        prompt = torch.tensor([list(request.prompt)], device=self._model.device)
        devices = [prompt.device] if prompt.device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                if request.sampling is not None:
                    torch.manual_seed(int(uniform(request.sampling.seed, 0) * 2**53))
                output = self._model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=request.max_new_tokens,
                    pad_token_id=self._tokenizer.pad_token_id or 0,
                    logits_processor=[_refuse_no_numbers],
                    **settings,
                )
        except _NotFiniteError:
            return Answer([], NOT_FINITE)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Answer([], DOES_NOT_FIT)
        start = 1 if self._model.config.is_encoder_decoder else len(request.prompt)
        ids: list[int] = output[0, start:].tolist()
        for n in range(1, len(ids)):
            if self._generator.is_end(request, ids[:n], ends):
                return Answer(ids[:n])
        return Answer(ids)


class _NotFiniteError(Exception):
    """Ends a generation."""


def _refuse_no_numbers(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Raise where the greatest logit is no finite number, as a processor of transformers."""
    if not bool(scores.amax(dim=-1).isfinite().all()):
        raise _NotFiniteError
    return scores


def max_length(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model takes, prompt and answer, as lm-eval finds it."""
    text_config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(text_config, name, None)
        if value is not None:
            return int(value)
    known: int = tokenizer.model_max_length or _NO_LENGTH
    return known if known < _NO_LENGTH else _DEFAULT_LENGTH
