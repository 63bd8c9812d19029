"""LoRA adapters in PEFT's format as task vectors: scale·B·A, without building the tuned model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tvmerge.checkpoint import Checkpoint, Header, read_json
from tvmerge.delta import Delta
from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.hub import ModelId
from tvmerge.state_dict import MERGEABLE_DTYPES, StateDict, TensorSpec
from tvmerge.task_vector import TaskVector

__all__ = ["Adapter", "LoraTaskVector", "check_adapter_base", "is_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What PEFT puts before the names of the model that it wraps.
PREFIX = "base_model.model."
#: Settings under which the weights are not base + scale·B·A of the matrices in the file.
UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
#: Ways of starting that change the base model too, so that the adapter is no difference from the original one.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?")


def is_adapter(model: ModelId) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (model.path / CONFIG).is_file() and not (model.path / "config.json").is_file()


class Adapter(Checkpoint):
    """The matrices of an adapter, memory-mapped.

    Raises:
        CheckpointError: a file is missing or damaged.
        IncompatibleError: it is no LoRA adapter, or of a kind that is more than scale·B·A.
    """

    def __init__(self, model: ModelId) -> None:
        super().__init__(_checked(model), single=WEIGHTS)
        where = f"the adapter {model.name}"
        settings = self.config
        if settings.get("peft_type") != "LORA":
            raise IncompatibleError(f"{where}: is of the kind {settings.get('peft_type')}, only LORA can be merged")
        self._check_scales(where)
        used = [name for name in UNSUPPORTED if settings.get(name)]
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
            used.append(f"init_lora_weights={start}")
        if used:
            hint = "merge it into its base with PEFT and name the merged model"
            raise IncompatibleError(f"{where}: uses {', '.join(used)}, which is more than scale·B·A: {hint}")

    def _check_scales(self, where: str) -> None:
        patterns = self.config.get("alpha_pattern") or {}
        alphas = [self.config.get("lora_alpha", 8), *(patterns.values() if isinstance(patterns, dict) else ["text"])]
        if not all(isinstance(alpha, (int, float)) and 0 < abs(alpha) < 1e9 for alpha in alphas):
            raise IncompatibleError(f"{where}: lora_alpha and alpha_pattern must be numbers, got {str(alphas)[:80]}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise IncompatibleError(f"{where}: {pattern!r} in alpha_pattern is no expression: {error}") from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return read_json(self.model.path / CONFIG)

    @cached_property
    def fingerprint(self) -> str:
        """Of the matrices and of what they are scaled by."""
        scales = {key: self.config.get(key) for key in ("alpha_pattern", "fan_in_fan_out", "lora_alpha", "use_rslora")}
        return hashlib.sha256(f"{super().fingerprint} {json.dumps(scales, sort_keys=True)}".encode()).hexdigest()[:16]

    @property
    def base_name(self) -> str | None:
        """The model that it was trained on, as its author named it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def scale(self, module: str, *, rank: int) -> float:
        """What B·A is multiplied by; alpha may differ between modules."""
        settings = self.config
        patterns = settings.get("alpha_pattern") or {}
        alpha = next((patterns[key] for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module)), None)
        alpha = settings.get("lora_alpha", 8) if alpha is None else alpha  # 8 is PEFT's default
        return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _checked(model: ModelId) -> ModelId:
    if not (model.path / WEIGHTS).is_file():
        raise CheckpointError(
            f"{model.path}: holds {CONFIG} and no {WEIGHTS}: pickled adapters are not loaded, save it with safetensors"
        )
    return model


class LoraTaskVector(TaskVector):
    """The difference that an adapter makes: scale·B·A, and whole tensors that were trained beside it.

    Args:
        adapter: the matrices.
        reference: names and shapes of the model that it is added to.
        base: the model that it was trained on, needed only if it holds whole tensors.

    Raises:
        IncompatibleError: a matrix fits no tensor of `reference`, or `base` is needed.

    Source:
        Hu et al. 2022, LoRA, arXiv:2106.09685, equation 3; Kalajdzievski 2023, rsLoRA, arXiv:2312.03732, for √r.
    """

    def __init__(self, *, adapter: Adapter, reference: StateDict, base: StateDict | None) -> None:
        self._adapter = adapter
        self._base = base
        self._shapes = {name: reference.spec(name).shape for name in reference.names}
        self._factors: dict[str, dict[str, str]] = {}  # tensor → "A" or "B" → name in the adapter
        self._modules: dict[str, str] = {}  # tensor → module, as the adapter spells it
        self._whole: dict[str, str] = {}  # tensor → name in the adapter
        for name in adapter.names:
            self._place(name)
        for tensor, factors in self._factors.items():
            self._check(tensor, factors)
        for tensor, name in self._whole.items():
            self._check_whole(tensor, adapter.spec(name))

    def _place(self, name: str) -> None:
        inner = name.removeprefix(PREFIX)
        factor = _FACTOR.fullmatch(inner)
        if factor:
            tensor = self._find(f"{factor['module']}.weight")
            if self._modules.setdefault(tensor, factor["module"]) != factor["module"]:
                self._refuse_twice(tensor)
            self._factors.setdefault(tensor, {})[factor["factor"]] = name
        elif not inner.endswith(".base_layer.weight"):  # that is the base itself, saved beside
            tensor = self._find(inner.replace(".base_layer.", "."))  # a trained bias
            if self._whole.setdefault(tensor, name) != name:
                self._refuse_twice(tensor)

    def _refuse_twice(self, tensor: str) -> None:
        raise IncompatibleError(
            f"the adapter {self._adapter.model.name} changes two tensors that can only be {tensor} here: "
            f"it was trained for another model{_named(self._adapter.base_name)}"
        )

    def _find(self, name: str) -> str:
        """The tensor of the reference that an adapter means, where a model class may spell its prefix differently."""
        if name in self._shapes:
            return name
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
        tail = "." + ".".join(parts[max(first - 1, 0) :])
        found = [known for known in self._shapes if f".{known}".endswith(tail)]
        shared = {known: len(set(known.split(".")) & set(parts)) for known in found}
        best = [known for known in found if shared[known] == max(shared.values())]
        if len(best) != 1:
            what = "does not have" if not best else f"has {len(best)} times"
            raise IncompatibleError(
                f"the adapter {self._adapter.model.name} changes {name}, which the model {what}: it was trained for "
                f"another model{_named(self._adapter.base_name)}"
            )
        return best[0]

    def _check(self, tensor: str, factors: Mapping[str, str]) -> None:
        where = f"the adapter {self._adapter.model.name}"
        if factors.keys() != {"A", "B"}:
            raise IncompatibleError(f"{where}: has only one of the two matrices for {tensor}: save it again")
        a, b = (self._adapter.spec(factors[factor]).shape for factor in "AB")
        shape = self._shapes[tensor]
        if len(shape) != 2 or len(a) != 2 or len(b) != 2:
            raise IncompatibleError(f"{where}: changes {tensor}, which is no matrix: only linear layers can be merged")
        product = (b[0], a[1])
        if (product[::-1] if self._is_transposed(tensor) else product) != shape or a[0] != b[1] or not a[0]:
            raise IncompatibleError(
                f"{where}: changes {tensor} as one of shape {list(product)}, where the model's is {list(shape)}: it "
                f"was trained for another model{_named(self._adapter.base_name)}"
            )

    def _check_whole(self, tensor: str, spec: TensorSpec) -> None:
        where, shape = f"the adapter {self._adapter.model.name}", self._shapes[tensor]
        known = self._base is None or tensor in self._base.names
        base = self._base.spec(tensor).shape if self._base is not None and known else shape
        if not known or spec.shape != shape or base != shape or spec.dtype not in MERGEABLE_DTYPES:
            held = f"{list(spec.shape)} of {spec.dtype.name}, {list(base) if known else 'missing'} in its base"
            raise IncompatibleError(
                f"{where}: holds {tensor} whole, {held}, where the model's is {list(shape)}: "
                f"it was trained for another model{_named(self._adapter.base_name)}"
            )

    def _is_transposed(self, tensor: str) -> bool:
        a, b = (self._adapter.spec(self._factors[tensor][factor]).shape for factor in "AB")
        if "lora_embedding_" in self._factors[tensor]["A"]:
            return True
        # One flag for all layers, of which some may be of the other kind.
        return bool(self._adapter.config.get("fan_in_fan_out")) and self._shapes[tensor] == (a[1], b[0])

    def check_base(self) -> None:
        """Refuse whole tensors without the base that they were trained from.

        Raises:
            IncompatibleError: with the first of them.
        """
        if self._whole and self._base is None:
            raise IncompatibleError(
                f"the adapter {self._adapter.model.name} holds {min(self._whole)} whole: name the base model that it "
                "was trained on, as --base_model or as name:base"
            )

    @property
    def names(self) -> Sequence[str]:
        """Names of the tensors that the adapter changes, sorted."""
        return sorted({*self._factors, *self._whole})

    @property
    def whole_names(self) -> Sequence[str]:
        """Names of those that it holds whole, for which it needs the base; sorted."""
        return sorted(self._whole)

    def spec(self, name: str) -> TensorSpec:
        """The shape of the model's tensor, in float32."""
        if name not in self._factors and name not in self._whole:
            raise KeyError(name)
        return TensorSpec(shape=self._shapes[name], dtype=np.dtype(np.float32))

    def delta(self, name: str) -> Delta:
        """The product in float64, or views of both whole tensors."""
        if name in self._whole:
            assert self._base is not None, "check_base was called"
            return Delta(minuend=self._adapter.array(self._whole[name]), subtrahend=self._base.array(name))
        factors = self._factors[name]
        a, b = (self._adapter.array(factors[factor]).astype(np.float64) for factor in "AB")
        product = (b @ a) * self._adapter.scale(self._modules[name], rank=a.shape[0])
        return Delta(minuend=product.T.copy() if self._is_transposed(name) else product)


def check_adapter_base(adapter: Adapter, base: Header) -> None:
    """Refuse an adapter that says it was trained on another model than the given base.

    Raises:
        IncompatibleError: with both names.
    """
    said, given = adapter.base_name, base.model
    if said is None:
        return
    folder = Path(os.path.expanduser(said))
    if folder.is_dir() and isinstance(base, Checkpoint) and folder.resolve() != given.path.resolve():
        other = Checkpoint(ModelId(name=said, revision=None, path=folder)).fingerprint != base.fingerprint
    else:
        other = given.revision is not None and said.count("/") == 1 and said.lower() != given.name.lower()
    if other:
        raise IncompatibleError(
            f"the adapter {adapter.model.name} was trained on {said}, not on {given.name}: name its base as "
            f"{adapter.model.name}:{said}"
        )


def _named(base: str | None) -> str:
    return f", {base}" if base else ""
