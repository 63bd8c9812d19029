"""lm-eval's wrapper of a transformers model, with requests that are tokenised and laid out once for all trials.

Texts become tokens as lm-eval makes them. What it then does with the model is done by `models/likelihood.py` and
`models/generation.py`; a model or a request that these cannot take is left to lm-eval itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tvmerge.errors import RunError, TaskError
from tvmerge.evaluators import MAX_UNSCORED
from tvmerge.evaluators.tasks import one_line
from tvmerge.models.batching import START_TOKENS, TokenBudget, does_not_fit, is_out_of_memory
from tvmerge.models.generation import GenerationRequest, PreparedGeneration, can_generate_here
from tvmerge.models.likelihood import PackedLikelihoods, longest_row, shares_prefixes
from tvmerge.models.transformers import TransformersModel

__all__ = ["Answers", "HarnessModel", "check_numbers", "is_none"]

#: Told the indices of the requests that have just been answered.
Done = Callable[[Sequence[int]], None]
#: Answers the requests that it was prepared for, with the weights that the model has now.
Answers = Callable[[Done], list[Any]]

#: Settings of a generation that say no more than that it is greedy.
GREEDY = {"do_sample": (False,), "temperature": (0.0,)}


_Made = TypeVar("_Made")


class HarnessModel(HFLM):  # type: ignore[misc]  # lm_eval ships no types
    """A live model as lm-eval sees it.

    Args:
        model: the live model and its tokenizer, with the weights of any real model of its kind: whether it can share
            the computation of prompts that begin alike is found out by trying.
        batch_size: requests of the greatest length that the model answers at a time; `auto`: as many as fit.
        tokens: with `auto`, how many tokens of a batch an earlier process has found to fit.
    """

    def __init__(self, model: TransformersModel, *, batch_size: int | str, tokens: int | None = None) -> None:
        size = batch_size if isinstance(batch_size, int) else 16
        super().__init__(pretrained=model.model, tokenizer=model.tokenizer, batch_size=size)
        causal = self.backend == "causal"
        self._is_auto, self._asked_size = not isinstance(batch_size, int), size
        self.budget = TokenBudget(tokens or START_TOKENS.get(model.model.device.type, START_TOKENS["cuda"]))
        self._shares = causal and shares_prefixes(model.model)
        self._generates = causal and can_generate_here(model.model)
        self._encoded: dict[Any, list[int]] = {}
        self._budgets: list[TokenBudget] = []  # of batches of a given size
        #: Task → how many of its requests were longer than the model takes, and were cut from the left.
        self.n_cut: Counter[str] = Counter()

    @property
    def notes(self) -> list[str]:
        """What the user should know of the requests; there may be more after each trial."""
        halved = self.batch_size < self._asked_size or any(budget.was_halved for budget in self._budgets)
        return [does_not_fit(self._asked_size)] * (halved and not self._is_auto) + [
            f"task {task}: {n} requests are longer than the {self.max_length} tokens that the model takes: they are "
            "cut from the left"
            for task, n in self.n_cut.items()
        ]

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a text, remembered: the choices of a question share its prompt."""
        key = (string, add_special_tokens, left_truncate_len, *sorted(kwargs.items()))
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return list(self._encoded[key])

    def prepare(self, request_type: str, instances: Sequence[Instance]) -> Answers:
        """Tokenise and lay out requests of one type.

        Args:
            request_type: as lm-eval spells it: loglikelihood, loglikelihood_rolling or generate_until.
            instances: the requests; one that is to be answered several times stands in it several times.

        Returns:
            What answers them, in their order: a pair of log-likelihood and whether it is the greedy continuation, a
            log-likelihood, or a text; None for a text that the model gives no numbers for.

        Raises:
            TaskError: a request that no model can answer: without a continuation, or longer than the model takes.
        """
        if self.backend != "causal":
            return self._as_lm_eval(request_type, instances)
        try:
            if request_type == "loglikelihood":
                pairs = _each(self._pair, instances)
                too_long = [len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs]
                self.n_cut.update(str(i.task_name) for i, cut in zip(instances, too_long, strict=True) if cut)
                return self._likelihoods(pairs)
            if request_type == "loglikelihood_rolling":
                return self._rolling(_each(self._windows, instances))
            requests = _each(self._generation_request, instances)
            self.n_cut.update(str(i.task_name) for i in instances if self._is_cut(*i.args))
            if not self._generates or None in requests:
                return self._as_lm_eval(request_type, instances)
            return self._generation([request for request in requests if request is not None])
        finally:
            self._encoded.clear()

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context and of its continuation, as lm-eval's `loglikelihood` makes them."""
        pair: tuple[list[int], list[int]]
        if context:
            pair = self._encode_pair(context, continuation)
        else:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            pair = (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)
        if not pair[0] or not 0 < len(pair[1]) <= self.max_length:
            raise ValueError(
                f"{_short(context)} and {_short(continuation)} are {len(pair[0])} and {len(pair[1])} tokens: each must "
                f"be one at least, and the latter {self.max_length} at most"
            )
        return pair

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """The parts of a long text, each with what it is predicted from, as in lm-eval's `loglikelihood_rolling`."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _budget(self, longest: int) -> TokenBudget:
        if self._is_auto:
            return self.budget
        self._budgets.append(TokenBudget(self.batch_size * longest))
        return self._budgets[-1]

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Answers:
        if not pairs:  # of texts without a token
            return lambda done: []
        longest = max(min(len(context) + len(continuation) - 1, self.max_length) for context, continuation in pairs)
        budget = self._budget(longest)
        packed = PackedLikelihoods(
            pairs,
            max_length=self.max_length,
            # What is laid out in one row must not depend on how much memory there happens to be.
            max_row=longest_row(self.model) if self._is_auto else min(budget.tokens, longest_row(self.model)),
            share=self._shares,
        )
        return lambda done: packed.score(self.model, budget=budget, done=done)

    def _rolling(self, texts: Sequence[list[tuple[list[int], list[int]]]]) -> Answers:
        text_of = [index for index, windows in enumerate(texts) for _ in windows]
        score = self._likelihoods([window for windows in texts for window in windows])

        def answers(done: Done) -> list[Any]:
            left = [len(windows) for windows in texts]
            done([text for text, n in enumerate(left) if not n])

            def windows_done(indices: Sequence[int]) -> None:
                for index in indices:
                    left[text_of[index]] -= 1
                done([text for text in {text_of[index] for index in indices} if not left[text]])

            sums = [0.0] * len(texts)
            for text, (likelihood, _) in zip(text_of, score(windows_done), strict=True):
                sums[text] += likelihood
            return sums

        return answers

    def _generation(self, requests: Sequence[GenerationRequest]) -> Answers:
        prepared = PreparedGeneration(requests, self.tokenizer)
        budget = self._budget(max(len(request.prompt) + request.max_new_tokens for request in requests))
        return lambda done: prepared.texts(prepared.run(self.model, budget=budget, done=done))

    def _generation_request(self, context: str, settings: dict[str, Any]) -> GenerationRequest | None:
        """The request as lm-eval's `generate_until` makes it; None if it is not plainly greedy."""
        known = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(known.pop("until", None), eos=eos)
        n_new = known.pop("max_gen_toks")
        if n_new < 1:
            raise ValueError(f"answers of {n_new} tokens are asked for")
        if not all(isinstance(each, str) for each in stop):
            raise ValueError(f"until must be a text or a list of texts, got {settings.get('until')!r}")
        if n_new >= self.max_length:
            raise ValueError(f"answers of {n_new} tokens are asked for, of a model that takes {self.max_length} in all")
        if any(value not in GREEDY.get(name, ()) for name, value in known.items()):
            return None
        prompt = self.tok_encode(context, left_truncate_len=self.max_length - n_new)
        if not prompt:
            raise ValueError(f"the prompt {_short(context)} has no token")
        return GenerationRequest(prompt=prompt, max_new_tokens=n_new, stop=tuple(stop))

    def _is_cut(self, context: str, settings: dict[str, Any]) -> bool:
        n_new: int = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
        return bool(len(self.tok_encode(context)) > self.max_length - n_new)

    def _as_lm_eval(self, request_type: str, instances: Sequence[Instance]) -> Answers:
        def answers(done: Done) -> list[Any]:
            found: list[Any] = []
            waiting = iter(instances)
            # Long enough for lm-eval to sort by length inside of it, short enough for the bar to move. Answers that are
            # drawn are drawn in the order of lm-eval, which has all texts in one go.
            size = len(instances) if request_type == "generate_until" else 16 * self.batch_size
            while chunk := list(islice(waiting, size)):
                found += self._by_lm_eval(request_type, chunk)
                done(range(len(found) - len(chunk), len(found)))
            return found

        return answers

    def _by_lm_eval(self, request_type: str, chunk: Sequence[Instance]) -> list[Any]:
        """lm-eval's own answers; a batch that does not fit in memory is halved, as it is elsewhere."""
        while True:
            try:
                answers: list[Any] = getattr(self, request_type)(chunk, disable_tqdm=True)
            except (RuntimeError, MemoryError) as error:
                if self.batch_size == 1 or not is_out_of_memory(error):
                    raise
            else:
                return answers
            self.batch_size_per_gpu = self.batch_size // 2
            torch.cuda.empty_cache()


def _each(make: Callable[..., _Made], instances: Sequence[Instance]) -> list[_Made]:
    """What is made of the arguments of each request."""
    made = []
    for instance in instances:
        try:
            made.append(make(*instance.args))
        except Exception as error:
            what = str(error) if isinstance(error, ValueError) else one_line(error)
            raise TaskError(f"task {instance.task_name}, question {instance.doc_id}: {what}") from error
    return made


def _short(text: str) -> str:
    """The end of a text, which is where a question is."""
    return repr(text if len(text) <= 40 else f"...{text[-40:]}")


def is_none(answer: Any) -> bool:
    """Whether a model has no answer: of likelihoods that are no numbers lm-eval takes the first as the greatest."""
    likelihood = answer[0] if isinstance(answer, tuple) else answer
    return answer is None or (isinstance(likelihood, (float, np.floating)) and math.isnan(likelihood))


def check_numbers(
    answered: Mapping[str, Iterable[tuple[Sequence[Instance], Sequence[Any]]]], *, n_questions: int
) -> None:
    """Refuse a model that is broken for many questions: by the others alone it could be the best.

    Args:
        answered: task → requests, and the model's answers to them.
        n_questions: how many there are in all.

    Raises:
        RunError: with the number of questions.
    """
    lost = {
        (task, instance.doc_id)
        for task, parts in answered.items()
        for instances, answers in parts
        for instance, answer in zip(instances, answers, strict=True)
        if is_none(answer)
    }
    if len(lost) > MAX_UNSCORED * n_questions:
        raise RunError(
            f"{len(lost)} of {n_questions} questions got no number from the model: its values are too large for its "
            "dtype, use smaller weights, or --dtype bfloat16 or float32"
        )
