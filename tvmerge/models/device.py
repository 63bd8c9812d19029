"""Merging into a model on an accelerator: everything lies on it where it fits, else merged tensors are streamed to it.

Resident, a merge is one pass over target, differences and model in the device's memory. Streamed, each tensor is merged
in pinned host memory while the one before it crosses to the device, so that only the merged bytes cross.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvmerge.delta import Delta, keep_exactly
from tvmerge.errors import ConfigError
from tvmerge.lora import LoraTaskVector
from tvmerge.merge import Merge, MergedStateDict
from tvmerge.moe import MixtureOfExperts
from tvmerge.state_dict import StateDict, TensorSpec, as_array, as_tensor
from tvmerge.task_vector import TaskVector

__all__ = ["DeviceWriter", "choose_device"]

#: Elements that a sum of many terms takes at a time.
PART = 1 << 26
#: Bytes of a device that are left for the model's own work.
RESERVE = 2_000_000_000


def choose_device(name: str) -> str:
    """The device that `auto` means here, or the one that was named.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise ConfigError(f"--device {name}: cannot be used here: {reason}") from error
    return name


@dataclass(frozen=True)
class _Term:
    """A Delta on the device."""

    minuend: Tensor
    subtrahend: Tensor | None
    index: Tensor | None
    values: Tensor | None

    @classmethod
    def of(cls, delta: Delta, device: torch.device) -> _Term:
        kept = keep_exactly(delta, delta.minuend.dtype) if delta.index is None else delta
        parts = (kept.minuend, kept.subtrahend, None if kept.index is None else kept.index.astype("int64"), kept.values)
        return cls(*(None if part is None else as_tensor(part).to(device) for part in parts))  # type: ignore[arg-type]

    def add_to(self, total: Tensor, part: slice, weight: float) -> None:
        """Add weight times some elements, flat, to a float64 sum."""
        difference = self.minuend.reshape(-1)[part].to(torch.float64, copy=True)
        if self.subtrahend is not None:
            difference -= self.subtrahend.reshape(-1)[part]
        if self.index is not None and self.values is not None:
            here = (self.index >= part.start) & (self.index < part.stop)
            difference[self.index[here] - part.start] = self.values[here].double()
        total += difference.mul_(weight)  # two roundings, as on the CPU


class DeviceWriter:
    """Writes tensors of state dicts into a model's tensors on one device.

    Args:
        device: where the model lies.
        room: bytes that may be used there for targets and differences; None for what is free but a reserve.
    """

    def __init__(self, device: torch.device, *, room: int | None = None) -> None:
        self._device = device
        self._room = room
        self._merges: frozenset[Merge] = frozenset()  # those whose tensors are resident, if they fit
        self._counted: frozenset[tuple[Merge, str]] = frozenset()  # the tensors that room was found for
        self._fits = False
        self._targets: dict[tuple[Merge, str], Tensor] = {}
        self._terms: dict[tuple[TaskVector, str], _Term] = {}  # which merges may share
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._rooms: list[_Room] = []

    def write(self, state_dict: StateDict, views: Iterable[tuple[str, Tensor]]) -> None:
        """Fill views of the model; when this returns the device's current stream sees all of them filled.

        Args:
            state_dict: what to read.
            views: tensor name and where it goes.
        """
        todo = [(*_origin(state_dict, name), view) for name, view in views]
        merged = [(source.merge, name) for source, name, _ in todo if isinstance(source, MergedStateDict)]
        if self._is_resident(merged):
            try:
                todo = [each for each in todo if not self._write_resident(*each)]
            except torch.OutOfMemoryError:  # there was less room than it seemed
                self._forget(fits=False)
                torch.cuda.empty_cache()
        for n, (each, name, view) in enumerate(todo):
            room = self._next_room(n, view)
            room.wait()
            filled = room.memory[: view.nbytes].view(view.dtype).view(view.shape)
            each.array(name, out=as_array(filled))
            room.send(filled, view)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _next_room(self, n: int, view: Tensor) -> _Room:
        """One of two pieces of host memory, large enough for a view."""
        place = n % 2
        if len(self._rooms) <= place:
            self._rooms.append(_Room(view.nbytes, self._stream))
        elif len(self._rooms[place].memory) < view.nbytes:
            self._rooms[place].wait()
            self._rooms[place] = _Room(view.nbytes, self._stream)
        return self._rooms[place]

    def _is_resident(self, tensors: Sequence[tuple[Merge, str]]) -> bool:
        """Whether the tensors of merges lie on the device, or are to."""
        merges = frozenset(merge for merge, _ in tensors)
        if not merges <= self._merges:
            self._forget(fits=True)
            self._merges, self._counted = merges, frozenset(tensors)
            self._fits = _needed(tensors) < (_free(self._device) - RESERVE if self._room is None else self._room)
        return self._fits

    def _forget(self, *, fits: bool) -> None:
        self._targets.clear()
        self._terms.clear()
        self._fits = fits

    def _write_resident(self, state_dict: StateDict, name: str, view: Tensor) -> bool:
        """Fill a view from what lies on the device; false, and nothing done, if the tensor is none of those."""
        if not isinstance(state_dict, MergedStateDict) or (state_dict.merge, name) not in self._counted:
            return False
        merge, terms = state_dict.merge, state_dict.terms(name)
        if name not in merge.weights_of:
            return False
        if (merge, name) not in self._targets:
            self._targets[merge, name] = as_tensor(merge.target.array(name)).to(self._device)
        for label, _ in terms:
            vector = merge.task_vectors[label]
            if (vector, name) not in self._terms:
                self._terms[vector, name] = _Term.of(vector.delta(name), self._device)
        known = [(self._terms[merge.task_vectors[label], name], weight) for label, weight in terms]
        _sum(self._targets[merge, name], known, view, _torch_dtype(state_dict.spec(name)))
        return True


def _origin(state_dict: StateDict, name: str) -> tuple[StateDict, str]:
    """The state dict that a tensor comes from as it is, and what that one calls it."""
    return state_dict.origin(name) if isinstance(state_dict, MixtureOfExperts) else (state_dict, name)


def _needed(tensors: Sequence[tuple[Merge, str]]) -> float:
    """Bytes that targets and differences take on a device, with a little more for the lists of what is not exact."""
    total = 0.0
    counted: set[tuple[TaskVector, str]] = set()
    for merge, name in tensors:
        spec = merge.target.spec(name)
        if name not in merge.weights_of:
            continue
        total += spec.nbytes
        for label, _ in (*merge.weights_of[name], *merge.fixed(name)):
            vector = merge.task_vectors[label]
            if (vector, name) not in counted:
                counted.add((vector, name))
                # A product of an adapter's matrices is float64.
                total += 8 * spec.size if isinstance(vector, LoraTaskVector) else 1.2 * spec.nbytes
    return total


def _free(device: torch.device) -> int:
    """Bytes of a device that are free, or kept by torch for what comes next."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _sum(target: Tensor, terms: list[tuple[_Term, float]], view: Tensor, dtype: torch.dtype) -> None:
    """Fill a view with target + Σ w·delta, rounded to `dtype` and then to the view's."""
    out = view if view.is_contiguous() and view.dtype == dtype else torch.empty_like(target, dtype=dtype)
    if not terms:
        out.copy_(target)
    elif len(terms) == 1 and terms[0][0].subtrahend is None and target.dtype == terms[0][0].minuend.dtype == dtype:
        term, weight = terms[0]
        # One pass. A device's fused multiply-add in float32 rounds once, as the compiled loops of the CPU do.
        torch.add(target, term.minuend, alpha=weight, out=out)
        if term.index is not None and term.values is not None:
            listed = target.view(-1)[term.index].double() + term.values.double() * weight
            out.view(-1).index_copy_(0, term.index, listed.to(dtype))
    else:
        for start in range(0, target.numel(), PART):
            part = slice(start, min(start + PART, target.numel()))
            total = target.view(-1)[part].to(torch.float64, copy=True)
            for term, weight in terms:
                term.add_to(total, part, weight)
            out.view(-1)[part] = total.to(dtype)
    if out is not view:
        view.copy_(out)


def _torch_dtype(spec: TensorSpec) -> torch.dtype:
    dtype = getattr(torch, spec.dtype.name)
    assert isinstance(dtype, torch.dtype), "numpy and torch call the mergeable dtypes by the same names"
    return dtype


class _Room:
    """Pinned host memory that a tensor is merged in before it is sent."""

    def __init__(self, nbytes: int, stream: Any) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=stream is not None)
        self._stream = stream
        self._sent = None if stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until what was sent from here has arrived."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, source: Tensor, view: Tensor) -> None:
        """Copy to the device, behind what was sent before."""
        if self._stream is None or self._sent is None:
            view.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(view.device))  # what still reads the old values
        with torch.cuda.stream(self._stream):
            view.copy_(source, non_blocking=True)
            self._sent.record(self._stream)
