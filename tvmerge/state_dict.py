"""The one idea of tvmerge: a lazy state dict, names and a way to read one tensor by name."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tvmerge.errors import IncompatibleError

__all__ = ["MERGEABLE_DTYPES", "StateDict", "TensorSpec", "Without", "check_same_tensors", "deliver"]

#: Tensors of these dtypes take part in a merge. Integers and booleans are copied from the target.
MERGEABLE_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor from a header alone."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class StateDict(Protocol):
    """Anything that holds tensors: a checkpoint, a task vector, a merge at given weights."""

    @property
    def names(self) -> Sequence[str]:
        """Tensor names as the checkpoint spells them, sorted."""

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor; reads no data.

        Raises:
            KeyError: no tensor has this name.
        """

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """Read one tensor.

        Args:
            name: one of `names`.
            out: filled in place and returned if given, of the spec's shape, on any device, converted to its dtype.

        Returns:
            `out`, or a tensor of the spec's shape and dtype that the caller must not change.
        """

    def version(self, name: str) -> Hashable:
        """Two reads of one name give the same values if their versions are equal, also of different state dicts."""


class Without:
    """A state dict less some of its tensors: those that a model does not read, or reads under another name."""

    def __init__(self, state_dict: StateDict, omit: Sequence[str]) -> None:
        self._state_dict = state_dict
        self._omit = frozenset(omit)

    @property
    def names(self) -> Sequence[str]:
        """The names that remain, sorted."""
        return [name for name in self._state_dict.names if name not in self._omit]

    def spec(self, name: str) -> TensorSpec:
        """As in the whole state dict."""
        if name in self._omit:
            raise KeyError(name)
        return self._state_dict.spec(name)

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """As in the whole state dict."""
        if name in self._omit:
            raise KeyError(name)
        return self._state_dict.read(name, out=out)

    def version(self, name: str) -> Hashable:
        """As in the whole state dict."""
        return self._state_dict.version(name)


def deliver(value: Tensor, out: Tensor | None) -> Tensor:
    """Finish a `read`: the value itself, or `out` filled with it."""
    return value if out is None else out.copy_(value)


def check_same_tensors(reference: StateDict, other: StateDict, *, reference_name: str, other_name: str) -> None:
    """Refuse two state dicts whose tensors differ in name, shape or kind (float against integer).

    Args:
        reference: names that must all be in `other`.
        other: may hold no other tensors.
        reference_name: how to call `reference` in an error, for instance "target models/ja".
        other_name: how to call `other`.

    Raises:
        IncompatibleError: with the first difference and the number of them. float16 against bfloat16 is no difference.
    """
    ours, theirs = set(reference.names), set(other.names)
    for lacking, has, lacks, whose in (
        (other_name, reference_name, ours - theirs, "other"),
        (reference_name, other_name, theirs - ours, "reference"),
    ):
        if lacks:
            raise IncompatibleError(
                f"{lacking} lacks {len(lacks)} of the {len(ours if whose == 'other' else theirs)} tensors of {has}, "
                f"the first is {min(lacks)}: all models of a merge must share one architecture and depth"
            )
    for name in reference.names:
        a, b = reference.spec(name), other.spec(name)
        if a.shape != b.shape:
            raise IncompatibleError(
                f"{name} has the shape {list(a.shape)} in {reference_name} and {list(b.shape)} in {other_name}"
                f"{_shape_hint(a.shape, b.shape)}: all models of a merge must have tensors of the same shapes"
            )
        if (a.dtype in MERGEABLE_DTYPES) != (b.dtype in MERGEABLE_DTYPES):
            raise IncompatibleError(
                f"{name} is {a.dtype} in {reference_name} and {b.dtype} in {other_name}: "
                "use the unquantized weights of both"
            )


def _shape_hint(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    rows_differ = len(a) == len(b) == 2 and a[1:] == b[1:] and a[0] != b[0]
    return f" (vocabularies of {a[0]} and {b[0]} tokens?)" if rows_differ else ""
