"""How the answers of JSQuAD and MGSM are scored."""

from __future__ import annotations

import re
import sys
import unicodedata
from decimal import Decimal
from fractions import Fraction

import jglue_squad
import pytest
import yaml
from conftest import ROOT
from fugashi import Tagger
from hypothesis import given
from hypothesis import strategies as st
from jglue_numbers import last_number
from jglue_numbers import process_results as score_number
from jglue_squad import exact_match, f1, normalize, words
from lm_eval.tasks import TaskManager

FOLDER = ROOT / "benchmarks" / "jglue"


# JSQuAD


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("２０２０", "2020"),
        ("ﾄｳｷｮｳ", "トウキョウ"),
        ("東京 タワー", "東京タワー"),
        ("〜10", "10"),
        ("①", "①"),
        ("㈱", "㈱"),
        ("東京。", "東京。"),
        ("Tokyo", "Tokyo"),
        ("Tokyo  \t Tower\n", "Tokyo Tower"),
        ("東京😀タワー🗼", "東京タワー"),
        ("愛❤️", "愛"),
        ("👩‍👩‍👧家族", "家族"),
        ("すごーーーい", "すごーい"),
        ("", ""),
    ],
)
def test_normalize(text: str, normal: str) -> None:
    assert normalize(text) == normal


def test_punctuation_and_case_count_for_exact_match_and_punctuation_does_not_for_f1() -> None:
    assert exact_match("東京。", "東京") == 0
    assert exact_match("ＴＯＫＹＯ", "TOKYO") == 1
    assert exact_match("tokyo", "TOKYO") == 0
    assert f1("「東京」。", "東京") == 1
    assert words("「東京タワー」、2.5%…") == ("東京", "タワー", "2", "5")


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        ("東京タワー", "東京タワー", 1),
        ("東京", "東京タワー", 2 / 3),  # all of one word is right, and half of two words is found
        ("大阪", "東京", 0),
        ("", "東京", 0),
        ("。", "。", 1),
        ("。", "、", 0),
        ("", "", 1),
    ],
)
def test_f1(answer: str, gold: str, value: float) -> None:
    assert f1(answer, gold) == pytest.approx(value)


def slow_f1(answer: str, gold: str) -> float:
    """Words are struck off one by one, and the two shares combined as SQuAD's text says."""
    tagger = Tagger("-Owakati")

    def split(text: str) -> list[str]:
        found = tagger.parse(normalize(text)).split()
        kept = "$+<=>^`|~"  # punctuation to ASCII, symbols to Unicode
        return [w for w in found if any(c not in kept and unicodedata.category(c)[0] != "P" for c in w)]

    answer_words, gold_words = split(answer), split(gold)
    if not answer_words or not gold_words:
        return float(normalize(answer) == normalize(gold))
    left, hits = list(gold_words), 0
    for word in answer_words:
        if word in left:
            left.remove(word)
            hits += 1
    if hits == 0:
        return 0.0
    precision, recall = hits / len(answer_words), hits / len(gold_words)
    return 2 * precision * recall / (precision + recall)


texts = st.lists(
    st.sampled_from(["東京", "タワー", "は", "高い", "塔", "2020", "年", "。", "、", "「", "」", "+", "A", "!?", "  "]),
    max_size=9,
).map("".join)


@given(answer=texts, gold=texts)
def test_f1_equals_a_slow_one(answer: str, gold: str) -> None:
    assert f1(answer, gold) == pytest.approx(slow_f1(answer, gold))
    assert f1(answer, gold) == pytest.approx(f1(gold, answer))
    assert 0 <= exact_match(answer, gold) <= 1
    assert f1(answer, answer) == exact_match(answer, answer) == 1


def test_the_best_over_all_gold_answers_counts() -> None:
    doc = {"answers": {"text": ["高さ333メートルの塔", "東京タワー", "塔"], "answer_start": [0, 1, 2]}}
    assert jglue_squad.process_results(doc, ["東京タワー"]) == {"exact_match": 1.0, "f1": 1.0}
    best = jglue_squad.process_results(doc, ["東京"])
    assert best == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert jglue_squad.process_results(doc, ["わからない"]) == {"exact_match": 0.0, "f1": 0.0}
    assert jglue_squad.first_answer(doc) == "高さ333メートルの塔"


@pytest.mark.parametrize("package", ["emoji", "fugashi", "neologdn", "unidic_lite"])
def test_a_missing_package_is_said_when_the_task_is_loaded(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.endswith("jglue_squad") and "/" in name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    with pytest.raises(ImportError, match=r"pip install \.\[ja\]") as caught:
        manager.load(["jsquad-1.1-0.2"])
    assert package in str(caught.value)
    assert "\n" not in str(caught.value)


# MGSM


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("答えは18です。", 18),
        ("答えは18.", 18),
        ("答えは18．", 18),
        ("18.0", 18),
        ("18.50ドル", "18.5"),
        ("1,234", 1234),
        ("合計は1,234,567円", 1234567),
        ("１，２３４", 1234),
        ("１２．５", "12.5"),
        ("1、234", 234),
        ("1, 234", 234),
        ("3,4,5", 5),
        ("12,34", 34),
        ("1234,567", 567),
        ("-5", -5),
        ("−5", -5),
        ("－５", -5),
        ("‐5", -5),
        ("答えは-5度です", -5),
        ("答えは -5", -5),
        ("x=-5", -5),
        ("(−5)", -5),
        ("-$5", -5),
        ("気温は-3.5度", "-3.5"),
        ("気温-5度", -5),
        ("マイナス5度", -5),
        ("10マイナス5", 5),
        ("3×-5", -5),
        ("3\n-5", -5),
        ("5-3", 3),
        ("5 - 3", 3),
        ("5 -3", 3),
        ("5個-3個", 3),
        ("5つ-3つ", 3),
        ("5メートル−3メートル", 3),
        ("(2+3)-4", 4),
        ("50%-20%", 20),
        ("x-4", 4),
        ("10-12", 12),
        ("2024-05", 5),
        ("・2024-05-17", 17),
        ("- 7個", 7),
        ("16-3-4=9、9×2=18ドル", 18),
        ("7万", 70000),
        ("7万円です。", 70000),
        ("7 万円", 70000),
        ("７万", 70000),
        ("2.5万", 25000),
        ("3千", 3000),
        ("3千円", 3000),
        ("3百", 300),
        ("2千5百", 2500),
        ("5千万", 50000000),
        ("2千5百万", 25000000),
        ("10百万円", 10000000),
        ("1億2000万", 120000000),
        ("1億2,000万円", 120000000),
        ("3万5千円", 35000),
        ("3万5", 30005),
        ("1万2000円", 12000),
        ("12億3456万7890", 1234567890),
        ("1兆", 10**12),
        ("2兆3億", 2 * 10**12 + 3 * 10**8),
        ("-3万5千", -35000),
        ("3万円と5千円", 5000),
        ("3千4千", 4000),
        ("2万3億", 3 * 10**8),
        ("1万23456", 23456),
        ("8万-5万", 50000),
        ("万が一は3", 3),
        ("①番", None),
        ("答えは①です。2", 2),
        ("わかりません。", None),
        ("", None),
        ("...", None),
        ("-", None),
        (",", None),
        ("12個÷3人=4個。答えは4個です。", 4),
        ("答えは**70,000**です。", 70000),
        (r"\boxed{42}", 42),
        ("50％", 50),
        ("¥1,500", 1500),
        ("007", 7),
        ("0", 0),
    ],
)
def test_last_number(text: str, number: int | str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


WIDE = str.maketrans("0123456789,.-", "０１２３４５６７８９，．－")


@given(
    number=st.integers(0, 10**16 - 1),
    tenths=st.integers(0, 9),
    negative=st.booleans(),
    form=st.sampled_from(["plain", "commas", "units", "units and commas"]),
    wide=st.booleans(),
    before=st.sampled_from(["", "答えは", "12個から3個取るので、", "= ", "3+4\n", "合計："]),
    after=st.sampled_from(["", "。", "円です。", "個", ".", "、以上です。", "</s>", "\n"]),
)
def test_a_number_is_read_as_it_was_written(
    number: int, tenths: int, negative: bool, form: str, wide: bool, before: str, after: str
) -> None:
    value = Decimal(number)
    if form.startswith("units") and number:
        parts = [
            f"{part:,}{unit}" if "commas" in form else f"{part}{unit}"
            for unit, size in (("兆", 10**12), ("億", 10**8), ("万", 10**4), ("", 1))
            if (part := number // size % 10**4)
        ]
        text = "".join(parts)
    else:
        text = f"{number:,}" if form == "commas" else str(number)
        if tenths:
            text, value = f"{text}.{tenths}", value + Decimal(tenths) / 10
    if negative:
        text, value = f"-{text}", -value
    assert last_number(before + (text.translate(WIDE) if wide else text) + after) == value


@given(st.text(alphabet="0123456789,.-−万億千百 個は。\n", max_size=60))
def test_any_text_can_be_read(text: str) -> None:
    number = last_number(text)
    assert (number is None) == (not any("0" <= c <= "9" for c in text))


def test_a_long_answer_is_read_at_once() -> None:
    assert last_number("1" * 200_000) is not None
    assert last_number("1," * 100_000 + "7") == 7
    assert last_number("1万" * 100_000) == 10000


def test_score_of_a_number() -> None:
    doc = {"question": "?", "answer": "2,125"}
    for answer, score in (
        ("答えは2125円", 1.0),
        ("2,125.0", 1.0),
        ("2126", 0.0),
        ("わかりません", 0.0),
        ("-2125", 0.0),
    ):
        assert score_number(doc, [answer]) == {"acc": score}


# MGSM's worked examples


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: node.value)
EXAMPLES = yaml.load((FOLDER / "_mgsm_ja.yaml").read_text(encoding="utf-8"), _Loader)["fewshot_config"]["samples"]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_arithmetic_of_the_worked_examples(example: dict[str, str]) -> None:
    answer = example["answer"]
    equations = re.findall(r"([0-9.]+(?:[-+×÷][0-9.]+)+)=([0-9.]+)", answer)
    assert answer.count("=") == len(equations) >= 2
    for left, right in equations:
        terms = re.sub(r"[0-9.]+", lambda match: f"Fraction('{match[0]}')", left)
        assert eval(terms.replace("×", "*").replace("÷", "/"), {"Fraction": Fraction}) == Fraction(right), left
    assert re.search(r"答えは[0-9]+\w+です。$", answer)
    assert last_number(answer) == Decimal(equations[-1][1]), "the last equation gives another number than the answer"
    assert "\n" not in example["question"] + answer


def test_there_are_eight_worked_examples() -> None:
    assert len({example["question"] for example in EXAMPLES}) == 8
