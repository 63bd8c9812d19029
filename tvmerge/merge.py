"""A merge: target + task vectors + method + grouping, which at given weights is a lazy state dict."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from tvmerge.delta import at_once
from tvmerge.granularity import Grouping, group_tensors
from tvmerge.methods import METHODS
from tvmerge.state_dict import MERGEABLE_DTYPES, Array, Dtype, StateDict, TensorSpec, WithTensors, deliver
from tvmerge.task_vector import TaskVector

__all__ = ["Merge", "MergedStateDict"]


class Merge:
    """What is merged, before the weights are known.

    Args:
        target: the model that the task vectors are added to.
        task_vectors: label → task vector, over names and shapes of the target.
        grouping: which tensors share one weight.
        method: a key of METHODS.
        dtype: of the merged tensors; None for that of each tensor of `like`.
        like: a state dict of the target's names and shapes that gives the dtypes; None for the target.
        fixed: label → weight of task vectors that are not searched but added to every tensor, also to frozen ones: the
            difference of another model and the target at 1/2 gives the mean of both.

    Attributes:
        weights_of: tensor name → label and weight name of each task vector that changes it, in a stable order.
        weight_names: the names of all weights, in a stable order: `layers.3`, or `label/layers.3` where there are
            several task vectors.
    """

    def __init__(
        self,
        *,
        target: StateDict,
        task_vectors: Mapping[str, TaskVector],
        grouping: Grouping,
        method: str = "task_arithmetic",
        dtype: Dtype | None = None,
        like: StateDict | None = None,
        fixed: Mapping[str, float] | None = None,
    ) -> None:
        self.target = target
        self.task_vectors = dict(task_vectors)
        self.grouping = grouping
        self.method = method
        self.dtype = dtype
        self._like = target if like is None else like
        self.fixed_weights = dict(fixed or {})
        self._mergeable = {name for name in target.names if target.spec(name).dtype in MERGEABLE_DTYPES}
        groups = group_tensors(self._mergeable, grouping)
        weights_of: dict[str, list[tuple[str, str]]] = {}
        names: dict[str, None] = {}
        searched = {label: vector for label, vector in self.task_vectors.items() if label not in self.fixed_weights}
        for label, vector in searched.items():
            changed = set(vector.names)
            for tensor, group in groups.items():
                if tensor in changed:
                    name = f"{label}/{group}" if len(searched) > 1 else group
                    weights_of.setdefault(tensor, []).append((label, name))
                    names[name] = None
        self.weights_of: Mapping[str, Sequence[tuple[str, str]]] = weights_of
        self.weight_names: Sequence[str] = list(names)

    def at(self, weights: Mapping[str, float]) -> MergedStateDict:
        """The merge at the given weights.

        Args:
            weights: a weight for each of `weight_names`, and no other. It is rounded to a float32 number.

        Raises:
            ValueError: a weight is missing or unknown.
        """
        if set(weights) != set(self.weight_names):
            different = sorted(set(weights) ^ set(self.weight_names))
            raise ValueError(f"weights are needed for the names of the merge and no others; different: {different}")
        return MergedStateDict(self, weights)

    def fixed(self, name: str) -> list[tuple[str, float]]:
        """Label and weight of each task vector of a fixed weight that moves a tensor."""
        return [] if name not in self._mergeable else list(self.fixed_weights.items())

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a merged tensor."""
        spec = self._like.spec(name)
        return spec if self.dtype is None or name not in self._mergeable else TensorSpec(spec.shape, self.dtype)


class MergedStateDict(WithTensors):
    """A merge at given weights, as a lazy state dict of the target's names and shapes."""

    def __init__(self, merge: Merge, weights: Mapping[str, float]) -> None:
        self.merge = merge
        self._weights = {name: float(np.float32(weight)) for name, weight in weights.items()}

    @property
    def names(self) -> Sequence[str]:
        """The target's tensor names, sorted."""
        return self.merge.target.names

    def spec(self, name: str) -> TensorSpec:
        """The target's shape, in the dtype of the merge."""
        return self.merge.spec(name)

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """The merged tensor: accumulated in float64, rounded once to the dtype of `spec`, then to that of `out`."""
        spec, target, terms = self.spec(name), self.merge.target.array(name), self.terms(name)
        if not terms:
            with np.errstate(over="ignore"):  # infinity is found where it counts
                return deliver(target.astype(spec.dtype, copy=False), out)
        deltas = [self.merge.task_vectors[label].delta(name) for label, _ in terms]
        method, weights = METHODS[self.merge.method], [w for _, w in terms]
        if out is not None and out.dtype == spec.dtype:
            method(target, deltas, weights, out)
            return out
        merged = np.empty(spec.shape, spec.dtype)
        with at_once():
            method(target, deltas, weights, merged)
        return deliver(merged, out)

    def terms(self, name: str) -> list[tuple[str, float]]:
        """Label and weight of each task vector that moves a tensor at these weights."""
        own = [(label, w) for label, weight in self.merge.weights_of.get(name, ()) if (w := self._weights[weight])]
        return own + self.merge.fixed(name)

    def version(self, name: str) -> Hashable:
        """The merge, and the weights of this tensor."""
        return self.merge, tuple(self._weights[weight] for _, weight in self.merge.weights_of.get(name, ()))
