"""Batches: every item once, little padding, halves after running out of memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvmerge.models.batching import TokenBudget, run_in_batches


@given(lengths=st.lists(st.integers(1, 50), max_size=60), tokens=st.integers(1, 200))
def test_every_item_is_run_once_in_batches_that_fit(lengths: list[int], tokens: int) -> None:
    batches: list[list[int]] = []
    run_in_batches(lengths, TokenBudget(tokens), batches.append)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens for batch in batches)
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), fits=st.integers(50, 100))
def test_what_does_not_fit_is_run_again_in_halves(lengths: list[int], fits: int) -> None:
    done: list[int] = []
    budget = TokenBudget(10_000)

    def run(batch: list[int]) -> None:
        if len(batch) * max(lengths[i] for i in batch) > fits:
            raise torch.OutOfMemoryError
        done.extend(batch)

    run_in_batches(lengths, budget, run)
    assert sorted(done) == list(range(len(lengths)))


def test_an_item_that_does_not_fit_alone_ends_it() -> None:
    def run(batch: list[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run_in_batches([3, 5], TokenBudget(100), run)
