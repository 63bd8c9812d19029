"""Reads the number that an answer to a mathematical problem ends in, the way people do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

__all__ = ["last_number", "process_results"]

UNITS = {"百": 10**2, "千": 10**3, "万": 10**4, "億": 10**8, "兆": 10**12}
#: Wide characters to narrow ones, and the several minus signs to one. Not NFKC: it would make ① a 1.
NARROW = str.maketrans("０１２３４５６７８９，．−－‐‑–", "0123456789,.-----")
#: A number with its units: 1,234.5 or 3千 or 2千万 or 70 万.
TERM = re.compile(
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?)(?P<small>[百千])?(?P<large> ?[万億兆])?"
)
SIGN = re.compile(r"(?:-|マイナス)[$¥￥€£]?\Z")
#: What stands before a minus that subtracts: a digit, a Latin letter, a bracket, a number with its counter (5個-3個).
OPERAND = re.compile(r"(?:[0-9A-Za-z)\]）］]|[0-9] ?(?:つ|[一-龠々ァ-ヶーA-Za-z%％℃°²³]{1,6}))[ \t\u3000]*\Z")


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer.

    Args:
        doc: a question of MGSM, whose answer is a number.
        results: the model's answer, alone.

    Returns:
        acc: 1 if the last number of the answer is the right one, else 0; an answer without a number is wrong.
    """
    (answer,) = results
    return {"acc": float(last_number(answer) == Decimal(doc["answer"].replace(",", "")))}


def last_number(text: str) -> Decimal | None:
    """The last number of a text, None if it has none.

    Digits may be wide and grouped by commas. 万 and the like count, alone or one after another (1億2000万, 3万5千).
    A minus counts where it is a sign: not in 5-3, 10個-2個 or 2024-05.
    """
    text = text.translate(NARROW)
    number: Decimal | None = None
    # Of the number that is being read: large units so far, what the next large unit will multiply, where it ends,
    # and below what the next part must be.
    total = section = Decimal(0)
    sign, end, below, below_large = 1, -1, Decimal(0), 0
    for match in TERM.finditer(text):
        value = Decimal(match["digits"].replace(",", ""))
        small = UNITS.get(match["small"] or "", 1)
        large = UNITS.get((match["large"] or "").strip(), 1)
        goes_on = match.start() == end and value * small < below and (large == 1 or large < below_large)
        if not goes_on:
            total = section = Decimal(0)
            sign, below_large = _sign(text[max(0, match.start() - 12) : match.start()]), 10**16
        section += value * small
        if large > 1:
            total, section, below_large = total + section * large, Decimal(0), large
        number = sign * (total + section)
        end = match.end()
        # A number without a unit is the last part.
        below = Decimal(large if large > 1 else small if small > 1 else 0)
    return number


def _sign(before: str) -> int:
    """-1 if a number that follows on this text is negative, else 1."""
    sign = SIGN.search(before)
    return -1 if sign and not OPERAND.search(before[: sign.start()]) else 1
