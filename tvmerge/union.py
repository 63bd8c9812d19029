"""Models of different tokenizers under one vocabulary: its tokens, their rows, and a tokenizer that knows them all.

Tokens of the first model keep their ids. Those that only others have follow behind its last one, in the rows that it
may have there for no token, then in new ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvmerge.checkpoint import Header, read_json
from tvmerge.errors import IncompatibleError
from tvmerge.files import write_text
from tvmerge.state_dict import Array, StateDict, TensorSpec, WithTensors, deliver
from tvmerge.vocabulary import (
    Rows,
    digest_of,
    read_tokenizer,
    row_count,
    shared_rows,
    vocabulary_of,
    vocabulary_tensors,
)

__all__ = ["Completed", "UnitedVocabulary", "unite"]

#: Other files that a tokenizer is read from, by this or another program: a united one is in tokenizer.json alone.
OTHER_FILES = (
    *("*.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "added_tokens.json"),
    "tokenizer.*.json",
)
#: Rows that are laid out at a time.
BLOCK = 4096

_Json = Mapping[str, Any]


@dataclass(frozen=True)
class UnitedVocabulary:
    """One vocabulary for several models: the first's tokens under their ids, then the tokens that only others have."""

    vocabulary: Mapping[str, int]  # token → id, added tokens too
    size: int  # rows of each vocabulary tensor, the vocab_size of the united configuration
    rows: Sequence[Rows]  # of each model, in the order given: united row → the model's, -1 where it lacks the token
    tokenizer: str | None  # the content of the united tokenizer.json; None where the first model's own will do
    added: Mapping[int, _Json]  # id → flags of the added tokens that the first model's tokenizer lacks

    @property
    def digest(self) -> str:
        """Which token has which id, as `vocabulary_digest` of the united tokenizer."""
        return digest_of(self.vocabulary)

    def complete(self, models: Sequence[StateDict]) -> list[StateDict]:
        """Each model with a row for every united token, one that it lacks being that of the first who has it.

        Rows of no token are the first model's own. Nothing is read yet.

        Args:
            models: as given to `unite`, or with fewer tensors.
        """
        return [Completed(models, n, self.rows) for n in range(len(models))]

    def align(self, models: Sequence[Header], *, whose: Sequence[str]) -> list[Rows]:
        """Align the rows of a task vector's models with the united ones, for tokens that all of them have.

        Args:
            models: the tuned model and its base.
            whose: how to call them in an error.

        Raises:
            IncompatibleError: a model ships no tokenizer.json, or a tensor has not one row for each token.
        """
        known = [_read(model, name) for model, name in zip(models, whose, strict=True)]
        names = self.rows[0].names
        for model, own in zip(models, known, strict=True):
            for tensor in sorted(names):
                if tensor not in model.names or model.spec(tensor).shape[:1] != (own.size,):
                    raise IncompatibleError(
                        f"{own.name}: has no {tensor} with one row for each of the {own.size} tokens that its "
                        "config.json names: use models of one architecture"
                    )
        vocabularies, sizes = [own.vocabulary for own in known], [own.size for own in known]
        return [Rows(source, names) for source in shared_rows(self.vocabulary, self.size, vocabularies, sizes)]

    def keeps(self, path: Path) -> bool:
        """Whether `write_tokenizer` leaves a file of the first model in its place."""
        return self.tokenizer is None or not any(path.match(pattern) for pattern in OTHER_FILES)

    def write_tokenizer(self, folder: Path) -> None:
        """Make the tokenizer of a folder the united one. The same models give the same bytes.

        Files that hold the first's vocabulary in another format are removed: they would contradict tokenizer.json.

        Args:
            folder: with copies of the first model's files, as of `copy_model_files`.
        """
        if self.tokenizer is None:
            return
        for path in [path for path in folder.iterdir() if not self.keeps(path)]:
            path.unlink()
        write_text(folder / "tokenizer.json", self.tokenizer)
        if (folder / "tokenizer_config.json").is_file():
            config = read_json(folder / "tokenizer_config.json")
            config.pop("fast_tokenizer_files", None)
            if isinstance(known := config.get("added_tokens_decoder"), dict):
                known |= {str(index): flags for index, flags in self.added.items()}
            write_text(folder / "tokenizer_config.json", _dump(config))


class Completed(WithTensors):
    """A model in united rows: its own, for tokens that it lacks those of the first model that has them, or zeros.

    Rows are rounded to the model's dtype, once. Reading a tensor holds that tensor and a block of rows.

    Args:
        models: all of them.
        own: which of them this is.
        rows: of each of them, as long as the united vocabulary.
    """

    def __init__(self, models: Sequence[StateDict], own: int, rows: Sequence[Rows]) -> None:
        self._models = tuple(models)
        self._own = self._models[own]
        self._names = rows[0].names
        source = np.array([each.source for each in rows], np.int64)  # [models, tokens]
        # Of which model each row is: this one where it can, else the first that can; -1 for none.
        lender = np.where((source >= 0).any(0), (source >= 0).argmax(0), -1)
        self._lender = np.where(source[own] >= 0, own, lender)
        self._row = np.take_along_axis(source, np.maximum(self._lender, 0)[None], 0)[0]
        self._lenders = [int(n) for n in np.unique(self._lender) if n >= 0]
        self._layout = hashlib.sha256(self._lender.tobytes() + self._row.tobytes()).hexdigest()

    @property
    def names(self) -> Sequence[str]:
        """As before."""
        return self._own.names

    def spec(self, name: str) -> TensorSpec:
        """As before, but for the number of rows."""
        spec = self._own.spec(name)
        return TensorSpec((len(self._row), *spec.shape[1:]), spec.dtype) if name in self._names else spec

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """A vocabulary tensor is copied row by row from the models that have them."""
        if name not in self._names:
            return self._own.array(name, out=out)
        spec = self.spec(name)
        if out is None or out.dtype != spec.dtype:
            return deliver(self.array(name, out=np.empty(spec.shape, spec.dtype)), out)
        out[self._lender < 0] = 0
        for n in self._lenders:
            values, rows = self._models[n].array(name), np.flatnonzero(self._lender == n)
            for start in range(0, len(rows), BLOCK):
                block = rows[start : start + BLOCK]
                out[block] = values[self._row[block]].astype(spec.dtype, copy=False)
        return out

    def version(self, name: str) -> Hashable:
        """Of a vocabulary tensor those of all models that rows of it are from."""
        if name not in self._names:
            return self._own.version(name)
        lenders = tuple(self._models[n].version(name) for n in self._lenders)
        return Completed, self._layout, lenders, self._own.spec(name).dtype


def unite(models: Sequence[Header], *, whose: Sequence[str]) -> UnitedVocabulary | None:
    """One vocabulary for models whose tokenizers differ; reads no weights.

    New ids follow the first model's last, by model and then by id. Rows behind the first's last token that neither its
    tokenizer nor an id in its configuration names are taken first: no text could reach them.

    Args:
        models: the first gives the ids of its tokens, and how text is split.
        whose: how to call them in an error.

    Returns:
        None if all have the same vocabulary and the same number of rows.

    Raises:
        IncompatibleError: a model ships no tokenizer.json, or tokenizers whose tokens stand for text in other ways.
        CheckpointError: a file that cannot be read.
    """
    known = [_read(model, name) for model, name in zip(models, whose, strict=True)]
    differ = [each for each in known if each.vocabulary != known[0].vocabulary]
    if not differ and len({each.size for each in known}) == 1:
        return None
    names = vocabulary_tensors(models, [each.size for each in known])
    if not names:
        raise IncompatibleError(f"no tensor of {whose[0]} and the others has one row for each token: use dense models")
    united, tokenizer, added = known[0].vocabulary, None, {}
    if differ:
        try:
            for other in differ:
                _check_alike(known[0], other)
            united, new = _united_ids(models[0], known), _new_added_tokens(known)
            tokenizer = _dump(_united_tokenizer([each.content for each in known], united, new))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            damaged = f"a tokenizer.json of {', '.join(whose)} is damaged, fetch it again"
            raise IncompatibleError(f"{damaged}: {type(error).__name__}: {error}") from error
        added = {united[token]: {k: v for k, v in entry.items() if k != "id"} for token, entry in new.items()}
    size = max(known[0].size, 1 + max(united.values()))
    sources = [shared_rows(united, size, [each.vocabulary], [each.size])[0] for each in known]
    padding = [row < known[0].size and all(source[row] < 0 for source in sources) for row in range(size)]
    sources[0] = tuple(row if padding[row] else own for row, own in enumerate(sources[0]))
    return UnitedVocabulary(united, size, [Rows(source, names) for source in sources], tokenizer, added)


@dataclass(frozen=True)
class _Known:
    """What is known of a model's tokens."""

    name: str  # as errors call it
    content: _Json  # of its tokenizer.json
    vocabulary: dict[str, int]  # token → id, added tokens too
    size: int  # rows of its vocabulary tensors

    @property
    def kind(self) -> str:
        """The kind of the tokenizer's model, which older files do not name."""
        model = self.content["model"]
        guess = "Unigram" if isinstance(model["vocab"], list) else "BPE" if "merges" in model else "WordLevel"
        return str(model.get("type") or guess)

    @property
    def added(self) -> dict[str, _Json]:
        """Token → flags, of added tokens."""
        return {entry["content"]: entry for entry in self.content.get("added_tokens") or []}


def _read(model: Header, name: str) -> _Known:
    content = read_tokenizer(model.model.path)
    if content is None:
        raise IncompatibleError(
            f"{name}: ships no tokenizer.json, which vocabularies are united by: save its tokenizer with transformers"
        )
    vocabulary, size = vocabulary_of(content, added=True), row_count(model, name)
    if not vocabulary or min(vocabulary.values()) < 0 or max(vocabulary.values()) >= size + len(vocabulary):
        raise IncompatibleError(f"{name}: its tokenizer.json tells no vocabulary that can be united: fetch it again")
    return _Known(name, content, vocabulary, size)


def _united_ids(first: Header, known: Sequence[_Known]) -> dict[str, int]:
    """Token → united id; new ones from the first id on that nothing of the first model names."""
    united = dict(known[0].vocabulary)
    named = {index: token for token, index in united.items()}
    if shared := sorted(index for token, index in united.items() if named[index] != token):
        raise IncompatibleError(
            f"{known[0].name}: its tokenizer.json has two tokens for the id {shared[0]}, one is {named[shared[0]]!r}: "
            "save its tokenizer with transformers"
        )
    end = 1 + max([*named, *_configured_ids(first, known[0].size)])
    if known[0].kind == "Unigram":  # where a token's id is its place
        gaps = [index for index in range(end) if index not in named]
        united |= {f"<|unused_{index}|>": index for index in gaps}
    for other in known[1:]:
        for token in sorted(other.vocabulary, key=lambda each: (other.vocabulary[each], each)):
            if token not in united:
                united[token] = end
                end += 1
    return united


def _configured_ids(model: Header, size: int) -> Iterator[int]:
    """Ids that a model's configuration gives a meaning, as that of an end token that its tokenizer lacks."""
    path = model.model.path / "generation_config.json"
    for config in (model.config, read_json(path) if path.is_file() else {}):
        for key, value in config.items():
            if key.endswith("_token_id"):
                ids = value if isinstance(value, list) else [value]
                yield from (index for index in ids if isinstance(index, int) and index < size)


def _check_alike(first: _Known, other: _Known) -> None:
    """Refuse tokenizers whose tokens stand for text in other ways, so that one could not read both."""
    theirs = _ways(other)
    for what, way in _ways(first).items():
        if way != theirs[what]:
            raise IncompatibleError(
                f"the tokenizers of {first.name} and {other.name} cannot be united: {what}: {_short(way)} in the "
                f"former and {_short(theirs[what])} in the latter: use models of one kind of tokenizer"
            )


def _ways(known: _Known) -> dict[str, Any]:
    """What decides which text a token stands for."""
    model = known.content["model"]
    normalizer, splits = (_parts(known.content.get(key)) for key in ("normalizer", "pre_tokenizer"))
    spelling = _spelling([*normalizer, *splits])
    return {
        "the kind of their models": known.kind,
        "what they spell": spelling,
        "byte_fallback": bool(model.get("byte_fallback")),
        "continuing_subword_prefix": model.get("continuing_subword_prefix") or "none",
        "end_of_word_suffix": model.get("end_of_word_suffix") or "none",
        "the normalizer": [part for part in normalizer if not _is_space(part)],
        "the pre-tokenizer": [part for part in splits if not _is_space(part) and _matters(part, spelling)],
    }


def _parts(component: Any) -> list[_Json]:
    """A normalizer or pre-tokenizer, as the list of what it does one after the other."""
    if component is None:
        return []
    for key in ("normalizers", "pretokenizers"):
        if key in component:
            return [part for each in component[key] for part in _parts(each)]
    return [component]


def _is_space(part: _Json) -> bool:
    """Whether part of a normalizer or pre-tokenizer only says how spaces are spelled."""
    is_replaced = part["type"] == "Replace" and part["pattern"] == {"String": " "}
    return is_replaced or part["type"] in {"ByteLevel", "Metaspace", "Prepend"}


def _matters(part: _Json, spelling: str) -> bool:
    """Whether part of a pre-tokenizer decides which text has tokens at all."""
    if spelling == "bytes":  # all of them have one
        return part["type"] not in {"Split", "Digits", "Punctuation"}
    return spelling == "text" or part["type"] != "Split" or part["pattern"] != {"String": " "}  # no space is left


def _spelling(parts: Sequence[_Json]) -> str:
    """How tokens spell text: as bytes, with another character for a space, or as it is."""
    if any(part["type"] == "ByteLevel" for part in parts):
        return "bytes"
    spaces = sorted({str(part.get("replacement") or part.get("content") or "") for part in parts if _is_space(part)})
    return " ".join(["text", *(f"with {space!r} for a space" for space in spaces if space)])


def _short(way: Any) -> str:
    text = json.dumps(way, ensure_ascii=False) if isinstance(way, list) else str(way)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _new_added_tokens(known: Sequence[_Known]) -> dict[str, _Json]:
    """Added tokens that the first lacks, as the first model that has them describes them.

    A token that is plain in an earlier model stays so, or its text would be split otherwise.

    Raises:
        IncompatibleError: a special token, which is left out of answers, is plain text in an earlier model.
    """
    found: dict[str, _Json] = {}
    owner: dict[str, _Known] = {}  # token → the first model that has it
    for model in known:
        for token, entry in model.added.items():
            earlier = owner.get(token, model)
            if entry.get("special") and token not in earlier.added:
                raise IncompatibleError(
                    f"{token!r} is a special token of {model.name} and plain text to {earlier.name}: make it special "
                    "in the tokenizers of both"
                )
            if earlier is model is not known[0]:
                found[token] = entry
        for token in model.vocabulary:
            owner.setdefault(token, model)
    return found


def _united_tokenizer(contents: Sequence[_Json], united: Mapping[str, int], new: Mapping[str, _Json]) -> _Json:
    """The first's tokenizer.json with the tokens and merges of all.

    Every token is in its model's vocabulary, added ones too: those that are not get the ids behind as many as are.
    """
    first = contents[0]
    model, tokens = dict(first["model"]), sorted(united, key=lambda token: united[token])
    if isinstance(model["vocab"], list):
        scores: dict[str, float] = {}
        for content in contents:
            scores = {piece: score for piece, score in content["model"]["vocab"]} | scores
        model["vocab"] = [[token, scores.get(token, 0.0)] for token in tokens]
    else:
        model["vocab"] = {token: united[token] for token in tokens}
    if "merges" in model:
        model["merges"] = _united_merges([content["model"]["merges"] for content in contents])
    added = [{**entry, "id": united[token]} for token, entry in new.items()]
    return {**first, "added_tokens": [*(first.get("added_tokens") or []), *added], "model": model}


def _united_merges(merges: Sequence[Sequence[Any]]) -> list[Any]:
    """The first's, then those that only others have: they join what the first's leave."""
    pairs = [tuple(each.split(" ") if isinstance(each, str) else each) for of_one in merges for each in of_one]
    own = len(merges[0])
    known = set(pairs[:own])
    more = [list(pair) for pair in dict.fromkeys(pairs) if pair not in known]
    if all(isinstance(each, str) for each in merges[0]) and not any(" " in part for pair in more for part in pair):
        return [*merges[0], *map(" ".join, more)]
    return [*map(list, pairs[:own]), *more]


def _dump(content: _Json) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
