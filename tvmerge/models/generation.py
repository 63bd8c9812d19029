"""Greedy answers of a live model, in batches that cost little more than its forward passes.

The same tokens as `model.generate(do_sample=False)` gives. What does not depend on the weights is prepared once, and a
row that is done leaves its batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tvmerge.models.batching import TokenBudget, run_in_batches
from tvmerge.models.stop_strings import StopStrings, answer_text

__all__ = ["GenerationRequest", "PreparedGeneration", "can_generate_here"]

#: Rows leave a batch once this share of it is done: taking them out copies the cache, about as much as a step does.
_DONE_SHARE = 0.25
#: Stands for a token where the greatest logit is no finite number.
_NO_TOKEN = -1

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


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to answer."""

    prompt: Sequence[int]  # token ids, special tokens included, cut from the left to leave room for the answer
    max_new_tokens: int  # at least 1
    stop: tuple[str, ...]  # the answer ends when its text holds one; lm-eval counts the text of the eos token too


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
        #: The last answer to each request and its text: weights that differ a little often give the same answers.
        self._texts: list[tuple[Sequence[int], str]] = [((), "")] * len(self._requests)
        self._stops = {stop: StopStrings(tokenizer, stop) for stop in {request.stop for request in requests}}

    def run(
        self, model: PreTrainedModel, *, budget: TokenBudget, done: Callable[[Sequence[int]], None] | None = None
    ) -> list[list[int] | None]:
        """Generate greedily.

        Args:
            model: in evaluation mode; `can_generate_here` has said yes to it.
            budget: tokens that it takes at a time, prompts and answers.
            done: called with the indices of the requests of a batch when they are answered.

        Returns:
            The token ids of each answer without its prompt, the one that ended it included; None where the greatest
            logit of a step was no finite number, so that there is no greedy token.

        Raises:
            torch.OutOfMemoryError: one request alone does not fit.
        """
        answers: list[list[int] | None] = [None] * len(self._requests)
        ends = _end_tokens(model.generation_config, self._tokenizer)

        def run_batch(batch: list[int]) -> None:
            requests = [self._requests[index] for index in batch]
            for index, answer in zip(batch, self._answer(model, requests, ends), strict=True):
                answers[index] = answer
            if done is not None:
                done(batch)

        with torch.no_grad():
            lengths = [len(request.prompt) + request.max_new_tokens for request in self._requests]
            run_in_batches(lengths, budget, run_batch)
        return answers

    def texts(self, answers: Sequence[Sequence[int] | None]) -> list[str | None]:
        """The texts of answers as lm-eval gives them: no special tokens, cut at the first stop string."""
        texts: list[str | None] = []
        for index, (request, answer) in enumerate(zip(self._requests, answers, strict=True)):
            if answer is not None and self._texts[index][0] != answer:
                self._texts[index] = answer, answer_text(self._tokenizer, answer, request.stop)
            texts.append(None if answer is None else self._texts[index][1])
        return texts

    def _answer(
        self, model: PreTrainedModel, requests: Sequence[GenerationRequest], ends: frozenset[int]
    ) -> list[list[int] | None]:
        """Answer the requests of one batch."""
        rows = _Rows(model, [request.prompt for request in requests], max(each.max_new_tokens for each in requests))
        answers: list[list[int]] = [[] for _ in requests]
        failed = [False] * len(requests)
        going = [True] * len(requests)
        at = list(range(len(requests)))  # which request each row of the batch belongs to
        with _decoding(model):
            while True:
                for index, token in zip(at, rows.next_tokens(), strict=True):
                    if not going[index]:
                        continue
                    answer, request = answers[index], requests[index]
                    answer.append(token)
                    failed[index] = token == _NO_TOKEN
                    going[index] = not (
                        failed[index]
                        or token in ends
                        or len(answer) >= request.max_new_tokens
                        or self._stops[request.stop].end(answer)
                    )
                kept = [row for row, index in enumerate(at) if going[index]]
                if not kept:
                    return [None if bad else answer for bad, answer in zip(failed, answers, strict=True)]
                if len(kept) <= (1 - _DONE_SHARE) * len(at):
                    rows.keep(kept)
                    at = [at[row] for row in kept]
                rows.step()


class _Rows:
    """A batch that is being generated, on the model's device.

    Args:
        model: as for `PreparedGeneration.run`.
        prompts: token ids of each row.
        max_new_tokens: how many steps there may be.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        # Of the class: what wraps a model's forward need not keep its signature.
        accepted = _parameters(type(model).forward)
        self._takes_positions = "position_ids" in accepted
        # The head is wide: without this, the logits of a whole prompt would be most of the memory.
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._width = max(map(len, prompts))
        padding = [self._width - len(prompt) for prompt in prompts]
        # Any token will do for padding: nothing looks at it.
        ids = torch.tensor([[0] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)])
        ids = ids.to(model.device)
        starts = torch.tensor(padding).to(model.device)
        # As wide as it will become, so that a step takes a slice of it.
        self._mask: torch.Tensor | None = None
        if any(padding):
            places = torch.arange(self._width + max_new_tokens, device=model.device)
            self._mask = (places >= starts[:, None]).long()
        self._positions = (torch.arange(self._width, device=model.device) - starts[:, None]).clamp(min=0)
        self._penalty = float(model.generation_config.repetition_penalty or 1.0)
        self._seen = self._mark_seen(ids, starts) if self._penalty != 1.0 else None
        self._forward(ids)

    def next_tokens(self) -> list[int]:
        """The greedy token of each row, `_NO_TOKEN` where there is none."""
        scores = self.logits
        if self._seen is not None:
            scores = _penalise(scores.float(), self._seen, self._penalty)
        tokens = scores.argmax(dim=-1, keepdim=True)
        # A NaN counts as the greatest. A token that is ruled out may well be at minus infinity.
        best = scores.gather(-1, tokens)
        self._tokens = tokens.to(self._model.device)
        if self._seen is not None:
            self._seen.scatter_(1, tokens, True)
        found: list[int] = torch.where(best.isfinite(), tokens, _NO_TOKEN).squeeze(1).tolist()
        return found

    def step(self) -> None:
        """Take up the tokens that `next_tokens` found."""
        self._width += 1
        self._positions = self._positions[:, -1:] + 1
        self._forward(self._tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows go."""
        index = torch.tensor(rows, device=self._model.device)
        self._cache.reorder_cache(index)
        self._tokens, self._positions = self._tokens[index], self._positions[index]
        if self._mask is not None:
            self._mask = self._mask[index]
        if self._seen is not None:
            self._seen = self._seen[index.to(self._seen.device)]

    def _forward(self, ids: torch.Tensor) -> None:
        positions = {"position_ids": self._positions} if self._takes_positions else {}
        output = self._model(
            input_ids=ids,
            # Without padding, attention has faster ways that take no mask.
            attention_mask=None if self._mask is None else self._mask[:, : self._width],
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
            **positions,
            **self._extra,
        )
        #: Of the next token, (rows, vocabulary).
        self.logits: torch.Tensor = output.logits[:, -1]

    def _mark_seen(self, ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Which tokens each row holds, its padding left out: (rows, vocabulary), boolean."""
        n_tokens = int(self._model.get_output_embeddings().weight.shape[0])
        # Padding is put where no token is.
        places = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(places >= starts[:, None], ids, n_tokens)
        seen = torch.zeros(len(ids), n_tokens + 1, dtype=torch.bool, device=ids.device)
        return seen.scatter_(1, ids, True)[:, :-1]


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _penalise(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make seen tokens less likely: Keskar et al. 2019, arXiv:1909.05858, section 4.1, as transformers does it.

    Args:
        scores: logits, (rows, vocabulary), float32.
        seen: which tokens a row holds, (rows, vocabulary), boolean.
        penalty: 1 for none.
    """
    less = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, less, scores)


def can_generate_here(model: PreTrainedModel) -> bool:
    """Whether `PreparedGeneration.run` gives what the model's own `generate` would; tried on a made-up prompt.

    Args:
        model: in evaluation mode, with weights that give finite logits.

    Returns:
        False for encoder-decoders, for models that keep no cache of the usual kind, for rotary embeddings that change
        with the length, for settings of the model's generation that are not known here, and for logits that are no
        numbers.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if (
        model.config.is_encoder_decoder
        or not model.can_generate()
        or any(getattr(model.generation_config, name, None) not in values for name, values in _NEUTRAL.items())
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
    rows = _Rows(model, texts, max_new_tokens=3)
    for step in range(3):
        for logits, text in zip(rows.logits.float(), texts, strict=True):
            alone = model(input_ids=torch.tensor([text], device=model.device), use_cache=False, return_dict=True)
            expected = alone.logits[0, -1].float()
            # One number for all logits: of so many a few are always far off.
            if not (logits - expected).square().mean().sqrt() <= tolerance * expected.std():
                return False
        for text, token in zip(texts, rows.next_tokens(), strict=True):
            text.append(token)
        if step == 0:
            rows.keep([0, len(texts) - 1])
            texts = [texts[0], texts[-1]]
        if step < 2:
            rows.step()
    return True


def _decoding(model: PreTrainedModel) -> Any:
    """What transformers itself generates in: experts are called in a way that is faster for few tokens."""
    optimized = getattr(model, "_optimize_model_for_decode", None)
    return nullcontext() if optimized is None else optimized()


def _end_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token ids that end an answer."""
    return frozenset(_ids(config.eos_token_id)) | frozenset(_ids(tokenizer.eos_token_id))


def _ids(of: Any) -> Iterator[int]:
    if of is not None:
        yield from map(int, of if isinstance(of, (list, tuple)) else [of])
