"""A judge without a model: how much of a reference answer is in the answer, as ROUGE-L."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

from tvmerge.judges import Case, Judgment

__all__ = ["RougeL", "rouge_l", "tokens"]

#: A word of letters with spaces between words, or one character of a script without.
_TOKEN = re.compile(r"[^\W_ぁ-ヿ㐀-鿿豈-﫿\U00020000-\U0003ffff]+|[ぁ-ヿ㐀-鿿豈-﫿\U00020000-\U0003ffff]")


def tokens(text: str) -> list[str]:
    """What is compared: lower-case words, and single characters of Japanese and Chinese; marks and spaces are not."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence.

    Returns:
        From 0 to 1; whether both are empty of words, 1 if they are.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, equations 2 to 4 with beta = 1.
    """
    ours, theirs = tokens(answer), tokens(reference)
    if not ours or not theirs:
        return float(ours == theirs and _narrow(answer) == _narrow(reference))
    return 2 * _common_subsequence(ours, theirs) / (len(ours) + len(theirs))


def _narrow(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Source: Hyyrö 2004, Bit-parallel LCS-length computation revisited, figure 3: a whole row in a few operations on an
    integer of as many bits.
    """
    places: dict[str, int] = {}
    for index, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << index
    ones = (1 << len(first)) - 1
    row = ones
    for token in second:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & ones
    return len(first) - row.bit_count()


class RougeL:
    """Rates an answer by its ROUGE-L with the reference answer, times 10."""

    name = "rouge_l"

    @property
    def identity(self) -> Mapping[str, Any]:
        """Nothing else."""
        return {"judge": self.name}

    def submit(self, case: Case) -> Future[Judgment]:
        """Rate the last answer, at once."""
        future: Future[Judgment] = Future()
        if case.references is None:
            future.set_result(Judgment(rating=None, reason="there is no reference answer to compare with"))
        else:
            rating = 10 * _remembered(case.answers[-1], case.references[-1])
            future.set_result(Judgment(rating=rating, ratings=(rating,)))
        return future

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is under way."""


#: Weights that differ a little often give the same answers.
_remembered = lru_cache(maxsize=10_000)(rouge_l)
