"""Mixtures of experts: dense models of one shape and a router, as the lazy state dict of a model that routes tokens.

A token's MLP output is the mean of those of the experts that the router picks for it, weighted by the router's softmax
over them. What is not in an MLP is there once: from the first expert, their mean, or a model of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tvmerge.errors import IncompatibleError
from tvmerge.state_dict import (
    MERGEABLE_DTYPES,
    Array,
    Dtype,
    StateDict,
    TensorSpec,
    WithTensors,
    check_same_tensors,
    deliver,
)

__all__ = ["LAYOUTS", "MAX_EXPERTS", "MIN_EXPERTS", "Average", "Layout", "MixtureOfExperts", "is_mlp"]

MIN_EXPERTS, MAX_EXPERTS = 2, 8
#: Widest inner dimension of a shared expert that adds nothing; a multiple of what kernels and devices split it by.
SHARED_WIDTH = 128

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_IN_LAYER = re.compile(r"(?P<layer>(?:.*\.)?layers\.(?P<number>\d+)\.)(?P<part>.+)")
_MLP = re.compile(r"mlp\.(?P<projection>gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class Layout:
    """How the class of a mixture spells what the dense class of its experts holds."""

    dense: str  # the class of the experts
    mixture: str  # the class of the mixture
    model_type: str  # of the mixture, in its config.json
    block: str  # what a layer calls its experts and their router
    projections: Mapping[str, str]  # of an MLP: dense name → name in an expert
    attention: Sequence[str]  # regular expressions for what a layer holds beside its MLP
    shared_expert: bool = False  # whether the class adds an expert to all tokens, which is then made of zeros

    def holds(self, part: str) -> bool:
        """Whether the mixture's layers have a place for a tensor of a dense layer, named from the layer on."""
        return _MLP.fullmatch(part) is not None or any(re.fullmatch(known, part) for known in self.attention)


_NORMS = r"(input|post_attention)_layernorm\.weight"
_SAME_NAMES = {name: name for name in _PROJECTIONS}
#: How transformers' MixtralForCausalLM spells an MLP in files: w2(act(w1 x) · w3 x).
_MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_WITHOUT_BIAS = (_NORMS, r"self_attn\.[qkvo]_proj\.weight")

#: model_type of dense models → the layout of their mixture.
LAYOUTS: Mapping[str, Layout] = {
    **{
        kind: Layout(dense, "MixtralForCausalLM", "mixtral", "block_sparse_moe", _MIXTRAL_NAMES, _WITHOUT_BIAS)
        for kind, dense in (("mistral", "MistralForCausalLM"), ("llama", "LlamaForCausalLM"))
    },
    "qwen2": Layout(
        *("Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "qwen2_moe", "mlp", _SAME_NAMES),
        attention=(_NORMS, r"self_attn\.o_proj\.weight", r"self_attn\.[qkv]_proj\.(weight|bias)"),
        shared_expert=True,
    ),
    "qwen3": Layout(
        *("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "qwen3_moe", "mlp", _SAME_NAMES),
        attention=(_NORMS, r"self_attn\.[qkvo]_proj\.(weight|bias)", r"self_attn\.[qk]_norm\.weight"),
    ),
}


@dataclass(frozen=True)
class _Part:
    """A tensor of another state dict, in the dtype of the mixture."""

    source: StateDict
    name: str
    dtype: Dtype

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.source.spec(self.name).shape, self.dtype)

    @property
    def version(self) -> Hashable:
        return self.source.version(self.name), self.dtype

    def array(self, out: Array | None) -> Array:
        if self.dtype == self.source.spec(self.name).dtype:
            return self.source.array(self.name, out=out)
        with np.errstate(over="ignore"):  # infinity is found where it counts
            return deliver(self.source.array(self.name).astype(self.dtype), out)


@dataclass(frozen=True)
class _Values:
    """A small tensor that is here: the router of a layer, in float32, or zeros in no memory."""

    values: Array
    dtype: Dtype

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.values.shape, self.dtype)

    @property
    def version(self) -> Hashable:
        return hashlib.sha256(self.values.tobytes()).hexdigest(), self.values.shape, self.dtype

    def array(self, out: Array | None) -> Array:
        return deliver(self.values.astype(self.dtype), out)


def is_mlp(name: str) -> bool:
    """Whether a dense model's tensor is of an MLP, of which a mixture holds every expert's own."""
    found = _IN_LAYER.fullmatch(name)
    return found is not None and _MLP.fullmatch(found["part"]) is not None


class MixtureOfExperts(WithTensors):
    """Experts and a router as the lazy state dict of a mixture, spelled as the checkpoints of its class.

    Holds no tensor but the router, whatever the experts are: checkpoints or merges at given weights.

    Args:
        experts: 2 to 8 dense models with the same names and shapes; of each the MLPs are read.
        router: `(layers, experts, hidden)`, float32: a token's score for each expert is the product of its hidden state
            with the expert's row. Rounded to the dtype of the mixture.
        layout: how the class of the mixture spells them.
        base: what gives all tensors outside of MLPs: the first expert, the mean of all, or another dense model.
        dtype: of all floating tensors; None for those of the base, which experts of another dtype are rounded to.
        labels: how to call the experts in an error; None for their numbers.

    Raises:
        IncompatibleError: too few or too many experts, tensors that differ or that the mixture has no place for, or a
            router of another shape.
    """

    def __init__(
        self,
        *,
        experts: Sequence[StateDict],
        router: Array,
        layout: Layout,
        base: StateDict | Literal["first", "average"] = "first",
        dtype: Dtype | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        labels = [f"expert {n}" for n in range(1, 1 + len(experts))] if labels is None else labels
        check_number(len(experts))
        for expert, label in zip(experts, labels, strict=True):
            check_same_tensors(experts[0], expert, reference_name=labels[0], other_name=label)
        if isinstance(base, str):
            base = experts[0] if base == "first" else Average(experts)
        else:
            check_same_tensors(base, experts[0], reference_name="the base model", other_name=labels[0])
        self.experts = tuple(experts)
        self.layout = layout
        self._dtype = dtype
        self._parts: dict[str, _Part | _Values] = {}
        layers = self._place(base, labels[0])
        self._place_router(layers, router)
        self._names = sorted(self._parts)

    def _place(self, base: StateDict, label: str) -> dict[str, Dtype]:
        """Say where each tensor comes from; returns what each layer's names begin with, and its dtype, in order."""
        layers: dict[tuple[int, str], Dtype] = {}
        for name in base.names:
            found = _IN_LAYER.fullmatch(name)
            part = found["part"] if found else ""
            dtype = self._dtype_of(base.spec(name))
            if found and not self.layout.holds(part):
                raise IncompatibleError(
                    f"{name} of {label} has no place in {self.layout.mixture}: "
                    f"use experts of {self.layout.dense} without {'biases there' if part.endswith('bias') else 'it'}"
                )
            if found is None or (mlp := _MLP.fullmatch(part)) is None:
                self._parts[name] = _Part(base, name, dtype)
                continue
            layers[int(found["number"]), found["layer"]] = dtype
            inside = self.layout.projections[mlp["projection"]]
            for n, expert in enumerate(self.experts):
                own = f"{found['layer']}{self.layout.block}.experts.{n}.{inside}.weight"
                self._parts[own] = _Part(expert, name, dtype)
        for _, prefix in sorted(layers):
            for projection, inside in self.layout.projections.items():
                if f"{prefix}{self.layout.block}.experts.0.{inside}.weight" not in self._parts:
                    raise IncompatibleError(f"{label} lacks {prefix}mlp.{projection}.weight: use whole models")
        return {prefix: layers[number, prefix] for number, prefix in sorted(layers)}

    def _place_router(self, layers: Mapping[str, Dtype], router: Array) -> None:
        gate = f"{next(iter(layers), '')}{self.layout.block}.experts.0.{self.layout.projections['gate_proj']}.weight"
        hidden = self._parts[gate].spec.shape[1] if layers else 0
        wanted = (len(layers), len(self.experts), hidden)
        if router.shape != wanted:
            raise IncompatibleError(
                f"the router has the shape {list(router.shape)}, where {len(layers)} layers, {len(self.experts)} "
                f"experts and a hidden size of {hidden} ask for {list(wanted)}: make one for these experts"
            )
        own = router.astype(np.float32)  # nobody else's to change
        for n, (prefix, dtype) in enumerate(layers.items()):
            self._parts[f"{prefix}{self.layout.block}.gate.weight"] = _Values(own[n], dtype)
            if self.layout.shared_expert:
                for name, shape in shared_shapes(hidden).items():
                    zeros = np.broadcast_to(np.zeros((), np.float32), shape)
                    self._parts[f"{prefix}{self.layout.block}.{name}.weight"] = _Values(zeros, dtype)

    def _dtype_of(self, spec: TensorSpec) -> Dtype:
        return spec.dtype if self._dtype is None or spec.dtype not in MERGEABLE_DTYPES else self._dtype

    def origin(self, name: str) -> tuple[StateDict, str]:
        """The state dict that a tensor comes from byte for byte, and what it is called there; else this one."""
        part = self._parts[name]
        if isinstance(part, _Part) and part.dtype == part.source.spec(part.name).dtype:
            return part.source, part.name
        return self, name

    @property
    def names(self) -> Sequence[str]:
        """Tensor names as the checkpoints of the mixture's class spell them, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        return self._parts[name].spec

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """An expert's tensor byte for byte, one of the base, or the router of a layer."""
        return self._parts[name].array(out)

    def version(self, name: str) -> Hashable:
        """That of what it is made of: a search that moves one expert rewrites the tensors of that one alone."""
        return self._parts[name].version


def shared_shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """Shapes of a shared expert that adds nothing: all zeros, so that its output is 0 whatever its gate says."""
    inner = (SHARED_WIDTH, hidden)
    shapes = {"gate_proj": inner, "up_proj": inner, "down_proj": inner[::-1]}
    return {**{f"shared_expert.{name}": shape for name, shape in shapes.items()}, "shared_expert_gate": (1, hidden)}


def check_number(n_experts: int) -> None:
    """Refuse too few and too many experts.

    Raises:
        IncompatibleError: with the number.
    """
    if not MIN_EXPERTS <= n_experts <= MAX_EXPERTS:
        raise IncompatibleError(
            f"a mixture needs {MIN_EXPERTS} to {MAX_EXPERTS} experts, got {n_experts}: name more or fewer"
        )


class Average(WithTensors):
    """The mean of state dicts that hold the same tensors, of which integers are those of the first.

    It is the first plus the differences of the others from it, each divided by their number, rounded once, as in a
    MixtureMerge.

    Args:
        state_dicts: at least one.
    """

    def __init__(self, state_dicts: Sequence[StateDict]) -> None:
        self._state_dicts = tuple(state_dicts)

    @property
    def names(self) -> Sequence[str]:
        """As in all of them, sorted."""
        return self._state_dicts[0].names

    def spec(self, name: str) -> TensorSpec:
        """As in the first."""
        return self._state_dicts[0].spec(name)

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """The mean, rounded to the dtype of `spec`."""
        spec = self.spec(name)
        if spec.dtype not in MERGEABLE_DTYPES:
            return self._state_dicts[0].array(name, out=out)
        from tvmerge.delta import Delta, add_deltas, at_once  # whose compiled loops take a while to import

        first, *others = (each.array(name) for each in self._state_dicts)
        mean = np.empty(spec.shape, spec.dtype)
        with at_once():
            share = 1 / len(self._state_dicts)
            add_deltas(first, [Delta(other, first) for other in others], [share] * len(others), out=mean)
        return deliver(mean, out)

    def version(self, name: str) -> Hashable:
        """Those of all of them."""
        return Average, tuple(each.version(name) for each in self._state_dicts), self.spec(name).dtype
