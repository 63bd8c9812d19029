"""The one idea of tvmerge: a lazy state dict, names and a way to read one tensor by name.

Tensors are numpy arrays here, of numpy's dtypes and ml_dtypes' bfloat16: merging and writing need no torch, which takes
a second to load. `read` gives and fills torch's tensors, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from tvmerge.errors import IncompatibleError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BFLOAT16",
    "DTYPES",
    "MERGEABLE_DTYPES",
    "Array",
    "Dtype",
    "StateDict",
    "TensorSpec",
    "WithTensors",
    "Without",
    "as_array",
    "as_tensor",
    "check_same_tensors",
    "deliver",
]

Array = np.ndarray[Any, Any]
Dtype = np.dtype[Any]

BFLOAT16: Dtype = np.dtype(ml_dtypes.bfloat16)
#: Tensors of these dtypes take part in a merge. Integers and booleans are copied from the target.
MERGEABLE_DTYPES = frozenset({np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16})
#: Names of the dtypes that a merged model can have, as torch and transformers spell them.
DTYPES: Mapping[str, Dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor from a header alone."""

    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize


def as_tensor(array: Array) -> Tensor:
    """A torch tensor that shares an array's memory; of an array that must not be changed, a copy."""
    import torch

    writable = array if array.flags.writeable else array.copy()
    if array.dtype == BFLOAT16:
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)


def as_array(tensor: Tensor) -> Array:
    """An array that shares the memory of a tensor on the CPU, whatever its strides."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(BFLOAT16)
    return tensor.detach().numpy()


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

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """Read one tensor.

        Args:
            name: one of `names`.
            out: filled in place and returned if given, of the spec's shape, converted to its dtype.

        Returns:
            `out`, or an array of the spec's shape and dtype that the caller must not change.
        """

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """As `array`, for torch; `out` may be on any device."""

    def version(self, name: str) -> Hashable:
        """Two reads of one name give the same values if their versions are equal, also of different state dicts."""


class WithTensors:
    """Gives a state dict that has `spec` and `array` its `read`."""

    def read(self: StateDict, name: str, *, out: Tensor | None = None) -> Tensor:
        """As `array`, for torch; `out` may be on any device."""
        if out is None:
            return as_tensor(self.array(name))
        if out.device.type == "cpu":
            self.array(name, out=as_array(out))
            return out
        return out.copy_(as_tensor(self.array(name)))


class Without(WithTensors):
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

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """As in the whole state dict."""
        if name in self._omit:
            raise KeyError(name)
        return self._state_dict.array(name, out=out)

    def version(self, name: str) -> Hashable:
        """As in the whole state dict."""
        return self._state_dict.version(name)


def deliver(value: Array, out: Array | None) -> Array:
    """Finish an `array`: the value itself, or `out` filled with it."""
    if out is None:
        return value
    with np.errstate(over="ignore"):  # infinity is found where it counts
        np.copyto(out, value, casting="unsafe")
    return out


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
