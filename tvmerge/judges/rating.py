"""The rating in what a judge said, and answers that cannot forge one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

__all__ = ["BEST", "WORST", "defused", "read_rating"]

WORST, BEST = 1.0, 10.0

#: `[[8]]`, `[[ 7.5 ]]`, `[[8/10]]`, `[[8点]]`, `[[Rating: 8]]`, once wide characters are narrow.
_RATING = re.compile(
    r"""\[\[ \s* (?: (?:rating|score|評価|評点|点数|スコア) \s* [:=]? \s* )?
        (?P<rating> [+-]? \d+ (?:\.\d+)? ) \s* (?: / \s* (?P<of> \d+ ) | 点 )? \s* \]\]""",
    re.VERBOSE | re.IGNORECASE,
)
#: Two brackets in a row, as many widths as they come in: what a rating begins with.
_BRACKETS = re.compile(r"[\[［](?=[\[［])")
#: Thoughts of a reasoning model, which may weigh several ratings.
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)


def read_rating(text: str) -> float | None:
    """The last rating in a judge's own text.

    Args:
        text: what the judge said, without what it was asked.

    Returns:
        From 1 to 10; None if there is no rating, or if the last one is out of this range: `[[11]]`, `[[80/100]]`.

    Source: the form is FastChat's `[[rating]]`, whose own pattern takes the first one and knows neither spaces,
    `/10` nor wide digits. A single pair of brackets, its second choice, is as often a footnote.
    """
    spoken = _THOUGHTS.sub("", unicodedata.normalize("NFKC", text))
    # What a model thinks may lack its beginning, which some servers' templates write themselves.
    spoken = re.split(r"</think(?:ing)?>", spoken, flags=re.IGNORECASE)[-1]
    found = list(_RATING.finditer(spoken))
    if not found:
        return None
    last = found[-1]
    rating = float(last["rating"])
    if not WORST <= rating <= BEST or (last["of"] is not None and int(last["of"]) != BEST):
        return None
    return rating


def defused(answer: str, *, delimiters: Iterable[str] = ()) -> str:
    """An answer that a judge can quote without rating, and that cannot end its own quotation.

    Args:
        answer: what the candidate said.
        delimiters: lines of the judge's prompt that set answers apart, as `[The answer ends]`.

    Returns:
        The answer with a space between two brackets where a rating begins, and round brackets around what looks like a
        delimiter.
    """
    text = answer
    for match in reversed(list(_BRACKETS.finditer(answer))):
        if _RATING.match(unicodedata.normalize("NFKC", answer[match.start() : match.start() + 80])):
            at = match.start() + 1
            text = f"{text[:at]} {text[at:]}"
    for delimiter in delimiters:
        words = delimiter.strip("[]<>|# \t").replace("\\", r"\\")
        text = re.sub(_as_written(delimiter), f"({words})", text, flags=re.IGNORECASE)
    return text


def _as_written(delimiter: str) -> str:
    """A pattern of a delimiter in any spacing and in wide brackets too."""
    pattern = r"\s+".join(re.escape(word) for word in delimiter.split())
    return pattern.replace(r"\[", r"[\[［]").replace(r"\]", r"[\]］]")
