"""Differences of models that are not computed until they are added: target + Σ w·(minuend − subtrahend), rounded once.

Sums accumulate in float64, or in float32 where one fused multiply-add gives the same bits. On a CPU the loops are
compiled and read and write every tensor once (kernels.py). On another device, and for so few sums that loading the
compiled loops would take longer, torch takes the same steps.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Delta", "add_deltas", "all_finite", "at_once", "keep_exactly", "together"]

#: Most elements that one thread takes at a time.
PART = 1 << 22
#: Elements of the temporaries of a sum by torch on a CPU.
CACHED = 1 << 20
#: How many elements torch adds before the compiled loops, which are four times as fast, are loaded.
PAYS_OFF = 750_000_000
#: Least elements that are worth a thread of their own.
SMALL = 1 << 16
#: Parts begin at a multiple of this many elements.
ALIGNED = 4096
#: Elements of a float64 accumulator, which stays in the second-level cache.
ACCUMULATOR = 1 << 17
#: A kept difference lists the elements that its dtype cannot hold, 8 bytes each. More than this share are not kept.
LISTED = 1 / 8


@dataclass(frozen=True)
class Delta:
    """One tensor of a task vector, not computed: minuend − subtrahend, except for the elements that are listed."""

    minuend: Tensor  # any shape, any floating dtype
    subtrahend: Tensor | None = None  # of the same shape; None: zeros
    index: Tensor | None = None  # integers, ascending: flat positions of the listed elements
    values: Tensor | None = None  # float32 or float64, of the same length: their exact differences

    def exact(self, part: slice = slice(None)) -> Tensor:
        """The difference of some elements, flat, float64: without error for 16-bit sources."""
        difference = self.minuend.reshape(-1)[part].to(torch.float64, copy=True)
        if self.subtrahend is not None:
            difference = difference.sub_(self.subtrahend.reshape(-1)[part].to(difference))
        if self.index is not None and self.values is not None:
            start, stop, _ = part.indices(self.minuend.numel())
            low, high = torch.searchsorted(self.index, torch.tensor([start, stop], device=self.index.device)).tolist()
            difference[self.index[low:high] - start] = self.values[low:high].double()
        return difference


def add_deltas(target: Tensor, deltas: Sequence[Delta], weights: Sequence[float], *, out: Tensor) -> Tensor:
    """Fill `out` with target + Σ w·delta: the differences, products and sums as in float64, rounded once.

    Args:
        target: any shape, any floating dtype.
        deltas: of the same shape.
        weights: one for each of them, each a float32 number.
        out: of the same shape, any floating dtype, any device.

    Returns:
        `out`.
    """
    if not out.is_contiguous():
        whole = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        with at_once():
            return out.copy_(add_deltas(target, deltas, weights, out=whole))
    tensors = [target, out, *(t for d in deltas for t in (d.minuend, d.subtrahend) if t is not None)]
    simple = len(deltas) == 1 and all(tensor.itemsize == 2 for tensor in tensors)
    if any(tensor.device.type != "cpu" for tensor in tensors) or not _pays_off(out.numel()):
        if simple and deltas[0].subtrahend is not None and deltas[0].index is None:
            _add_one_by_torch(target, deltas[0], weights[0], out)
        else:
            _add_by_torch(target, deltas, weights, out)
    elif simple:
        _add_one(target, deltas[0], weights[0], out)
    else:
        _add_many(target, deltas, weights, out)
    return out


def _add_by_torch(target: Tensor, deltas: Sequence[Delta], weights: Sequence[float], out: Tensor) -> None:
    for part, (o, t) in _torch_parts(out, target):
        total = t.to(device=o.device, dtype=torch.float64, copy=True)
        for delta, weight in zip(deltas, weights, strict=True):
            total += delta.exact(part).to(o.device).mul_(weight)  # two roundings, as in the compiled loops
        o.copy_(total)


def _add_one_by_torch(target: Tensor, delta: Delta, weight: float, out: Tensor) -> None:
    """As kernels.sum16: in float32, where one fused multiply-add rounds once, if all differences are exact there."""
    assert delta.subtrahend is not None, "the caller looked"
    rows = [torch.empty(0)] * 4  # made once: fresh memory is cleared by the system, which takes longer than the sum
    for _, (o, t, a, b) in _torch_parts(out, target, delta.minuend, delta.subtrahend):
        if len(rows[0]) < len(o):
            rows = [torch.empty(len(o), device=o.device) for _ in rows]
        x, y, d, e = (row[: len(o)] for row in rows)
        torch.sub(x.copy_(a), y.copy_(b), out=d)
        if torch.equal(torch.add(d, y, out=e), x) and torch.equal(torch.sub(x, d, out=e), y):
            o.copy_(x.copy_(t).add_(d, alpha=weight))
        else:
            _add_by_torch(t, [Delta(a, b)], [weight], o)


def _torch_parts(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Flat parts of tensors of one shape, small enough for a cache, or large enough for a device."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    step = CACHED if tensors[0].device.type == "cpu" else PART
    for start in range(0, flat[0].numel(), step):
        part = slice(start, min(start + step, flat[0].numel()))
        yield part, [tensor[part] for tensor in flat]


def _pays_off(n: int) -> bool:
    """Whether it is time to load the compiled loops, which takes half a second and more: not for a few sums."""
    global _added
    _added += n
    return _added > PAYS_OFF


def _add_one(target: Tensor, delta: Delta, weight: float, out: Tensor) -> None:
    from tvmerge import kernels

    t, a, o, w = _array(target), _array(delta.minuend), _array(out), np.float32(weight)
    if delta.subtrahend is not None and delta.index is None:
        b = _array(delta.subtrahend)
        _in_parts(o.size, PART, lambda i, j: kernels.sum16(t[i:j], a[i:j], b[i:j], w, o[i:j]), overlap=True)
    elif delta.subtrahend is None:
        index, values = _listed(delta)
        _in_parts(
            o.size, PART, lambda i, j: kernels.sum16_kept(t[i:j], a[i:j], w, o[i:j], index, values, i), overlap=True
        )
    else:
        raise ValueError("a difference that is kept has no subtrahend")


def _add_many(target: Tensor, deltas: Sequence[Delta], weights: Sequence[float], out: Tensor) -> None:
    from tvmerge import kernels

    t, o = _array(target), _array(out)
    terms = [
        (_array(d.minuend), _EMPTY if d.subtrahend is None else _array(d.subtrahend), *_listed(d), float(w))
        for d, w in zip(deltas, weights, strict=True)
    ]

    def add(i: int, j: int) -> None:
        total, difference = np.empty(j - i), np.empty(j - i)
        kernels.widen(t[i:j], total)
        for a, b, index, values, w in terms:
            kernels.widen(a[i:j], difference)
            if b is not _EMPTY:
                kernels.subtract(difference, b[i:j])
            kernels.add(total, difference, w, index, values, i)
        kernels.narrow(total, o[i:j])

    _in_parts(o.size, ACCUMULATOR, add, overlap=True)


def keep_exactly(delta: Delta, dtype: torch.dtype) -> Delta:
    """Compute a difference and keep it in `dtype`, with a list of the elements that `dtype` cannot hold exactly.

    Of two bfloat16 models that are near each other nearly all differences are bfloat16 numbers: x − y has no more
    digits than x and y if they are within a factor of two (Sterbenz 1974, Floating-point computation, theorem 4.3.1).

    Returns:
        The same values; `delta` itself if so many elements would be listed that reading both models is as fast.
    """
    from tvmerge import kernels

    kept = torch.empty(delta.minuend.shape, dtype=dtype)
    a, k = _array(delta.minuend), _array(kept)
    b = _EMPTY if delta.subtrahend is None else _array(delta.subtrahend)
    lists: dict[int, tuple[Any, Any]] = {}

    def keep(i: int, j: int) -> None:
        index, values = np.empty(j - i, dtype=np.int64), np.empty(j - i)
        difference = np.empty(j - i)
        kernels.widen(a[i:j], difference)
        if b is not _EMPTY:
            kernels.subtract(difference, b[i:j])
        n = kernels.keep(difference, k[i:j], index, values, i)
        lists[i] = index[:n].copy(), values[:n].copy()

    _in_parts(a.size, ACCUMULATOR, keep)
    if sum(len(index) for index, _ in lists.values()) > LISTED * a.size:
        return delta
    found = [lists[i] for i in sorted(lists)]
    index = np.concatenate([listed for listed, _ in found] or [_NO_INDEX])
    values = np.concatenate([listed for _, listed in found] or [_EMPTY])
    if a.size < 1 << 31:
        index = index.astype(np.int32)
    narrow = values.astype(np.float32)
    values = narrow if np.array_equal(narrow, values) else values
    return Delta(minuend=kept, index=torch.from_numpy(index), values=torch.from_numpy(values))


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. Reads it once."""
    if not tensor.numel():
        return True
    least, greatest = torch.aminmax(tensor.detach())  # NaN if there is one
    return bool(least.isfinite() & greatest.isfinite())


_added = 0
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
    _state.pending = pending
    try:
        yield
        while pending:
            pending.popleft().result()
    finally:
        _state.pending = None
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


def _in_parts(n: int, part: int, work: Callable[[int, int], None], *, overlap: bool = False) -> None:
    """Call work(start, stop) for consecutive parts of range(n), on as many threads as torch uses."""
    global _pool
    threads = torch.get_num_threads()
    if n <= SMALL or threads == 1:
        for start in range(0, n, part):
            work(start, min(start + part, n))
        return
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(threads, thread_name_prefix="tvmerge")
    rounds = -(-n // (threads * part))  # parts of one size, so that no thread waits long for another
    step = -(-n // (threads * rounds) // ALIGNED) * ALIGNED
    futures = deque(_pool.submit(work, start, min(start + step, n)) for start in range(0, n, step))
    pending: deque[Future[None]] | None = getattr(_state, "pending", None)
    if overlap and pending is not None:
        pending += futures
        futures, most = pending, 4 * threads
    else:
        most = 0
    while len(futures) > most:
        futures.popleft().result()


def _array(tensor: Tensor) -> Any:
    """A flat numpy view, in which the type tells bfloat16 (uint16) from float16 (int16)."""
    flat = tensor.detach().reshape(-1)
    as_integer = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(flat.dtype)
    return flat.numpy() if as_integer is None else flat.view(as_integer).numpy()


_EMPTY: Any = np.empty(0)
_NO_INDEX: Any = np.empty(0, dtype=np.int64)


def _listed(delta: Delta) -> tuple[Any, Any]:
    if delta.index is None or delta.values is None:
        return _NO_INDEX, _EMPTY
    return delta.index.numpy(), delta.values.numpy()
