"""Differences of models that are not computed until they are added: target + Σ w·(minuend − subtrahend), rounded once.

Sums accumulate in float64, or in float32 where one fused multiply-add gives the same bits. A sum of 16 bits is rounded
by way of float32, as torch does: it is within one unit in the last place of the exact one. The loops are compiled, and
read and write every tensor once (kernels.py).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tvmerge import kernels
from tvmerge.state_dict import BFLOAT16, Array, Dtype

__all__ = ["Delta", "add_deltas", "all_finite", "at_once", "keep_exactly", "together"]

#: Most elements that one thread takes at a time.
PART = 1 << 22
#: Least elements that are worth a thread of their own.
SMALL = 1 << 16
#: Elements of a float64 accumulator, which stays in the second-level cache.
ACCUMULATOR = 1 << 17
#: A kept difference lists the elements that its dtype cannot hold, 8 bytes each. More than this share are not kept:
#: then reading both models is as fast, and needs no memory.
LISTED = 1 / 32


@dataclass(frozen=True)
class Delta:
    """One tensor of a task vector, not computed: minuend − subtrahend, except for the elements that are listed."""

    minuend: Array  # any shape, any floating dtype
    subtrahend: Array | None = None  # of the same shape; None: zeros
    index: Array | None = None  # integers, ascending: flat positions of the listed elements
    values: Array | None = None  # float32 or float64, of the same length: their exact differences

    def __post_init__(self) -> None:
        """The compiled loops do not look where an array ends."""
        if self.subtrahend is not None and self.subtrahend.shape != self.minuend.shape:
            raise ValueError(f"shapes differ: {self.minuend.shape} and {self.subtrahend.shape}")

    def exact(self) -> Array:
        """The difference in float64: without error for 16-bit sources."""
        difference = self.minuend.astype(np.float64)
        if self.subtrahend is not None:
            difference -= self.subtrahend.astype(np.float64)
        if self.index is not None and self.values is not None:
            difference.reshape(-1)[self.index] = self.values
        return difference


def add_deltas(target: Array, deltas: Sequence[Delta], weights: Sequence[float], *, out: Array) -> Array:
    """Fill `out` with target + Σ w·delta: differences, products and sums are within one ulp of float64's.

    Args:
        target: any shape, any floating dtype.
        deltas: of the same shape.
        weights: one for each of them; that of a single difference is a float32 number.
        out: of the same shape, any floating dtype.

    Returns:
        `out`.
    """
    if not out.flags.c_contiguous:
        with at_once():
            np.copyto(out, add_deltas(target, deltas, weights, out=np.empty(out.shape, out.dtype)))
        return out
    if any(array.shape != out.shape for array in (target, *(delta.minuend for delta in deltas))):
        raise ValueError(f"shapes differ: {[out.shape, target.shape, *(delta.minuend.shape for delta in deltas)]}")
    arrays = [target, out, *(a for delta in deltas for a in (delta.minuend, delta.subtrahend) if a is not None)]
    if len(deltas) == 1 and all(array.itemsize == 2 for array in arrays):
        _add_one(target, deltas[0], weights[0], out)
    else:
        _add_many(target, deltas, weights, out)
    return out


def _add_one(target: Array, delta: Delta, weight: float, out: Array) -> None:
    t, a, o, w = _flat(target), _flat(delta.minuend), _flat(out), np.float32(weight)
    if delta.subtrahend is None:
        index, values = _listed(delta)
        _in_parts(
            o.size, PART, lambda i, j: kernels.sum16_kept(t[i:j], a[i:j], w, o[i:j], index, values, i), overlap=True
        )
    else:
        b = _flat(delta.subtrahend)
        _in_parts(o.size, PART, lambda i, j: kernels.sum16(t[i:j], a[i:j], b[i:j], w, o[i:j]), overlap=True)


def _add_many(target: Array, deltas: Sequence[Delta], weights: Sequence[float], out: Array) -> None:
    t, o = _flat(target), _flat(out)
    terms = [
        (_flat(d.minuend), None if d.subtrahend is None else _flat(d.subtrahend), *_listed(d), w)
        for d, w in zip(deltas, weights, strict=True)
    ]

    def add(i: int, j: int) -> None:
        total, difference = np.empty(j - i), np.empty(j - i)
        kernels.widen(t[i:j], total)
        for a, b, index, values, w in terms:
            kernels.widen(a[i:j], difference)
            if b is not None:
                kernels.subtract(difference, b[i:j])
            kernels.add(total, difference, w, index, values, i)
        kernels.narrow(total, o[i:j])

    _in_parts(o.size, ACCUMULATOR, add, overlap=True)


def keep_exactly(delta: Delta, dtype: Dtype) -> Delta:
    """Compute a difference and keep it in `dtype`, with a list of the elements that `dtype` cannot hold exactly.

    Of two bfloat16 models that are near each other nearly all differences are bfloat16 numbers: x − y has no more
    digits than x and y if they are within a factor of two (Sterbenz 1974, Floating-point computation, theorem 4.3.1).

    Returns:
        The same values; `delta` itself if so many elements would be listed that reading both models is as fast.
    """
    kept = np.empty(delta.minuend.shape, dtype)
    a, k = _flat(delta.minuend), _flat(kept)
    b = None if delta.subtrahend is None else _flat(delta.subtrahend)
    lists: dict[int, tuple[Array, Array]] = {}
    n_listed = [0]

    def keep(i: int, j: int) -> None:
        if n_listed[0] > LISTED * a.size:
            return
        index, values = np.empty(j - i, np.int64), np.empty(j - i)
        difference = np.empty(j - i)
        kernels.widen(a[i:j], difference)
        if b is not None:
            kernels.subtract(difference, b[i:j])
        n = kernels.keep(difference, k[i:j], index, values, i)
        lists[i] = index[:n].copy(), values[:n].copy()
        n_listed[0] += n

    _in_parts(a.size, ACCUMULATOR, keep)
    if sum(len(index) for index, _ in lists.values()) > LISTED * a.size:
        return delta
    found = [lists[i] for i in sorted(lists)]
    index = np.concatenate([listed for listed, _ in found] or [_NO_INDEX])
    values = np.concatenate([listed for _, listed in found] or [_NO_VALUES])
    if a.size < 1 << 31:
        index = index.astype(np.int32)
    narrow = values.astype(np.float32)
    return Delta(minuend=kept, index=index, values=narrow if np.array_equal(narrow, values) else values)


def all_finite(array: Array) -> bool:
    """Whether an array holds neither NaN nor infinity. Reads it once."""
    flat = _flat(array)
    bad = [False]

    def look(i: int, j: int) -> None:
        if kernels.has_bad(flat[i:j]):
            bad[0] = True

    _in_parts(flat.size, PART, look)
    return not bad[0]


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()
_state = threading.local()


@contextmanager
def together() -> Iterator[None]:
    """Let this thread's sums overlap: `add_deltas` may return before `out` is filled; at the end all are.

    Threads then wait for each other once, and not once per tensor. Few sums are under way at a time, so that what they
    are made of does not pile up in memory.
    """
    pending: deque[Future[None]] = deque()
    outer, _state.pending = getattr(_state, "pending", None), pending
    try:
        yield
        while pending:
            pending.popleft().result()
    finally:
        _state.pending = outer
        # After an error: nothing may write any longer when the caller goes on.
        wait([future for future in pending if not future.cancel()])


@contextmanager
def at_once() -> Iterator[None]:
    """Within `together`: let sums be complete when `add_deltas` returns."""
    pending, _state.pending = getattr(_state, "pending", None), None
    try:
        yield
    finally:
        _state.pending = pending


def n_threads() -> int:
    """How many threads add: one for each core that this process may use, or as many as OMP_NUM_THREADS says."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and len(said) < 5 and int(said) > 0:
        return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_parts(n: int, part: int, work: Callable[[int, int], None], *, overlap: bool = False) -> None:
    """Call work(start, stop) for consecutive parts of range(n), on `n_threads()` threads."""
    global _pool
    threads = n_threads()
    if n <= SMALL or threads == 1:
        for start in range(0, n, part):
            work(start, min(start + part, n))
        return
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(threads, thread_name_prefix="tvmerge")
    rounds = -(-n // (threads * part))  # parts of one size, so that no thread waits long for another
    step = -(-n // (threads * rounds) // kernels.BLOCK) * kernels.BLOCK
    futures = deque(_pool.submit(work, start, min(start + step, n)) for start in range(0, n, step))
    pending: deque[Future[None]] | None = getattr(_state, "pending", None)
    if overlap and pending is not None:
        pending += futures
        futures, most = pending, 4 * threads
    else:
        most = 0
    try:
        while len(futures) > most:
            futures.popleft().result()
    finally:
        if not most:
            wait([future for future in futures if not future.cancel()])


def _flat(array: Array) -> Array:
    """A flat view, in which integers stand for 16-bit floats: uint16 for bfloat16, int16 for float16."""
    flat = array.reshape(-1)
    if flat.dtype == BFLOAT16:
        return flat.view(np.uint16)
    return flat.view(np.int16) if flat.dtype == np.float16 else flat


_NO_INDEX: Array = np.empty(0, np.int64)
_NO_VALUES: Array = np.empty(0)


def _listed(delta: Delta) -> tuple[Array, Array]:
    if delta.index is None or delta.values is None:
        return _NO_INDEX, _NO_VALUES
    return delta.index, delta.values
