"""Scores the answers of JSQuAD. Only the tasks that are scored here load this file, and so only they need its packages.

Source: the measures of Rajpurkar et al., SQuAD (2016), section 6.1, over texts normalised and split as Japanese.
"""

from __future__ import annotations

import functools
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

try:
    import emoji
    import neologdn
    import unidic_lite
    from fugashi import Tagger
except ImportError as error:
    raise ImportError(
        f"JSQuAD's scores need emoji, fugashi, neologdn and unidic-lite: pip install .[ja] ({error})"
    ) from error

__all__ = ["exact_match", "f1", "first_answer", "normalize", "process_results", "words"]


def first_answer(doc: Mapping[str, Any]) -> str:
    """The answer that a few-shot example shows."""
    answer: str = doc["answers"]["text"][0]
    return answer


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer.

    Args:
        doc: a question of JSQuAD.
        results: the model's answer, alone.

    Returns:
        exact_match and f1, each the best over all gold answers, in [0, 1].
    """
    (answer,) = results
    golds = doc["answers"]["text"]
    return {
        "exact_match": max(exact_match(answer, gold) for gold in golds),
        "f1": max(f1(answer, gold) for gold in golds),
    }


def exact_match(answer: str, gold: str) -> float:
    """1 if both are the same text once normalised, else 0."""
    return float(normalize(answer) == normalize(gold))


def f1(answer: str, gold: str) -> float:
    """The harmonic mean of precision and recall of an answer's words, punctuation left out."""
    answer_words, gold_words = words(answer), words(gold)
    if not answer_words or not gold_words:
        # Nothing but punctuation: there are no words to compare.
        return exact_match(answer, gold)
    common = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * common / (len(answer_words) + len(gold_words))


# An answer is compared with several gold answers, and those come back in every trial.
@functools.lru_cache(maxsize=100_000)
def normalize(text: str) -> str:
    """A text without emoji, of one width and spacing (neologdn), with single spaces at most."""
    return " ".join(neologdn.normalize(emoji.replace_emoji(text, "")).split())


@functools.lru_cache(maxsize=100_000)
def words(text: str) -> tuple[str, ...]:
    """The words of a text once normalised, as MeCab splits them with UniDic; no punctuation."""
    found = (word.surface for word in _tagger()(normalize(text)))
    return tuple(word for word in found if not all(map(_is_punctuation, word)))


@functools.cache
def _tagger() -> Tagger:
    # Named, because fugashi prefers another UniDic if there is one, and that one splits in another way.
    return Tagger(f'-d "{unidic_lite.DICDIR}"')


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
