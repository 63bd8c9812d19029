"""A mixture of merges: what is searched when each expert is its own target + Σ w·(tuned − base)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tvmerge.errors import IncompatibleError
from tvmerge.merge import Merge, MergedStateDict
from tvmerge.moe import Layout, MixtureOfExperts, is_mlp
from tvmerge.state_dict import Array, StateDict
from tvmerge.task_vector import Difference

__all__ = ["BASES", "GATE", "MixtureMerge", "MixtureSettings"]

#: What can give a mixture its attention, norms and embeddings.
BASES = ("first", "average")
#: What the names of the temperatures begin with.
GATE = "gate"


@dataclass(frozen=True)
class MixtureSettings:
    """How merges become the experts of one model."""

    base: str = "first"  # one of BASES
    experts_per_token: int = 2
    share_weights: bool = False  # all experts have one set of weights
    search_gate: bool = False  # each layer's router has a temperature


class MixtureMerge:
    """A mixture of merges, before the weights are known.

    With the base `average` what is outside of the MLPs is the mean of all merges, which is a merge too: the first
    target, plus the others' differences from it, each divided by the number of experts, plus the task vectors at the
    mean of the weights. It is summed and rounded once.

    Args:
        merges: one for each expert, of the same names, shapes, task vectors, grouping and dtypes.
        layout: how the class of the mixture spells them.
        router: `(layers, experts, hidden)`, float32.
        settings: how they become one.
        labels: how to call the experts in an error.

    Attributes:
        weight_names: in a stable order: `expert1/layers.3` (`expert1/label/layers.3` where there are several task
            vectors), or `layers.3` if all experts share their weights. A weight that moves no tensor of the mixture,
            as those of the embeddings of all experts but the first do, is none of them.
        gate_names: the names of the temperatures, which divide the router's scores: `gate/layers.3`.

    Raises:
        IncompatibleError: the merges are no experts of one mixture, or two weights would have one name.
    """

    def __init__(
        self,
        *,
        merges: Sequence[Merge],
        layout: Layout,
        router: Array,
        settings: MixtureSettings,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.merges = tuple(merges)
        self.router = router
        self._layout = layout
        self._settings = settings
        self._labels = labels
        first = merges[0]
        self._average: Merge | None = None
        if settings.base == "average":
            # A tuned model's label is the name of a folder, which holds no slash.
            others = {
                f"target/{n}": Difference(tuned=merge.target, base=first.target)
                for n, merge in enumerate(merges[1:], start=2)
            }
            self._average = Merge(
                target=first.target,
                task_vectors={**first.task_vectors, **others},
                grouping=first.grouping,
                method=first.method,
                dtype=first.dtype,
                fixed=dict.fromkeys(others, 1 / len(merges)),
            )
        self._names = [self._names_of(n) for n in range(len(merges))]
        own = list(dict.fromkeys(name for names in self._names for name in names.values()))
        self.gate_names: Sequence[str] = [f"{GATE}/layers.{n}" for n in range(len(router))] * settings.search_gate
        if clash := sorted(set(own) & set(self.gate_names)):
            raise IncompatibleError(
                f"a tuned model called {GATE} and --search_gate both give a weight the name {clash[0]}: rename it"
            )
        self.weight_names: Sequence[str] = own
        self.at(dict.fromkeys(self.weight_names, 0.0) | dict.fromkeys(self.gate_names, 1.0))  # fits, or is refused

    def parts(self) -> list[tuple[Merge, list[str]]]:
        """The merges that the mixture is made of, and which of their tensors move it."""
        experts = [(merge, [name for name in merge.weights_of if is_mlp(name)]) for merge in self.merges]
        base = self._average or self.merges[0]
        return [*experts, (base, [name for name in base.weights_of if not is_mlp(name)])]

    def _names_of(self, n: int) -> dict[str, str]:
        """Name of a weight of a merge → its name in the mixture, for those that move the mixture."""
        merge = self.merges[n]
        whole = n == 0 or self._average is not None
        used = {name for tensor, pairs in merge.weights_of.items() if whole or is_mlp(tensor) for _, name in pairs}
        prefix = "" if self._settings.share_weights else f"expert{n + 1}/"
        return {name: prefix + name for name in merge.weight_names if name in used}

    def at(self, weights: Mapping[str, float]) -> MixtureOfExperts:
        """The mixture at the given weights and temperatures.

        Args:
            weights: a number for each of `weight_names` and `gate_names`, and no other.

        Raises:
            ValueError: a number is missing or unknown, or a temperature is not above 0.
        """
        if set(weights) != {*self.weight_names, *self.gate_names}:
            different = sorted(set(weights) ^ {*self.weight_names, *self.gate_names})
            raise ValueError(f"numbers are needed for the names of the mixture and no others; different: {different}")
        experts = [self.expert(n, weights) for n in range(len(self.merges))]
        base: StateDict = experts[0]
        if self._average is not None:
            each = [self.expert_weights(n, weights) for n in range(len(self.merges))]
            base = self._average.at({name: math.fsum(own[name] for own in each) / len(each) for name in each[0]})
        router = self.router
        if self.gate_names:
            temperatures = np.array([weights[name] for name in self.gate_names])
            if not (temperatures > 0).all():
                raise ValueError(f"temperatures must be above 0, got {temperatures.min()}")
            router = (router / temperatures[:, None, None]).astype(np.float32)
        return self._mixture(experts, base, router)

    def _mixture(self, experts: Sequence[StateDict], base: StateDict, router: Array) -> MixtureOfExperts:
        return MixtureOfExperts(experts=experts, base=base, router=router, layout=self._layout, labels=self._labels)

    def expert_weights(self, n: int, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights of an expert's own merge; 0 for those that were not searched, as they do not move the mixture."""
        if self._settings.share_weights:  # those of the first, who has all
            return {name: weights[name] for name in self.merges[n].weight_names}
        return {name: weights.get(self._names[n].get(name, ""), 0.0) for name in self.merges[n].weight_names}

    def expert(self, n: int, weights: Mapping[str, float]) -> MergedStateDict:
        """An expert as a model of its own, in the dtypes of the mixture.

        Args:
            n: its number, from 0.
            weights: of the mixture.
        """
        return self.merges[n].at(self.expert_weights(n, weights))

    def alone(self, model: StateDict) -> MixtureOfExperts:
        """A dense model as a mixture of nothing but itself, which answers as it does, up to rounding.

        Args:
            model: of the names and shapes of an expert.
        """
        return self._mixture([model] * len(self.merges), model, self.router)
