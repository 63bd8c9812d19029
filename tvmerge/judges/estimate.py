"""What judging will take, before anything is judged: rules of thumb, said to be that."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tvmerge.judges import Case
from tvmerge.judges.prompts import JudgePrompts

__all__ = ["Estimate", "estimate"]

#: Tokens of a usual answer and of a judge's usual words on it. Four letters of English are about a token, and so is
#: a character of Japanese.
ANSWER_TOKENS = 300
JUDGE_TOKENS = 250
LETTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Estimate:
    """Tokens that a judge reads and writes."""

    judgments: int
    tokens_in: int
    tokens_out: int

    def __add__(self, other: Estimate) -> Estimate:
        """Both together."""
        tokens = self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out
        return Estimate(self.judgments + other.judgments, *tokens)

    def __mul__(self, times: int) -> Estimate:
        """The same so many times."""
        return Estimate(self.judgments * times, self.tokens_in * times, self.tokens_out * times)


def estimate(cases: Iterable[Case], prompts: JudgePrompts, *, answer_tokens: int, judge_tokens: int) -> Estimate:
    """Tokens for judging each of some cases once.

    Args:
        cases: with empty answers.
        prompts: that they are put with.
        answer_tokens: of each answer in them.
        judge_tokens: of what the judge says on each.
    """
    total = Estimate(0, 0, 0)
    for case in cases:
        prompt = prompts.render(case)
        read = _tokens(prompt.system + prompt.user) + answer_tokens * len(case.answers)
        total += Estimate(1, read, judge_tokens)
    return total


def _tokens(text: str) -> int:
    wide = len(re.findall(r"[^\x00-\x7f]", text))
    return wide + (len(text) - wide) // LETTERS_PER_TOKEN
