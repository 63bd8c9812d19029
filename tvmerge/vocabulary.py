"""Vocabularies: which tokens two models share, and models whose rows are laid out as another model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvmerge.checkpoint import Header, read_json
from tvmerge.errors import IncompatibleError
from tvmerge.state_dict import Array, StateDict, TensorSpec, WithTensors, deliver

__all__ = [
    "VOCABULARIES",
    "Aligned",
    "Rows",
    "align_rows",
    "check_same_vocabulary",
    "digest_of",
    "read_tokenizer",
    "row_count",
    "shared_rows",
    "vocabulary_digest",
    "vocabulary_of",
    "vocabulary_tensors",
]

#: What to do with models whose vocabularies differ.
VOCABULARIES = ("same", "intersect", "union")
_ONE_TOKENIZER = (
    "use models of one tokenizer, or --vocabulary intersect to merge the rows of the tokens that they share"
)


def check_same_vocabulary(
    reference: Header,
    other: Header,
    *,
    reference_name: str,
    other_name: str,
    hint: str = _ONE_TOKENIZER,
) -> None:
    """Refuse two models whose tokenizers give different ids to tokens, where both ship a tokenizer.json.

    Only the model's own vocabulary counts: a chat format may rename added tokens. The error ends with `hint`.

    Raises:
        IncompatibleError: with the number of tokens that differ.
    """
    ours, theirs = _vocabulary(reference.model.path), _vocabulary(other.model.path)
    if ours is None or theirs is None:
        return
    moved = sorted(token for token, index in ours.items() if theirs.get(token, index) != index)
    only_ours, only_theirs = len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())
    if moved or only_ours or only_theirs:
        raise IncompatibleError(
            f"the vocabularies of {reference_name} and {other_name} differ: {only_ours} tokens only in the former, "
            f"{only_theirs} only in the latter, {len(moved)} with another id: {hint}"
        )


def _vocabulary(folder: Path, *, added: bool = False) -> dict[str, int] | None:
    """Token → id, from tokenizer.json; with `added`, of added tokens too."""
    content = read_tokenizer(folder)
    return None if content is None else vocabulary_of(content, added=added)


def read_tokenizer(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's tokenizer.json; None if there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = folder / "tokenizer.json"
    return read_json(path) if path.is_file() else None


def vocabulary_of(content: Mapping[str, Any], *, added: bool) -> dict[str, int] | None:
    """Token → id, from the content of a tokenizer.json; with `added`, of added tokens too; None if it tells none."""
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # a unigram model: [token, score] pairs, in the order of their ids
            vocabulary = {str(entry[0]): index for index, entry in enumerate(vocabulary)}
        tokens = content.get("added_tokens") or [] if added else []
        found = {**vocabulary, **{str(token["content"]): token["id"] for token in tokens}}
    except (KeyError, TypeError, IndexError):  # none that can be read here
        return None
    return found if all(isinstance(index, int) for index in found.values()) else None


def vocabulary_digest(model: Header) -> str | None:
    """A digest of which token has which id, which decides how rows are aligned; None if no tokenizer.json tells."""
    vocabulary = _vocabulary(model.model.path, added=True)
    return None if vocabulary is None else digest_of(vocabulary)


def digest_of(vocabulary: Mapping[str, int]) -> str:
    """A digest of which token has which id."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Rows:
    """How rows of another model's vocabulary tensors are laid out as those of the target."""

    source: tuple[int, ...]  # for each of the target's rows the other model's row, -1 for none
    names: frozenset[str]  # the tensors that have one row for each token


def align_rows(target: Header, models: Sequence[Header], *, whose: Sequence[str]) -> list[Rows | None]:
    """Align the rows of a task vector's models with those of a target by token, for tokens that all of them have.

    Args:
        target: the model whose layout is kept.
        models: the tuned model and its base.
        whose: how to call them in an error.

    Returns:
        For each model its rows; None for all if every token has the same row in all of them.

    Raises:
        IncompatibleError: a model ships no tokenizer.json, or no tensor has one row for each token.
    """
    vocabularies = []
    for model, name in zip((target, *models), ("the target model", *whose), strict=True):
        vocabulary = _vocabulary(model.model.path, added=True)
        if vocabulary is None:
            raise IncompatibleError(f"{name}: ships no tokenizer.json to align its vocabulary by: save one with it")
        vocabularies.append(vocabulary)
    sizes = [
        row_count(model, name) for model, name in zip((target, *models), ("the target model", *whose), strict=True)
    ]
    if all(v == vocabularies[0] for v in vocabularies) and len(set(sizes)) == 1:
        return [None for _ in models]
    names = vocabulary_tensors((target, *models), sizes)
    if not names:
        raise IncompatibleError("no tensor of the target model has one row for each token of its vocabulary")
    rows = shared_rows(vocabularies[0], sizes[0], vocabularies[1:], sizes[1:])
    return [Rows(source=source, names=names) for source in rows]


def shared_rows(
    target: Mapping[str, int], size: int, others: Sequence[Mapping[str, int]], sizes: Sequence[int]
) -> list[tuple[int, ...]]:
    """For each row of a target the rows of others, by token; -1 where one of them lacks the token or its row.

    Args:
        target: token → id.
        size: rows of the target's vocabulary tensors.
        others: token → id, of each of the others.
        sizes: rows of theirs.
    """
    rows = [[-1] * size for _ in others]
    for token, row in target.items():
        theirs = [vocabulary.get(token, -1) for vocabulary in others]
        if row < size and all(0 <= other < end for other, end in zip(theirs, sizes, strict=True)):
            for column, other in zip(rows, theirs, strict=True):
                column[row] = other
    return [tuple(column) for column in rows]


def vocabulary_tensors(models: Sequence[Header], sizes: Sequence[int]) -> frozenset[str]:
    """The tensors outside of the layers that have one row for each token in every model.

    Args:
        models: at least one.
        sizes: how many rows the vocabulary tensors of each have.
    """
    found = {name for name in models[0].names if _is_vocabulary(name, models, sizes)}
    # Where the vocabulary is as large as the model is wide, a norm looks like a bias.
    matrices = {name.rpartition(".")[0] for name in found if len(models[0].spec(name).shape) == 2}
    return frozenset(name for name in found if name.rpartition(".")[0] in matrices)


def row_count(model: Header, name: str) -> int:
    """How many rows the vocabulary tensors of a model have, by its configuration.

    Raises:
        IncompatibleError: it does not say; `name` is how to call the model.
    """
    size = model.vocabulary_size
    if size is None:
        raise IncompatibleError(f"{name}: its config.json has no vocab_size to align its vocabulary by")
    return size


def _is_vocabulary(name: str, models: Sequence[Header], sizes: Sequence[int]) -> bool:
    """Whether a tensor outside of the layers has one row for each token in every model."""
    if any(part.isdecimal() for part in name.split(".")):
        return False
    specs = [model.spec(name) if name in model.names else None for model in models]
    return all(spec is not None and spec.shape[:1] == (size,) for spec, size in zip(specs, sizes, strict=True))


class Aligned(WithTensors):
    """A state dict whose vocabulary tensors are laid out as those of another model; rows that it lacks are zeros.

    Args:
        state_dict: a tuned model or its base.
        rows: from `align_rows`, the same tokens for both.
    """

    def __init__(self, state_dict: StateDict, rows: Rows) -> None:
        self._state_dict = state_dict
        self._names = rows.names
        self._source = np.array(rows.source)
        self._lacks = self._source < 0

    @property
    def names(self) -> Sequence[str]:
        """As before."""
        return self._state_dict.names

    def spec(self, name: str) -> TensorSpec:
        """As before, but for the number of rows."""
        spec = self._state_dict.spec(name)
        return TensorSpec((len(self._source), *spec.shape[1:]), spec.dtype) if name in self._names else spec

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """A vocabulary tensor is copied row by row, in the order of the other model."""
        if name not in self._names:
            return self._state_dict.array(name, out=out)
        rows = self._state_dict.array(name)[np.maximum(self._source, 0)]
        rows[self._lacks] = 0
        return deliver(rows, out)

    def version(self, name: str) -> Hashable:
        """As before, laid out anew."""
        return self, self._state_dict.version(name)
