"""Reads JGLUE and MGSM: from a folder if the task's metadata names one, else downloaded from where they are published.

lm-eval loads this file by its path and calls one function of it for each task, with the task's metadata as keywords.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from datasets import Dataset, DownloadConfig, DownloadManager
from huggingface_hub.errors import OfflineModeIsEnabled

__all__ = ["JGLUE_URL", "MGSM_URL", "jcommonsenseqa", "jnli", "jsquad", "marc_ja", "mgsm_ja"]

#: Where the repositories yahoojapan/JGLUE and google-research/url-nlp can be read file by file.
JGLUE_URL = "https://raw.githubusercontent.com/yahoojapan/JGLUE/main"
MGSM_URL = "https://raw.githubusercontent.com/google-research/url-nlp/main"
#: How a folder is given, to tvmerge and to lm-eval.
FLAG = '--jglue_data DIR (lm_eval run: --metadata \'{"jglue_data": "DIR"}\')'
#: The version of JGLUE that is downloaded.
VERSION = "v1.3"

JNLI_LABELS = ("entailment", "contradiction", "neutral")
MARC_JA_LABELS = ("positive", "negative")
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?", re.ASCII)

Row = dict[str, Any]
Splits = dict[str, Any]  # "valid" is a Dataset; "train", which may be long and is only drawn from, a list of rows


class File(NamedTuple):
    """A file and how errors name it."""

    path: Path
    name: str


def jcommonsenseqa(*, jglue_data: str | None = None, jglue_url: str | None = None, **_: Any) -> Splits:
    """Read JCommonsenseQA.

    Args:
        jglue_data: the folder that has it; None to download it.
        jglue_url: the address of a mirror of the repository yahoojapan/JGLUE.
        **_: the other metadata of a task.

    Returns:
        "valid", the questions, and "train", the few-shot examples: id, question, choices (5), label (index).

    Raises:
        FileNotFoundError: a file that is not there.
        ConnectionError: a file that cannot be downloaded.
        ValueError: a file with something wrong in it.
    """
    return _splits(_jglue_files("jcommonsenseqa", jglue_data, jglue_url), _read_jcommonsenseqa)


def jnli(*, jglue_data: str | None = None, jglue_url: str | None = None, **_: Any) -> Splits:
    """Read JNLI: id, sentence1, sentence2, label (index of entailment, contradiction, neutral).

    Arguments, splits and errors are those of `jcommonsenseqa`.
    """
    return _splits(_jglue_files("jnli", jglue_data, jglue_url), _read_jnli)


def jsquad(*, jglue_data: str | None = None, jglue_url: str | None = None, **_: Any) -> Splits:
    """Read JSQuAD: id, title, context, question, answers (text, answer_start), is_impossible.

    Of the published context ("title [SEP] passage") the passage is kept; answer_start counts from the title on.
    Arguments, splits and errors are those of `jcommonsenseqa`.
    """
    return _splits(_jglue_files("jsquad", jglue_data, jglue_url), _read_jsquad)


def marc_ja(*, jglue_data: str | None = None, **_: Any) -> Splits:
    """Read MARC-ja: id, text, label (index of positive, negative).

    Arguments, splits and errors are those of `jcommonsenseqa`, but for downloads: it is no longer distributed.
    """
    try:
        if jglue_data is None:
            raise FileNotFoundError(f"no folder is given: name one with {FLAG}")
        files = _folder_files("marc_ja", _folder(jglue_data), version="v1.0")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "MARC-ja is no longer distributed. Who has it puts marc_ja-v1.0/valid-v1.0.json and train-v1.0.json "
            f"(JSON Lines of review_id, text, label positive or negative) into a folder of your own. Here {error}"
        ) from error
    return _splits(files, _read_marc_ja)


def mgsm_ja(*, jglue_data: str | None = None, mgsm_url: str | None = None, **_: Any) -> Splits:
    """Read the Japanese questions of MGSM.

    Args:
        jglue_data: the folder that has mgsm_ja.tsv, itself or in a folder mgsm in it or beside it; None to download.
        mgsm_url: the address of a mirror of the repository google-research/url-nlp.
        **_: the other metadata of a task.

    Returns:
        "test": question, answer (a number, as it is written there). Errors are those of `jcommonsenseqa`.
    """
    if jglue_data is None:
        file = _download(f"{(mgsm_url or MGSM_URL).rstrip('/')}/mgsm/mgsm_ja.tsv")
    else:
        folder = _folder(jglue_data)
        homes = (folder, folder / "mgsm", folder.absolute().parent / "mgsm")
        found = [home / "mgsm_ja.tsv" for home in homes if (home / "mgsm_ja.tsv").is_file()]
        if not found:
            raise FileNotFoundError(f"--jglue_data {folder}: has no mgsm_ja.tsv and no mgsm/mgsm_ja.tsv")
        file = File(found[0], str(found[0]))
    return {"test": Dataset.from_list(_not_empty(file, list(_read_mgsm(file))))}


def _splits(files: Sequence[File], read: Callable[[File], Iterator[Row]]) -> Splits:
    valid, train = (_not_empty(file, list(read(file))) for file in files)
    return {"valid": Dataset.from_list(valid), "train": train}


def _not_empty(file: File, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{file.name}: has no questions")
    return rows


# Finding the files


def _jglue_files(name: str, folder: str | None, url: str | None) -> list[File]:
    """The files of the questions and of the few-shot examples."""
    if folder is not None:
        return _folder_files(name, _folder(folder))
    home = f"{(url or JGLUE_URL).rstrip('/')}/datasets/{name}-{VERSION}"
    return [_download(f"{home}/{split}-{VERSION}.json") for split in ("valid", "train")]


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--jglue_data {folder}: no such folder")
    return folder


def _folder_files(name: str, folder: Path, *, version: str = VERSION) -> list[File]:
    roots = (folder, folder / "datasets", folder / "jglue")
    homes = [home for root in roots for home in (*_versions(root, f"{name}-v1.*"), root / name)]
    for home in homes:
        valid = _split_file(home, "valid")
        if valid is not None:
            # Both of one folder: another version of the data has other splits.
            shots = _split_file(home, "train") or _split_file(home, "test")
            if shots is None:
                raise FileNotFoundError(f"{home}: has neither train nor test, and few-shot examples come from there")
            return [File(path, str(path)) for path in (valid, shots)]
    raise FileNotFoundError(f"--jglue_data {folder}: has no {name}-{version}/valid-{version}.json (nor any other v1)")


def _split_file(home: Path, split: str) -> Path | None:
    candidates = (*_versions(home, f"{split}-v1.*.json"), home / f"{split}.json")
    return next((path for path in candidates if path.is_file()), None)


def _versions(folder: Path, pattern: str) -> list[Path]:
    """What fits the pattern in a folder, the highest version first."""

    def version(path: Path) -> tuple[list[int], str]:
        return [int(part) for part in re.findall(r"\d+", path.name.rpartition("-v")[2])], path.name

    return sorted(folder.glob(pattern), key=version, reverse=True)


def _download(url: str) -> File:
    """Fetch a file, or find it in the cache of `datasets`."""
    # Without ETag a file that is in the cache needs no network: the address has the version in it.
    manager = DownloadManager(download_config=DownloadConfig(use_etag=False, disable_tqdm=True))
    try:
        path = str(manager.download(url))
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"{url}: not in the cache, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids to download it: name a "
            f"folder that has it with {FLAG}"
        ) from error
    except (OSError, ValueError, aiohttp.ClientError, asyncio.TimeoutError) as error:
        # fsspec says "file not found" of every failure; its cause knows better.
        cause = error.__cause__ or error
        what = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise ConnectionError(f"{url}: cannot be downloaded ({what}): name a folder that has it with {FLAG}") from error
    return File(Path(path), f"{url} (in the cache as {path})")


# Reading the files


def _read_text(file: File) -> str:
    raw = file.path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file.name}, line {line}: is not UTF-8") from error


def _lines(file: File) -> Iterator[tuple[str, str]]:
    """Every line of a file, after how errors name it."""
    # Not splitlines(): a text may have U+2028 in it, which JSON lets stand.
    lines = _read_text(file).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield f"{file.name}, line {number}", line.removesuffix("\r")


def _json_lines(file: File) -> Iterator[tuple[str, Row]]:
    for where, line in _lines(file):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: is not JSON: {error.msg} (column {error.colno})") from error
        yield where, _typed(row, dict, "a JSON object", where)


def _read_jcommonsenseqa(file: File) -> Iterator[Row]:
    for where, row in _json_lines(file):
        label = _field(row, "label", int, "a number", where)
        if not 0 <= label <= 4:
            raise ValueError(f"{where}: label is {label}, must be 0 to 4")
        yield {
            "id": str(row.get("q_id", "")),
            "question": _text(row, "question", where),
            "choices": [_text(row, f"choice{i}", where) for i in range(5)],
            "label": label,
        }


def _read_jnli(file: File) -> Iterator[Row]:
    for where, row in _json_lines(file):
        yield {
            "id": str(row.get("sentence_pair_id", "")),
            "sentence1": _text(row, "sentence1", where),
            "sentence2": _text(row, "sentence2", where),
            "label": _label(row, JNLI_LABELS, where),
        }


def _read_marc_ja(file: File) -> Iterator[Row]:
    for where, row in _json_lines(file):
        # The copies on the Hub call it sentence.
        field = "sentence" if "text" not in row and "sentence" in row else "text"
        yield {
            "id": str(row.get("review_id", "")),
            "text": _text(row, field, where),
            "label": _label(row, MARC_JA_LABELS, where),
        }


def _read_jsquad(file: File) -> Iterator[Row]:
    text = _read_text(file)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file.name}, line {error.lineno}: is not JSON: {error.msg} (column {error.colno})"
        ) from error
    document = _typed(document, dict, "a JSON object", file.name)
    for where, article in _entries(document, "data", f"{file.name}, "):
        title = _text(article, "title", where)
        for place, paragraph in _entries(article, "paragraphs", f"{where}."):
            context = _text(paragraph, "context", place)
            for spot, entry in _entries(paragraph, "qas", f"{place}."):
                yield _question(entry, spot, file) | {"title": title, "context": context.split("[SEP]")[-1].strip()}


def _question(entry: Row, where: str, file: File) -> Row:
    name = _text(entry, "id", where)
    where = f"{file.name}, question {name}"
    answers = [answer for _, answer in _entries(entry, "answers", f"{where}, ")]
    if not answers:
        raise ValueError(f"{where}: has no answers")
    return {
        "id": name,
        "question": _text(entry, "question", where),
        "answers": {
            "text": [_text(answer, "text", f"{where}, answers[{i}]") for i, answer in enumerate(answers)],
            "answer_start": [
                _field(answer, "answer_start", int, "a number", f"{where}, answers[{i}]")
                for i, answer in enumerate(answers)
            ],
        },
        "is_impossible": "is_impossible" in entry and _field(entry, "is_impossible", bool, "true or false", where),
    }


def _read_mgsm(file: File) -> Iterator[Row]:
    for where, line in _lines(file):
        question, *rest = line.split("\t")
        if len(rest) != 1:
            raise ValueError(f"{where}: has {len(rest)} tabs, must have one, between question and answer")
        answer = rest[0].strip()
        if not question.strip():
            raise ValueError(f"{where}: has no question")
        if not NUMBER.fullmatch(answer):
            raise ValueError(f"{where}: the answer {answer!r} is not a number")
        yield {"question": question, "answer": answer}


def _entries(row: Row, field: str, where: str) -> Iterator[tuple[str, Row]]:
    """The objects of a list, each after how errors name it: `where` goes before the field's name."""
    for i, entry in enumerate(_field(row, field, list, "a list", where.rstrip("., "))):
        place = f"{where}{field}[{i}]"
        yield place, _typed(entry, dict, "a JSON object", place)


def _label(row: Row, labels: Sequence[str], where: str) -> int:
    label = _text(row, "label", where)
    if label not in labels:
        raise ValueError(f"{where}: label is {label!r}, must be one of {', '.join(labels)}")
    return labels.index(label)


def _text(row: Row, field: str, where: str) -> str:
    text: str = _field(row, field, str, "a text", where)
    if not text.strip():
        raise ValueError(f"{where}: {field} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {field} has half of a surrogate pair in it") from error
    return text


def _field(row: Mapping[str, Any], field: str, kind: type, words: str, where: str) -> Any:
    if field not in row:
        raise ValueError(f"{where}: has no {field}")
    return _typed(row[field], kind, words, f"{where}: {field}")


def _typed(value: Any, kind: type, words: str, where: str) -> Any:
    # type(), not isinstance(): true is an int to Python.
    if type(value) is not kind:
        raise ValueError(f"{where} must be {words}, not {json.dumps(value, ensure_ascii=True)[:60]}")
    return value
