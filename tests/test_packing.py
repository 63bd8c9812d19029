"""Packed rows: every sequence can be read off its row, and what it shares is there once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvmerge.models.packing import Row, pack

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=20)


def parents(row: Row) -> list[int]:
    """The parent of each token, from the depths alone: the nearest earlier token that is one less deep."""
    found = []
    for index, depth in enumerate(row.positions.tolist()):
        earlier = [i for i in range(index) if row.positions[i] == depth - 1]
        assert bool(earlier) == (depth > 0)
        found.append(earlier[-1] if earlier else -1)
    return found


@given(sequences=SEQUENCES, max_row=st.integers(1, 40), share=st.booleans())
def test_every_sequence_is_spelled_by_its_path(sequences: list[list[int]], max_row: int, share: bool) -> None:
    packing = pack(sequences, max_row=max_row, share=share)
    for sequence, row_index, last in zip(sequences, packing.row_of, packing.last_of, strict=True):
        row = packing.rows[row_index]
        path = row.path(int(last))
        assert row.tokens[path].tolist() == sequence
        assert row.positions[path].tolist() == list(range(len(sequence)))


@given(sequences=SEQUENCES, max_row=st.integers(1, 40), share=st.booleans())
def test_ends_are_those_of_the_subtrees(sequences: list[list[int]], max_row: int, share: bool) -> None:
    for row in pack(sequences, max_row=max_row, share=share).rows:
        parent = parents(row)
        for ancestor in range(len(row)):
            below = [ancestor]
            for index in range(ancestor + 1, len(row)):
                if parent[index] in below:
                    below.append(index)
            assert below == list(range(ancestor, int(row.ends[ancestor])))


@given(sequences=SEQUENCES, max_row=st.integers(1, 40))
def test_no_token_is_twice_in_a_row(sequences: list[list[int]], max_row: int) -> None:
    packing = pack(sequences, max_row=max_row)
    for index, row in enumerate(packing.rows):
        children = list(zip(parents(row), row.tokens.tolist(), strict=True))
        assert len(set(children)) == len(children)
        members = [s for s, r in zip(sequences, packing.row_of, strict=True) if r == index]
        beginnings = {tuple(s[:n]) for s in members for n in range(1, len(s) + 1)}
        assert len(row) == len(beginnings)
        assert len(row) <= max_row or len({tuple(s) for s in members}) == 1
        assert row.is_chain == (max(map(len, members)) == len(row))


@given(sequences=SEQUENCES)
def test_without_sharing_every_distinct_sequence_is_a_row(sequences: list[list[int]]) -> None:
    packing = pack(sequences, max_row=1, share=False)
    assert sorted(tuple(row.tokens.tolist()) for row in packing.rows) == sorted({tuple(s) for s in sequences})
    assert all(row.is_chain for row in packing.rows)


def test_a_row_is_shared_only_where_that_is_worth_it() -> None:
    worth, not_worth = [[1, 2, 3, 4], [1, 2, 5, 6]], [[1, 2, 3, 4], [1, 5, 6]]
    assert [row.tokens.tolist() for row in pack(worth, max_row=6).rows] == [[1, 2, 3, 4, 5, 6]]
    assert [row.tokens.tolist() for row in pack(not_worth, max_row=6).rows] == [[1, 2, 3, 4], [1, 5, 6]]
    assert len(pack(worth, max_row=5).rows) == 2
    (row,) = pack(worth, max_row=6).rows
    assert row.positions.tolist() == [0, 1, 2, 3, 2, 3]
    assert row.ends.tolist() == [6, 6, 4, 4, 6, 6]
    assert np.array_equal(row.path(5), [0, 1, 4, 5])


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        pack([[1], []], max_row=4)
