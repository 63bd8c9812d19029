"""Strings that end a generated answer: seen as soon as they are there, and cut off in the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

__all__ = ["StopStrings", "answer_text", "cut_at_stop"]

#: Tokens that the end of an answer is decoded with, beside one for each byte of a stop string: an empty token, or a
#: first one whose leading space the tokenizer drops, must not hide the stop string behind it.
_SPARE_TOKENS = 4
#: What a tokenizer shows of bytes that are not a whole character.
_BROKEN = "�"


def cut_at_stop(text: str, stop: Iterable[str]) -> str:
    """The text before the first stop string, cut in their order as lm-eval cuts; empty ones do not count."""
    for term in stop:
        if term:
            text = text.split(term, 1)[0]
    return text


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Iterable[str]) -> str:
    """The text of generated token ids, without special tokens and cut at the first stop string."""
    return cut_at_stop(tokenizer.decode(list(ids), skip_special_tokens=True), stop)


class StopStrings:
    """Tells when an answer holds a stop string, and decodes only where its last token may have completed one.

    What it learns about a token it remembers: keep it from trial to trial.

    Args:
        tokenizer: of the model that answers.
        stop: the strings; an empty one is in every text, so that it ends an answer after one token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._last_characters = sorted({term[-1:] for term in stop})
        self._window = max((len(term.encode()) for term in stop), default=0) + _SPARE_TOKENS
        self._may_complete: dict[int, bool] = {}
        # Some tokenizers drop the leading space of a text, or add one between words: a token's text is not the same
        # behind another one as it is alone.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def end(self, ids: Sequence[int]) -> bool:
        """Whether an answer, not ended so far, ends here.

        Args:
            ids: its token ids, never empty.
        """
        may_complete = self._may_complete.get(ids[-1])
        if may_complete is None:
            may_complete = self._may_complete[ids[-1]] = self._find_out(ids[-1])
        if not may_complete:
            return False
        # Special tokens too, as lm-eval does it: some tasks stop at the text of one.
        text = self._tokenizer.decode(list(ids[-self._window :]))
        return any(term in text for term in self._stop)

    def _find_out(self, token: int) -> bool:
        """Whether a token holds the last character of a stop string, or a byte of it."""
        behind = self._tokenizer.decode([*self._before, token])
        text = self._tokenizer.decode([token]) + behind.removeprefix(self._tokenizer.decode(self._before))
        # A character of ASCII is one byte, and no broken character hides it.
        return any(last in text or (_BROKEN in text and not last.isascii()) for last in self._last_characters)
