"""The rating in what a judge said, and answers that cannot forge one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

__all__ = ["BEST", "WORST", "defused", "read_rating"]

WORST, BEST = 1.0, 10.0

#: `[[8]]`, `[[ 7.5 ]]`, `[[8/10]]`, `[[8点]]`, `[[Rating: 8]]`, once wide characters are narrow. Never longer than
#: `_LONGEST`: what is no longer than that can be looked for in an answer.
_RATING = re.compile(
    r"""\[\[ \s{0,9} (?: (?:rating|score|評価|評点|点数|スコア) \s{0,9} [:=]? \s{0,9} )?
        (?P<rating> [+-]? \d{1,5} (?:\.\d{1,5})? ) \s{0,9} (?: / \s{0,9} (?P<of> \d{1,5} ) | 点 )? \s{0,9} \]\]""",
    re.VERBOSE | re.IGNORECASE,
)
_LONGEST = 100
#: Two brackets in a row, of all forms that become one when wide characters are made narrow.
_BRACKETS = re.compile(r"[\[［﹇](?=[\[［﹇])")
#: Thoughts of a reasoning model, which may weigh several ratings. Their beginning may be missing: some servers'
#: templates write it themselves.
_THOUGHTS = re.compile(
    r"\A\s*<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|\A.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE
)
_THINK = re.compile(r"<(/?think(?:ing)?)>", re.IGNORECASE)


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
        delimiter or sets thoughts apart. A delimiter of one word counts on a line of its own: `x[question]` is code.
    """
    text = answer
    for match in reversed(list(_BRACKETS.finditer(answer))):
        if _RATING.match(unicodedata.normalize("NFKC", answer[match.start() : match.start() + _LONGEST])):
            at = match.start() + 1
            text = f"{text[:at]} {text[at:]}"
    text = _THINK.sub(r"(\1)", text)
    for delimiter in delimiters:
        words = delimiter.strip("[]<>|# \t").replace("\\", r"\\")
        text = re.sub(_as_written(delimiter), f"({words})", text, flags=re.IGNORECASE | re.MULTILINE)
    return text


def _as_written(delimiter: str) -> str:
    """A pattern of a delimiter in any spacing and in wide brackets too."""
    pattern = r"\s+".join(re.escape(word) for word in delimiter.split())
    pattern = pattern.replace(r"\[", r"[\[［﹇]").replace(r"\]", r"[\]］﹈]")
    # ASCII: a delimiter in Japanese has no spaces, and is no code.
    is_word = " " not in delimiter and delimiter.isascii()
    return rf"(?<![^\n])[^\S\n]*{pattern}[^\S\n]*(?![^\n])" if is_word else pattern
