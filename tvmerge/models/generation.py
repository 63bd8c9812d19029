"""Answers of a live model, in batches that cost little more than its forward passes.

Greedy ones are the tokens that `model.generate(do_sample=False)` gives; drawn ones depend on their own seed only. A row
that is done leaves its batch, and a request that waits takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvmerge.models.batching import TokenBudget, is_out_of_memory
from tvmerge.models.rows import NO_TOKEN, Rows
from tvmerge.models.sampling import Sampling
from tvmerge.models.stop_strings import StopStrings, answer_text

__all__ = [
    "DOES_NOT_FIT",
    "NOT_FINITE",
    "Answer",
    "GenerationRequest",
    "Generator",
    "PreparedGeneration",
    "can_generate_here",
]

#: Rows leave a batch once this share of it is done: taking them out copies the cache, about as much as a step does.
_DONE_SHARE = 0.5

#: Why a request has no answer.
NOT_FINITE = "the model gives no finite numbers"
DOES_NOT_FIT = "does not fit in memory"

#: Settings of a generation that change its tokens → the values with which they do not. Others matter only to sampling,
#: to speed or to what is returned; `repetition_penalty` is known here.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "constraints": (None,),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "remove_invalid_values": (None, False),
    "sequence_bias": (None,),
    "stop_strings": (None,),
    "suppress_tokens": (None,),
    "watermarking_config": (None,),
}
#: The same of drawn tokens; `top_k`, `top_p` and `min_p` are known here, and a request has its own temperature.
_NEUTRAL_DRAWN: Mapping[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
}


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to answer."""

    prompt: Sequence[int]  # token ids, special tokens included, cut from the left to leave room for the answer
    max_new_tokens: int  # at least 1
    stop: tuple[str, ...]  # the answer ends when its text holds one; lm-eval counts the text of the eos token too
    stop_ids: frozenset[int] = frozenset()  # tokens that end it, beside the model's and the tokenizer's own
    sampling: Sampling | None = None  # None: greedy


@dataclass(frozen=True)
class Answer:
    """What a model gave to a request."""

    ids: list[int]  # without the prompt, what ended it included
    reason: str | None = None  # why there is no answer; then there may be ids, and they are none


class Generator:
    """Answers requests in batches whose rows are filled again as they end.

    What it learns about stop strings it remembers: keep it from trial to trial.

    Args:
        tokenizer: of the models that answer.
        alone: whether a request that does not fit in memory alone has no answer; else it is raised.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, alone: bool = False) -> None:
        self._tokenizer = tokenizer
        self._alone = alone
        self._stops: dict[tuple[str, ...], StopStrings] = {}

    def run(
        self,
        model: PreTrainedModel,
        requests: Sequence[GenerationRequest],
        *,
        budget: TokenBudget,
        done: Callable[[int, Answer], None],
        max_rows: int | None = None,
    ) -> None:
        """Answer all requests, each as it would be answered alone.

        Args:
            model: in evaluation mode; `can_generate_here` has said yes to it.
            requests: in any order and of any lengths.
            budget: tokens that it takes at a time, prompts and answers.
            done: called with the index of a request and its answer as soon as it is there.
            max_rows: requests that it takes at a time, if the budget does not allow fewer.

        Raises:
            RuntimeError, MemoryError: one request alone does not fit.
        """
        with torch.no_grad(), _decoding(model):
            _Run(self, model, requests, budget, done, max_rows or len(requests)).run(alone=self._alone)

    def is_end(self, request: GenerationRequest, ids: Sequence[int], ends: Container[int]) -> bool:
        """Whether an answer that went on so far ends with its last token."""
        if ids[-1] in ends or ids[-1] in request.stop_ids or len(ids) >= request.max_new_tokens:
            return True
        if request.stop not in self._stops:
            self._stops[request.stop] = StopStrings(self._tokenizer, request.stop)
        return self._stops[request.stop].end(ids)

    def ends(self, model: PreTrainedModel) -> frozenset[int]:
        """The token ids that end an answer of a model."""
        return frozenset(_ids(model.generation_config.eos_token_id)) | frozenset(_ids(self._tokenizer.eos_token_id))


class _Run:
    """One run of a generator: the requests that wait, and those in the batch."""

    def __init__(
        self,
        generator: Generator,
        model: PreTrainedModel,
        requests: Sequence[GenerationRequest],
        budget: TokenBudget,
        done: Callable[[int, Answer], None],
        max_rows: int,
    ) -> None:
        self._generator, self._model, self._requests = generator, model, requests
        self._budget, self._done, self._max_rows = budget, done, max_rows
        self._ends = generator.ends(model)
        self._lengths = [len(request.prompt) + request.max_new_tokens for request in requests]
        self._waiting: deque[int] = deque()
        self._wait(range(len(requests)))
        self._rows: Rows | None = None
        self._at: list[int] = []  # which request each row of the batch belongs to
        self._ids: dict[int, list[int]] = {}  # of the requests in the batch that are not done

    def run(self, *, alone: bool) -> None:
        while self._waiting or self._at:
            try:
                self._fill()
                self._advance()
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or (len(self._at) == 1 and not alone):
                    raise
            # Here nothing holds on to what was computed.
            self._retreat()

    def _wait(self, indices: Iterable[int]) -> None:
        # The longest first: little is padded, and what does not fit is found out early.
        order = sorted([*self._waiting, *indices], key=lambda index: (-self._lengths[index], index))
        self._waiting = deque(order)

    def _fill(self) -> None:
        """Let waiting requests into the batch, once there is room for some."""
        if not self._waiting or (self._rows is not None and not self._rows.joins):
            return
        longest = max(self._lengths[index] for index in (*self._at, self._waiting[0]))
        size = min(self._max_rows, max(1, self._budget.tokens // longest))
        n = min(size - len(self._at), len(self._waiting))
        # A prompt costs a pass of its own, and to join the batch a copy of its cache.
        if n < 1 or (self._at and n < min(_DONE_SHARE * size, len(self._waiting))):
            return
        joining = [self._waiting.popleft() for _ in range(n)]
        self._at += joining
        self._ids.update({index: [] for index in joining})
        rows = Rows(self._model, [self._requests[index].prompt for index in joining])
        if self._rows is None:
            self._rows = rows
        else:
            self._rows.join(rows)

    def _advance(self) -> None:
        """One token for each row."""
        assert self._rows is not None
        draws = [
            sampling.draw(len(self._ids[index])) if index in self._ids and sampling else None
            for index, sampling in ((index, self._requests[index].sampling) for index in self._at)
        ]
        for index, token in zip(self._at, self._rows.next_tokens(draws), strict=True):
            if index not in self._ids:
                continue
            ids = self._ids[index]
            ids.append(token)
            if token == NO_TOKEN:
                self._end(index, NOT_FINITE)
            elif self._generator.is_end(self._requests[index], ids, self._ends):
                self._end(index)
        kept = [row for row, index in enumerate(self._at) if index in self._ids]
        if not kept:
            self._rows, self._at = None, []
            return
        if len(kept) <= (1 - _DONE_SHARE) * len(self._at):
            self._rows.keep(kept)
            self._at = [self._at[row] for row in kept]
        self._rows.step()

    def _end(self, index: int, reason: str | None = None) -> None:
        self._done(index, Answer(self._ids.pop(index), reason))

    def _retreat(self) -> None:
        """Begin those in the batch anew, in batches of half its size."""
        self._rows = None
        at, self._at = self._at, []
        if len(at) == 1:
            torch.cuda.empty_cache()
            self._end(at[0], DOES_NOT_FIT)
            return
        self._budget.halve(longest=max(self._lengths[index] for index in at), n=len(at))
        self._wait(self._ids)
        self._ids = {}


class PreparedGeneration:
    """Requests that are answered again and again, by other weights each time.

    Args:
        requests: in any order and of any lengths.
        tokenizer: of the model that answers.

    Raises:
        ValueError: a request has no prompt, or asks for no token.
    """

    def __init__(self, requests: Sequence[GenerationRequest], tokenizer: PreTrainedTokenizerBase) -> None:
        for index, request in enumerate(requests):
            if not request.prompt or request.max_new_tokens < 1:
                raise ValueError(
                    f"request {index}: {len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones, "
                    "both must be at least 1"
                )
        self._requests = list(requests)
        self._tokenizer = tokenizer
        self._generator = Generator(tokenizer)
        #: The last answer to each request and its text: weights that differ a little often give the same answers.
        self._texts: list[tuple[Sequence[int], str]] = [((), "")] * len(self._requests)

    def run(
        self, model: PreTrainedModel, *, budget: TokenBudget, done: Callable[[Sequence[int]], None] | None = None
    ) -> list[list[int] | None]:
        """Answer all.

        Args:
            model: in evaluation mode; `can_generate_here` has said yes to it.
            budget: tokens that it takes at a time, prompts and answers.
            done: called with the indices of requests when they are answered.

        Returns:
            The token ids of each answer without its prompt, the one that ended it included; None where the greatest
            logit of a step was no finite number, so that there is no token.

        Raises:
            RuntimeError, MemoryError: one request alone does not fit.
        """
        answers: list[list[int] | None] = [None] * len(self._requests)

        def one(index: int, answer: Answer) -> None:
            answers[index] = answer.ids if answer.reason is None else None
            if done is not None:
                done([index])

        self._generator.run(model, self._requests, budget=budget, done=one)
        return answers

    def texts(self, answers: Sequence[Sequence[int] | None]) -> list[str | None]:
        """The texts of answers as lm-eval gives them: no special tokens, cut at the first stop string."""
        texts: list[str | None] = []
        for index, (request, answer) in enumerate(zip(self._requests, answers, strict=True)):
            if answer is not None and self._texts[index][0] != answer:
                self._texts[index] = answer, answer_text(self._tokenizer, answer, request.stop)
            texts.append(None if answer is None else self._texts[index][1])
        return texts


def can_generate_here(model: PreTrainedModel, *, drawn: bool = False) -> bool:
    """Whether `Generator.run` gives what the model's own `generate` would; tried on made-up prompts.

    Args:
        model: in evaluation mode, with weights that give finite logits.
        drawn: whether tokens are to be drawn, too.

    Returns:
        False for encoder-decoders, for models that keep no cache of the usual kind, for rotary embeddings that change
        with the length, for settings of the model's generation that are not known here, and for logits that are no
        numbers.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    neutral = {**_NEUTRAL, **(_NEUTRAL_DRAWN if drawn else {})}
    if (
        model.config.is_encoder_decoder
        or not model.can_generate()
        or any(getattr(model.generation_config, name, None) not in values for name, values in neutral.items())
        # Its cache is made anew when an answer passes the length that the model was first trained on.
        or "longrope" in str(rope)
    ):
        return False
    try:
        with torch.no_grad():
            return all(_agrees(model, lengths) for lengths in ((9, 6, 3), (5, 5)))
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False


def _agrees(model: PreTrainedModel, lengths: Sequence[int]) -> bool:
    """Whether rows of a batch get the logits that each gets alone, without padding and without a cache."""
    n_tokens = model.config.get_text_config(decoder=True).vocab_size
    # From the middle of the vocabulary: what stands for images and the like is at its ends.
    texts = [[n_tokens // 3 + (7 * i + row) % max(1, n_tokens // 3) for i in range(n)] for row, n in enumerate(lengths)]
    # Of logits that have been rounded many times, about half of the digits are left.
    tolerance = torch.finfo(model.dtype).eps ** 0.5
    rows = Rows(model, texts)
    for step in range(4):
        for logits, text in zip(rows.logits.float(), texts, strict=True):
            alone = model(input_ids=torch.tensor([text], device=model.device), use_cache=False, return_dict=True)
            expected = alone.logits[0, -1].float()
            # One number for all logits: of so many a few are always far off.
            if not (logits - expected).square().mean().sqrt() <= tolerance * expected.std():
                return False
        for text, token in zip(texts, rows.next_tokens(), strict=True):
            text.append(token)
        if step == 0:
            rows.keep([len(texts) - 1])
            texts = texts[-1:]
        rows.step()
        if step == 1 and rows.joins:
            joining = [texts[0][:1], texts[0] * 2]  # a shorter one and a longer one than the row that is there
            rows.join(Rows(model, joining))
            texts += joining
    return True


def _decoding(model: PreTrainedModel) -> Any:
    """What transformers itself generates in: experts are called in a way that is faster for few tokens."""
    optimized = getattr(model, "_optimize_model_for_decode", None)
    return nullcontext() if optimized is None else optimized()


def _ids(of: Any) -> Iterator[int]:
    if of is not None:
        yield from map(int, of if isinstance(of, (list, tuple)) else [of])
