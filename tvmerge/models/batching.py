"""Batches of about the same number of tokens, filled by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["START_TOKENS", "TokenBudget", "does_not_fit", "is_out_of_memory", "run_in_batches"]

#: Tokens of a batch, if nobody says how many requests: on a GPU halved until they fit, on a CPU more gain nothing.
START_TOKENS = {"cuda": 65536, "cpu": 8192}


@dataclass
class TokenBudget:
    """How many tokens the model takes at a time, padding included; less after it ran out of memory."""

    tokens: int
    was_halved: bool = False

    def halve(self, *, longest: int, n: int) -> None:
        """Take half as many items as did not fit.

        Args:
            longest: tokens of the longest of them.
            n: how many there were, at least 2.
        """
        self.tokens, self.was_halved = longest * (n // 2), True
        torch.cuda.empty_cache()


def does_not_fit(batch_size: int) -> str:
    """A note on a batch size that somebody asked for."""
    return f"--batch_size {batch_size} does not fit in memory: batches are halved until they do"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: a GPU's, or the machine's, for which torch has no class."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "not enough memory" in text)


def run_in_batches(lengths: Sequence[int], budget: TokenBudget, run: Callable[[list[int]], None]) -> None:
    """Run items in batches of equal area, the longest first, so that little is padded.

    A batch that does not fit in the device's memory is run again in halves, and so are all after it.

    Args:
        lengths: tokens of each item.
        budget: tokens of a batch; an item that is longer than it is a batch of its own.
        run: called with the indices of a batch, from the longest item to the shortest; of equal ones in their order.

    Raises:
        RuntimeError, MemoryError: one item alone does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        batch = order[start : start + max(1, budget.tokens // longest)]
        if _fits(run, batch):
            start += len(batch)
        else:  # here nothing holds on to what was computed
            budget.halve(longest=longest, n=len(batch))


def _fits(run: Callable[[list[int]], None], batch: list[int]) -> bool:
    try:
        run(batch)
    except (RuntimeError, MemoryError) as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
        return False
    return True
