"""A merge: target + task vectors + method + granularity, which at given weights is a lazy state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tvmerge.granularity import group_tensors
from tvmerge.methods import METHODS
from tvmerge.state_dict import MERGEABLE_DTYPES, StateDict, TensorSpec, deliver
from tvmerge.task_vector import TaskVector

__all__ = ["Merge", "MergedStateDict"]


class Merge:
    """What is merged, before the weights are known.

    Args:
        target: the model that the task vectors are added to.
        task_vectors: over the same names and shapes.
        granularity: a key of GRANULARITIES.
        method: a key of METHODS.

    Attributes:
        group_of: mergeable tensor name → name of its weight, in a stable order.
        weight_names: the names of all weights, in a stable order.
    """

    def __init__(
        self,
        *,
        target: StateDict,
        task_vectors: Sequence[TaskVector],
        granularity: str,
        method: str = "task_arithmetic",
    ) -> None:
        self.target = target
        self.task_vectors = list(task_vectors)
        self.method = method
        mergeable = [name for name in target.names if target.spec(name).dtype in MERGEABLE_DTYPES]
        self.group_of: Mapping[str, str] = group_tensors(mergeable, granularity)
        self.weight_names: Sequence[str] = list(dict.fromkeys(self.group_of.values()))

    def at(self, weights: Mapping[str, float]) -> MergedStateDict:
        """The merge at the given weights.

        Args:
            weights: a weight for each of `weight_names`, and no other.

        Raises:
            ValueError: a weight is missing or unknown.
        """
        if set(weights) != set(self.weight_names):
            different = sorted(set(weights) ^ set(self.weight_names))
            raise ValueError(f"weights are needed for the names of the merge and no others; different: {different}")
        return MergedStateDict(self, weights)


class MergedStateDict:
    """A merge at given weights, as a lazy state dict of the target's names, shapes and dtypes."""

    def __init__(self, merge: Merge, weights: Mapping[str, float]) -> None:
        self._merge = merge
        self._weights = dict(weights)

    @property
    def names(self) -> Sequence[str]:
        """The target's tensor names, sorted."""
        return self._merge.target.names

    def spec(self, name: str) -> TensorSpec:
        """The target's shape and dtype."""
        return self._merge.target.spec(name)

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """The merged tensor: accumulated in float32, rounded once to the target's dtype."""
        target = self._merge.target.read(name)
        group = self._merge.group_of.get(name)
        if group is None or self._weights[group] == 0.0:
            return deliver(target, out)
        deltas = [vector.read(name) for vector in self._merge.task_vectors]
        weights = [self._weights[group]] * len(deltas)
        merged = METHODS[self._merge.method](target, deltas, weights)
        return deliver(merged.to(self.spec(name).dtype), out)
