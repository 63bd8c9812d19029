"""Token sequences that begin alike, in rows that hold a shared beginning once.

A row is a trie of sequences, flattened in preorder. A token sees another one when that one lies before it and the
subtree of that one reaches over it: `j <= i < end[j]`. So a sequence sees its own tokens only, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Packing", "Row", "pack"]

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Row:
    """A trie of sequences, flattened in preorder. L tokens."""

    tokens: Int64s  # [L]
    positions: Int32s  # [L] the depth of each token in the trie, which is its place in its sequence
    ends: Int32s  # [L] index one past the last token of each token's subtree

    def __len__(self) -> int:
        """How many tokens the model forwards for it."""
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every sequence of the row is a beginning of one of them."""
        return int(self.positions[-1]) + 1 == len(self)

    def path(self, last: int) -> Int64s:
        """The indices in the row of the sequence that ends with the token at index `last`."""
        return np.flatnonzero(self.ends[: last + 1] > last)


@dataclass(frozen=True)
class Packing:
    """Rows, and where each sequence lies in them."""

    rows: tuple[Row, ...]
    row_of: Int64s  # [sequences] index of a row
    last_of: Int64s  # [sequences] index in that row of the sequence's last token


def pack(sequences: Sequence[Sequence[int]], *, max_row: int, share: bool = True) -> Packing:
    """Lay sequences in rows.

    In sorted order a sequence has its longest common beginning with its predecessor. It joins the predecessor's row
    if it finds there at least as many tokens as it adds, and if the row stays within `max_row` tokens. Equal sequences
    always lie in one place.

    Args:
        sequences: token ids, none empty.
        max_row: the most tokens of a row; a sequence that is longer is a row of its own.
        share: False for a row for each distinct sequence.

    Raises:
        ValueError: an empty sequence.
    """
    distinct: dict[tuple[int, ...], int] = {}
    index_of = [distinct.setdefault(tuple(sequence), len(distinct)) for sequence in sequences]
    if () in distinct:
        raise ValueError(f"sequence {index_of.index(distinct[()])} is empty: there is nothing to forward")
    row_of, last_of = np.zeros((2, len(distinct)), np.int64)
    rows: list[Row] = []
    row = _OpenRow()
    for sequence in sorted(distinct):
        tokens = np.array(sequence, np.int64)
        shared = row.n_shared(tokens) if share else 0
        added = len(tokens) - shared
        if row.n_tokens and (not share or shared < added or row.n_tokens + added > max_row):
            rows.append(row.close())
            row, shared = _OpenRow(), 0
        row.add(tokens, shared)
        row_of[distinct[sequence]], last_of[distinct[sequence]] = len(rows), row.n_tokens - 1
    if row.n_tokens:
        rows.append(row.close())
    picked = np.array(index_of, np.int64)
    return Packing(rows=tuple(rows), row_of=row_of[picked], last_of=last_of[picked])


class _OpenRow:
    """A row to which sequences are added, in sorted order."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._tokens: list[Int64s] = []
        self._positions: list[npt.NDArray[Any]] = []
        self._closed: list[tuple[Int64s, int]] = []  # tokens in the row, and the end of their subtrees
        self._last = np.zeros(0, np.int64)  # the tokens of the sequence that came last
        self._path = np.zeros(0, np.int64)  # and their indices in the row

    def n_shared(self, tokens: Int64s) -> int:
        """How many tokens a sequence begins with that the last one begins with too."""
        n = min(len(tokens), len(self._last))
        differ = tokens[:n] != self._last[:n]
        return int(differ.argmax()) if differ.any() else n

    def add(self, tokens: Int64s, shared: int) -> None:
        """Add what follows the first `shared` tokens of a sequence."""
        self._closed.append((self._path[shared:], self.n_tokens))
        added = np.arange(self.n_tokens, self.n_tokens + len(tokens) - shared)
        self._tokens.append(tokens[shared:])
        self._positions.append(np.arange(shared, len(tokens)))
        self._last, self._path = tokens, np.concatenate([self._path[:shared], added])
        self.n_tokens += len(added)

    def close(self) -> Row:
        """The finished row."""
        ends = np.full(self.n_tokens, self.n_tokens, np.int32)  # of the tokens that no later sequence left
        for indices, end in self._closed:
            ends[indices] = end
        return Row(
            tokens=np.concatenate(self._tokens), positions=np.concatenate(self._positions).astype(np.int32), ends=ends
        )
