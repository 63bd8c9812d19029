"""Reading JGLUE and MGSM: where files are looked for, what is wrong in them, and downloads from a server here."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import jglue_data
import pytest
from conftest import ROOT
from jglue_rows import choice_row, pair_row, passage, review_row, write_all, write_lines

from tvmerge.errors import TaskError
from tvmerge.evaluators.tasks import load_tasks

FOLDER = ROOT / "benchmarks" / "jglue"
READERS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "jcommonsenseqa": jglue_data.jcommonsenseqa,
    "jnli": jglue_data.jnli,
    "jsquad": jglue_data.jsquad,
    "marc_ja": jglue_data.marc_ja,
    "mgsm_ja": jglue_data.mgsm_ja,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_all(tmp_path / "data", n_valid=3, n_train=2)


def test_what_is_read(data: Path) -> None:
    read = {name: reader(jglue_data=str(data), version=1.0) for name, reader in READERS.items()}
    assert list(read["jcommonsenseqa"]["valid"])[2] == {
        "id": "2",
        "question": "問2は？",
        "choices": ["選2の0", "選2の1", "選2の2", "選2の3", "選2の4"],
        "label": 2,
    }
    assert [row["label"] for row in read["jnli"]["valid"]] == [0, 1, 2]
    assert [row["label"] for row in read["marc_ja"]["valid"]] == [0, 1, 0]
    assert list(read["jsquad"]["valid"])[1] == {
        "id": "a0p0q1",
        "title": "題0",
        "context": "高い塔0がある。",
        "question": "何1？",
        "answers": {"text": ["塔0", "高い塔0"], "answer_start": [9, 7]},
        "is_impossible": False,
    }
    assert [row["id"] for row in read["jsquad"]["train"]] == ["a3p0q0", "a3p0q1", "a4p0q0", "a4p0q1"]
    assert next(iter(read["mgsm_ja"]["test"]))["answer"] == "1,000"
    assert list(read["mgsm_ja"]) == ["test"]


@pytest.mark.parametrize("home", ["datasets/jnli-v1.3", "jglue/jnli-v1.1", "jnli"])
def test_folders_may_lie_a_little_otherwise(home: str, data: Path, tmp_path: Path) -> None:
    version = home.partition("-")[2]
    for split in ("valid", "train"):
        target = tmp_path / "other" / home / (f"{split}-{version}.json" if version else f"{split}.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((data / "jnli-v1.3" / f"{split}-v1.3.json").read_bytes())
    read, same = (jglue_data.jnli(jglue_data=str(folder)) for folder in (tmp_path / "other", data))
    assert list(read["valid"]) == list(same["valid"])
    assert read["train"] == same["train"]


@pytest.mark.parametrize("home", [".", "mgsm", "../mgsm"])
def test_mgsm_may_lie_in_a_folder_of_its_own(home: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "some" / "jglue").mkdir(parents=True)
    (tmp_path / "some" / "jglue" / home).mkdir(exist_ok=True)
    (data / "mgsm_ja.tsv").rename(tmp_path / "some" / "jglue" / home / "mgsm_ja.tsv")
    assert len(jglue_data.mgsm_ja(jglue_data=str(tmp_path / "some" / "jglue"))["test"]) == 3


def test_the_highest_version_is_taken(data: Path) -> None:
    for version, n in (("v1.2", 1), ("v1.10", 5)):
        for split in ("valid", "train"):
            write_lines(data / f"jnli-{version}" / f"{split}-{version}.json", [pair_row(i) for i in range(n)])
    assert len(jglue_data.jnli(jglue_data=str(data))["valid"]) == 5


def test_examples_come_from_test_if_there_is_no_train(data: Path) -> None:
    home = data / "jnli-v1.3"
    (home / "train-v1.3.json").rename(home / "test-v1.3.json")
    assert [row["id"] for row in jglue_data.jnli(jglue_data=str(data))["train"]] == ["3", "4"]
    (home / "test-v1.3.json").unlink()
    assert_says(lambda: jglue_data.jnli(jglue_data=str(data)), FileNotFoundError, f"{home}: has neither train nor test")


def test_bom_crlf_an_empty_last_line_and_a_line_separator_in_a_text_are_fine(data: Path) -> None:
    rows = [{**pair_row(0), "sentence1": "前\u2028文\u0085"}, pair_row(1)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n"
    (data / "jnli-v1.3" / "valid-v1.3.json").write_bytes(text.removesuffix("\r\n").encode("utf-8-sig"))
    assert [row["sentence1"] for row in jglue_data.jnli(jglue_data=str(data))["valid"]] == [
        "前\u2028文\u0085",
        "前の文1。",
    ]
    (data / "mgsm_ja.tsv").write_bytes("問\t1,234\r\n問\t-5\r\n".encode("utf-8-sig"))
    assert [row["answer"] for row in jglue_data.mgsm_ja(jglue_data=str(data))["test"]] == ["1,234", "-5"]


def test_marc_ja_may_call_the_text_a_sentence_and_ids_may_be_missing_or_twice(data: Path) -> None:
    rows = [{"sentence": "良い", "label": "positive"}, {**review_row(1), "review_id": 7}, review_row(1), review_row(1)]
    write_lines(data / "marc_ja-v1.0" / "valid-v1.0.json", rows)
    read = list(jglue_data.marc_ja(jglue_data=str(data))["valid"])
    assert [row["text"] for row in read] == ["良い", "感想1", "感想1", "感想1"]
    assert [row["id"] for row in read] == ["", "7", "R1", "R1"]


def assert_says(call: Callable[[], object], kind: type[Exception], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def lines(*rows: Mapping[str, Any] | str) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode("utf-8", "surrogatepass")


def without(row: Mapping[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != field}


def squad(**changes: Any) -> bytes:
    """A second passage whose first question has something else in it."""
    broken = passage(1)
    broken["paragraphs"][0]["qas"][0].update(changes)
    return json.dumps({"data": [passage(0), broken]}, indent=1).encode()


BROKEN: list[tuple[str, bytes, str]] = [
    ("jcommonsenseqa", lines(choice_row(0), '{"q_id": 1,'), ", line 2: is not JSON: "),
    ("jcommonsenseqa", lines(choice_row(0), "", choice_row(1)), ", line 2: is not JSON: "),
    ("jcommonsenseqa", lines("[1]"), ", line 1 must be a JSON object, not [1]"),
    ("jcommonsenseqa", lines(choice_row(0), without(choice_row(1), "choice3")), ", line 2: has no choice3"),
    ("jcommonsenseqa", lines({**choice_row(0), "choice4": 5}), ", line 1: choice4 must be a text, not 5"),
    ("jcommonsenseqa", lines({**choice_row(0), "label": 5}), ", line 1: label is 5, must be 0 to 4"),
    ("jcommonsenseqa", lines({**choice_row(0), "label": -1}), ", line 1: label is -1, must be 0 to 4"),
    ("jcommonsenseqa", lines({**choice_row(0), "label": "1"}), ', line 1: label must be a number, not "1"'),
    ("jcommonsenseqa", lines({**choice_row(0), "label": True}), ", line 1: label must be a number, not true"),
    ("jcommonsenseqa", lines({**choice_row(0), "question": " "}), ", line 1: question is empty"),
    ("jcommonsenseqa", b"", ": has no questions"),
    ("jnli", lines(pair_row(0), pair_row(1), {**pair_row(2), "label": "other"}), ", line 3: label is 'other', must be"),
    ("jnli", lines(pair_row(0), {**pair_row(1), "sentence2": None}), ", line 2: sentence2 must be a text, not null"),
    ("jnli", lines(pair_row(0), "{}") + b"\n\n\n", ", line 2: has no sentence1"),
    ("jnli", lines({**pair_row(0), "sentence1": "\ud800"}), ", line 1: sentence1 has half of a surrogate pair in it"),
    ("jnli", lines(pair_row(0)) + b"\n\xff\xfe\n", ", line 2: is not UTF-8"),
    ("jnli", b"\n", ": has no questions"),
    ("marc_ja", lines(review_row(0), without(review_row(1), "text")), ", line 2: has no text"),
    ("marc_ja", lines(review_row(0), {**review_row(1), "label": "neutral"}), ", line 2: label is 'neutral', must be"),
    ("jsquad", b'{"data": [\n{"title": "x"\n', ", line 3: is not JSON: "),
    ("jsquad", b"[]", " must be a JSON object, not []"),
    ("jsquad", b"{}", ": has no data"),
    ("jsquad", b'{"data": []}', ": has no questions"),
    ("jsquad", b'{"data": {}}', ": data must be a list, not {}"),
    (
        "jsquad",
        b'{"data": [{"title": "x", "paragraphs": [3]}]}',
        ", data[0].paragraphs[0] must be a JSON object, not 3",
    ),
    ("jsquad", b'{"data": [{"title": "x", "paragraphs": [{"qas": []}]}]}', ", data[0].paragraphs[0]: has no context"),
    ("jsquad", b'{"data": [{"paragraphs": []}]}', ", data[0]: has no title"),
    ("jsquad", squad(id=3), ", data[1].paragraphs[0].qas[0]: id must be a text, not 3"),
    ("jsquad", squad(question=""), ", question a1p0q0: question is empty"),
    ("jsquad", squad(answers=[]), ", question a1p0q0: has no answers"),
    ("jsquad", squad(answers=None), ", question a1p0q0: answers must be a list, not null"),
    ("jsquad", squad(answers=[{"text": "a"}]), ", question a1p0q0, answers[0]: has no answer_start"),
    ("jsquad", squad(answers=["a"]), ', question a1p0q0, answers[0] must be a JSON object, not "a"'),
    ("jsquad", squad(is_impossible=0), ", question a1p0q0: is_impossible must be true or false, not 0"),
    ("mgsm_ja", "問\t1\n問い\n".encode(), ", line 2: has 0 tabs, must have one"),
    ("mgsm_ja", "問\t1\n問\t2\t3\n".encode(), ", line 2: has 2 tabs, must have one"),
    ("mgsm_ja", "問\t1\n\t2\n".encode(), ", line 2: has no question"),
    ("mgsm_ja", "question\tanswer\n問\t1\n".encode(), ", line 1: the answer 'answer' is not a number"),
    ("mgsm_ja", b"", ": has no questions"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
@pytest.mark.parametrize("split", ["valid", "train"])
def test_what_is_wrong_is_said_in_one_line_with_its_place(
    name: str, content: bytes, message: str, split: str, data: Path
) -> None:
    path = data / "mgsm_ja.tsv" if name == "mgsm_ja" else next(data.glob(f"{name}-v1.*/{split}-*.json"))
    path.write_bytes(content)
    assert_says(lambda: READERS[name](jglue_data=str(data)), ValueError, f"{path}{message}")


@pytest.mark.parametrize("name", sorted(READERS))
def test_files_that_are_not_there(name: str, tmp_path: Path) -> None:
    wanted = {"mgsm_ja": "mgsm_ja.tsv", "marc_ja": "marc_ja-v1.0/valid-v1.0.json"}.get(name, f"{name}-v1.3/valid-v1.3")
    assert_says(lambda: READERS[name](jglue_data=str(tmp_path)), FileNotFoundError, str(tmp_path), wanted)
    nowhere = str(tmp_path / "nowhere")
    assert_says(lambda: READERS[name](jglue_data=nowhere), FileNotFoundError, f"jglue_data {nowhere}: no such folder")


def test_marc_ja_cannot_be_downloaded() -> None:
    with pytest.raises(TaskError, match=r"task marc_ja: MARC-ja is no longer distributed") as caught:
        load_tasks(["marc_ja"], task_dir=FOLDER)
    assert "\n" not in str(caught.value)


# Downloads


class Mirror(ThreadingHTTPServer):
    """Serves a folder as the repositories are served, and counts."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}/main"
        self.asked: list[str] = []


class MirrorHandler(SimpleHTTPRequestHandler):
    server: Mirror

    def translate_path(self, path: str) -> str:
        self.server.asked.append(f"{self.command} {path}")
        return os.path.join(self.server.folder, path.removeprefix("/main/"))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def mirror(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    (data / "datasets").mkdir()
    (data / "mgsm").mkdir()
    for name in ("jcommonsenseqa-v1.3", "jnli-v1.3", "jsquad-v1.3"):
        (data / name).rename(data / "datasets" / name)
    (data / "mgsm_ja.tsv").rename(data / "mgsm" / "mgsm_ja.tsv")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Mirror(data)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(name: str, url: str) -> dict[str, Any]:
    return READERS[name](mgsm_url=url) if name == "mgsm_ja" else READERS[name](jglue_url=url)


@pytest.mark.parametrize("name", ["jcommonsenseqa", "jnli", "jsquad", "mgsm_ja"])
def test_files_are_downloaded_once(name: str, mirror: Mirror, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {split: list(rows) for split, rows in READERS[name](jglue_data=str(data)).items()}
    assert {split: list(rows) for split, rows in fetch(name, mirror.url + "/").items()} == expected
    asked = len(mirror.asked)
    assert asked
    mirror.shutdown()
    mirror.server_close()
    for offline in (False, True):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        assert {split: list(rows) for split, rows in fetch(name, mirror.url).items()} == expected
    assert len(mirror.asked) == asked


def test_downloads_that_fail_are_said_in_one_line(mirror: Mirror, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "datasets" / "jnli-v1.3" / "train-v1.3.json").unlink()
    url = f"{mirror.url}/datasets/jnli-v1.3/train-v1.3.json"
    assert_says(lambda: fetch("jnli", mirror.url), ConnectionError, f"{url}: cannot be downloaded (", "404")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert_says(
            lambda: fetch("jnli", nowhere), ConnectionError, f"{nowhere}/datasets/jnli", "cannot be downloaded ("
        )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    url = f"{mirror.url}/datasets/jsquad-v1.3/valid-v1.3.json"
    assert_says(lambda: fetch("jsquad", mirror.url), ConnectionError, f"{url}: not in the cache", "jglue_data")


def test_a_downloaded_file_that_is_broken_is_named_by_its_address_and_its_copy(mirror: Mirror, tmp_path: Path) -> None:
    (mirror.folder / "datasets" / "jnli-v1.3" / "valid-v1.3.json").write_text("<html>")
    address = f"{mirror.url}/datasets/jnli-v1.3/valid-v1.3.json (in the cache as {tmp_path / 'cache'}"
    assert_says(lambda: fetch("jnli", mirror.url), ValueError, address, ", line 1: is not JSON")


def test_a_download_that_is_forbidden_is_said_to_the_user_of_tvmerge() -> None:
    with pytest.raises(TaskError, match=r"task jnli: .*not in the cache, and HF_HUB_OFFLINE") as caught:
        load_tasks(["jnli"], task_dir=FOLDER)
    assert f"{jglue_data.JGLUE_URL}/datasets/jnli-v1.3/valid-v1.3.json" in str(caught.value)
    assert "\n" not in str(caught.value)
