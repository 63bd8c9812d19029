"""ROUGE-L, against Google's package and a slow common subsequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tvmerge.judges import Case
from tvmerge.judges.rouge_l import RougeL, rouge_l, tokens


class Tokens:
    """Our tokens, for the package."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


ENGLISH = RougeScorer(["rougeL"])
OURS = RougeScorer(["rougeL"], tokenizer=Tokens())


@given(
    st.lists(st.sampled_from(["the", "cat", "sat", "on", "a"])),
    st.lists(st.sampled_from(["the", "cat", "on"])),
)
def test_english_is_scored_as_by_the_package(answer: list[str], reference: list[str]) -> None:
    if not answer or not reference:
        return
    ours, theirs = " ".join(answer), ", ".join(reference).title()
    assert rouge_l(ours, theirs) == pytest.approx(ENGLISH.score(theirs, ours)["rougeL"].fmeasure)


@given(
    st.text(alphabet="私は学校へ行くがabc 12ー々。", min_size=1, max_size=60),
    st.text(alphabet="私は家から行くac12ー", min_size=1),
)
def test_any_text_is_scored_as_by_the_package_with_our_tokens(answer: str, reference: str) -> None:
    if tokens(answer) and tokens(reference):
        assert rouge_l(answer, reference) == pytest.approx(OURS.score(reference, answer)["rougeL"].fmeasure)


def test_japanese_is_compared_by_characters_and_english_by_words() -> None:
    assert tokens("東京タワーはTokyo Towerです。３３３m") == [*"東京タワーは", "tokyo", "tower", "で", "す", "333m"]
    assert tokens("snake_case don't 時々") == ["snake", "case", "don", "t", "時", "々"]


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("ポジティブ", "ポジティブ", 1),
        ("", "店", 0),
        ("店", "駅", 0),
        ("お店", "店", 2 / 3),
        ("?!", "?!", 1),
        ("！", "！", 1),
        ("!", "！", 1),
        ("?!", "...", 0),
        ("", "?", 0),
        ("!?", "店", 0),
    ],
)
def test_known_scores(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_the_judge_rates_the_last_turn_from_0_to_10() -> None:
    judge = RougeL()
    case = Case(questions=("一", "二"), answers=("店", "お店"), references=("駅", "店"))
    assert judge.submit(case).result().rating == pytest.approx(20 / 3)
    unscored = judge.submit(Case(questions=("一",), answers=("店",))).result()
    assert unscored.rating is None
    assert "no reference" in str(unscored.reason)
