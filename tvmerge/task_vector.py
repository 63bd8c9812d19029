"""Task vectors: tuned − base, as a lazy state dict whose tensors are not computed before they are added."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import numpy as np

from tvmerge.delta import Delta, keep_exactly
from tvmerge.state_dict import Array, StateDict, TensorSpec, WithTensors, deliver

__all__ = ["Difference", "KeptTaskVector", "TaskVector"]


class TaskVector(WithTensors, ABC):
    """A direction in weight space. It may lack tensors, which it then does not change.

    Source:
        Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv:2212.04089, section 2.
    """

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Names of the tensors that it changes, sorted."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec:
        """The shape, in float32."""

    @abstractmethod
    def delta(self, name: str) -> Delta:
        """One tensor, not computed.

        Raises:
            KeyError: no tensor has this name.
        """

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """One tensor, rounded to float32."""
        return deliver(self.delta(name).exact().astype(np.float32), out)

    def version(self, name: str) -> Hashable:
        """A task vector does not change."""
        return self, name


class Difference(TaskVector):
    """The difference of two state dicts of the same names and shapes.

    Args:
        tuned: the model that was tuned from `base`.
        base: the model it was tuned from.
    """

    def __init__(self, *, tuned: StateDict, base: StateDict) -> None:
        self.tuned = tuned
        self.base = base

    @property
    def names(self) -> Sequence[str]:
        """All names of the base."""
        return self.base.names

    def spec(self, name: str) -> TensorSpec:
        """The base's shape, in float32."""
        return TensorSpec(shape=self.base.spec(name).shape, dtype=np.dtype(np.float32))

    def delta(self, name: str) -> Delta:
        """Views of both models' tensors, where those are memory-mapped."""
        return Delta(minuend=self.tuned.array(name), subtrahend=self.base.array(name))


class KeptTaskVector(TaskVector):
    """A task vector that computes each tensor once and keeps it in memory, bit for bit the same.

    Args:
        task_vector: a difference of models.
    """

    def __init__(self, task_vector: Difference) -> None:
        self._task_vector = task_vector
        self._kept: dict[str, Delta] = {}
        self._not_worth_it: set[str] = set()

    @property
    def names(self) -> Sequence[str]:
        """As before."""
        return self._task_vector.names

    def spec(self, name: str) -> TensorSpec:
        """As before."""
        return self._task_vector.spec(name)

    def delta(self, name: str) -> Delta:
        """The tensor in the dtype of the tuned model, with the list of what that dtype cannot hold."""
        if name in self._not_worth_it:
            return self._task_vector.delta(name)
        if name not in self._kept:
            delta = self._task_vector.delta(name)
            kept = keep_exactly(delta, delta.minuend.dtype)
            if kept is delta:
                self._not_worth_it.add(name)
                return delta
            self._kept[name] = kept
        return self._kept[name]
