"""lm-eval's wrapper of a transformers model, with requests that are tokenised and laid out once for all trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tvmerge.models.transformers import TransformersModel

__all__ = ["Answers", "HarnessModel"]

#: Told the indices of the requests that have just been answered.
Done = Callable[[Sequence[int]], None]
#: Answers the requests that it was prepared for, with the weights that the model has now.
Answers = Callable[[Done], list[Any]]


class HarnessModel(HFLM):  # type: ignore[misc]  # lm_eval ships no types
    """A live model as lm-eval sees it.

    Args:
        model: the live model and its tokenizer.
        batch_size: requests that the model answers at a time.
    """

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

    def prepare(self, request_type: str, instances: Sequence[Instance]) -> Answers:
        """Lay out requests of one type.

        Args:
            request_type: as lm-eval spells it: loglikelihood, loglikelihood_rolling or generate_until.
            instances: the requests; one that is to be answered several times stands in it several times.
        """
        return self._as_lm_eval(request_type, instances)

    def _as_lm_eval(self, request_type: str, instances: Sequence[Instance]) -> Answers:
        def answers(done: Done) -> list[Any]:
            found: list[Any] = []
            waiting = iter(instances)
            # Long enough for lm-eval to sort by length inside of it, short enough for the bar to move.
            while chunk := list(islice(waiting, 16 * self.batch_size)):
                found += getattr(self, request_type)(chunk, disable_tqdm=True)
                done(range(len(found) - len(chunk), len(found)))
            return found

        return answers
