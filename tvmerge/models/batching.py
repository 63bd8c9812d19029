"""Batches of about the same number of tokens, filled by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["START_TOKENS", "TokenBudget", "run_in_batches"]

#: Tokens of a batch, if nobody says how many requests: on a GPU halved until they fit, on a CPU more gain nothing.
START_TOKENS = {"cuda": 65536, "cpu": 8192}


@dataclass
class TokenBudget:
    """How many tokens the model takes at a time, padding included; less after it ran out of memory."""

    tokens: int


def run_in_batches(lengths: Sequence[int], budget: TokenBudget, run: Callable[[list[int]], None]) -> None:
    """Run items in batches of equal area, the longest first, so that little is padded.

    A batch that does not fit in the device's memory is run again in halves, and so are all after it.

    Args:
        lengths: tokens of each item.
        budget: tokens of a batch; an item that is longer than it is a batch of its own.
        run: called with the indices of a batch, from the longest item to the shortest; of equal ones in their order.

    Raises:
        torch.OutOfMemoryError: one item alone does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        batch = order[start : start + max(1, budget.tokens // longest)]
        try:
            run(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            budget.tokens = longest * (len(batch) // 2)
            torch.cuda.empty_cache()
            continue
        start += len(batch)
