"""Made-up rows in the files and folders of JGLUE and MGSM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

JNLI = ("entailment", "contradiction", "neutral")


def choice_row(i: int) -> dict[str, Any]:
    return {"q_id": i, "question": f"問{i}は？", **{f"choice{k}": f"選{i}の{k}" for k in range(5)}, "label": i % 5}


def pair_row(i: int) -> dict[str, Any]:
    # As in JNLI, most are neutral.
    label = JNLI[i % 3] if i % 9 < 3 else "neutral"
    return {"sentence_pair_id": str(i), "sentence1": f"前の文{i}。", "sentence2": f"後の文{i}。", "label": label}


def review_row(i: int) -> dict[str, Any]:
    return {"review_id": f"R{i}", "text": f"感想{i}", "label": "negative" if i % 5 == 1 else "positive"}


def passage(i: int) -> dict[str, Any]:
    questions = [
        {
            "id": f"a{i}p0q{k}",
            "question": f"何{k}？",
            "answers": [{"text": f"塔{i}", "answer_start": 9}, {"text": f"高い塔{i}", "answer_start": 7}],
            "is_impossible": False,
        }
        for k in range(2)
    ]
    return {"title": f"題{i}", "paragraphs": [{"context": f"題{i} [SEP] 高い塔{i}がある。", "qas": questions}]}


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_all(folder: Path, *, n_valid: int = 4, n_train: int = 18) -> Path:
    """Write every task's files: rows 0 … n_valid - 1 to ask, the rest as examples."""
    for name, row in (("jcommonsenseqa-v1.3", choice_row), ("jnli-v1.3", pair_row), ("marc_ja-v1.0", review_row)):
        version = name.partition("-")[2]
        write_lines(folder / name / f"valid-{version}.json", [row(i) for i in range(n_valid)])
        write_lines(folder / name / f"train-{version}.json", [row(n_valid + i) for i in range(n_train)])
    for split, numbers in (("valid", range(n_valid)), ("train", range(n_valid, n_valid + n_train))):
        write_lines(folder / "jsquad-v1.3" / f"{split}-v1.3.json", [{"data": [passage(i) for i in numbers]}])
    lines = [f"みかんが{i}個と1,000個あります。全部で何個ですか？\t{1000 + i:,}\n" for i in range(n_valid)]
    (folder / "mgsm_ja.tsv").write_text("".join(lines), encoding="utf-8")
    return folder
