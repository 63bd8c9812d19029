"""Random models of Mistral's shape, and merges of them, to measure on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tvmerge.checkpoint import Checkpoint
from tvmerge.granularity import Grouping
from tvmerge.hub import resolve
from tvmerge.merge import Merge
from tvmerge.state_dict import BFLOAT16, Array, StateDict, TensorSpec, WithTensors, deliver
from tvmerge.task_vector import Difference, KeptTaskVector
from tvmerge.writer import write_weights

__all__ = [
    "LARGE",
    "MEDIUM",
    "ROLES",
    "Shape",
    "Weights",
    "make_models",
    "merge_of",
    "mergekit_config",
    "opened",
    "recipe",
]

ROLES = ("target", "base", "tuned")


@dataclass(frozen=True)
class Shape:
    """A Mistral."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        h, i, kv = self.hidden, self.inner, self.hidden // 4
        layer = {
            **{f"self_attn.{name}_proj": (rows, h) for name, rows in (("q", h), ("k", kv), ("v", kv), ("o", h))},
            **{"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)},
            **{"input_layernorm": (h,), "post_attention_layernorm": (h,)},
        }
        shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(self.layers) for name, shape in layer.items()}
        ends = {"model.embed_tokens.weight": (self.vocabulary, h), "lm_head.weight": (self.vocabulary, h)}
        return {**shapes, **ends, "model.norm.weight": (h,)}

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 128,
            "num_key_value_heads": self.hidden // 512,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


MEDIUM = Shape(hidden=2048, inner=7168, layers=4, vocabulary=8192)
LARGE = Shape(hidden=3072, inner=8192, layers=30, vocabulary=32000)


class Noise(WithTensors):
    """A random model as a lazy state dict: blocks of one array of noise, at another place for each tensor and role."""

    def __init__(self, shape: Shape, role: str, spread: float) -> None:
        self._shapes = shape.tensors()
        generator = np.random.default_rng(0)
        self._noise = {part: 0.02 * generator.standard_normal(1 << 22, np.float32) for part in ROLES}
        self._parts = {
            "base": {"base": 1.0},
            "target": {"base": 1.0, "target": 0.1},
            "tuned": {"base": 1.0, "tuned": spread},
        }
        self._role = role

    @property
    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self._shapes)

    def spec(self, name: str) -> TensorSpec:
        """All bfloat16."""
        return TensorSpec(self._shapes[name], BFLOAT16)

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """The same values each time."""
        spec, start = self.spec(name), 7919 * len(name) % (1 << 20)
        sample = np.zeros(1 << 22, np.float32)
        for part, scale in self._parts[self._role].items():
            sample += np.float32(scale) * self._noise[part]
        sample = np.roll(sample, start).astype(BFLOAT16)
        return deliver(np.resize(sample, spec.shape), out)

    def version(self, name: str) -> object:
        """It does not change."""
        return name


def make_models(folder: Path, shape: Shape, *, spread: float = 0.02) -> None:
    """Write three models, with a tokenizer of the right size that nothing else reads."""
    for role in ROLES:
        (folder / role).mkdir(parents=True)
        write_weights(Noise(shape, role, spread), folder / role)
        (folder / role / "config.json").write_text(json.dumps(shape.config()))
    from tokenizers import Tokenizer, models

    words = {f"<{i}>": i for i in range(shape.vocabulary)}
    for role in ROLES:
        Tokenizer(models.WordLevel(words, unk_token="<0>")).save(str(folder / role / "tokenizer.json"))
        (folder / role / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def opened(folder: Path) -> dict[str, Checkpoint]:
    """The three models."""
    return {role: Checkpoint(resolve(str(folder / role))) for role in ROLES}


def merge_of(folder: Path, *, keep: bool) -> Merge:
    """The merge of three models, a weight per layer."""
    models = opened(folder)
    vector = Difference(tuned=models["tuned"], base=models["base"])
    vectors = {"tuned": KeptTaskVector(vector) if keep else vector}
    return Merge(target=models["target"], task_vectors=vectors, grouping=Grouping("layer"))


class Weights:
    """Other weights for every call."""

    def __init__(self, merge: Merge) -> None:
        self._merge, self._n = merge, 0

    def __call__(self, *, only: str | None = None) -> StateDict:
        """The merge at new weights, or at weights of which one is new."""
        self._n += 1
        names = self._merge.weight_names
        moved = {name: 0.3 + 0.001 * (i + (self._n if only in (None, name) else 0)) for i, name in enumerate(names)}
        return self._merge.at(moved)


def recipe(folder: Path) -> Path:
    """A recipe for the three models."""
    names = merge_of(folder, keep=False).weight_names
    content = {
        "target": {"model": str(folder / "target")},
        "task_vectors": [
            {"label": "tuned", "tuned": {"model": str(folder / "tuned")}, "base": {"model": str(folder / "base")}}
        ],
        "granularity": "layer",
        "weights": {name: 0.3 + 0.01 * i for i, name in enumerate(names)},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def mergekit_config(folder: Path, shape: Shape) -> Path:
    """The same merge as mergekit writes it: a weight for each layer, as gradients over the layers."""
    weights = yaml.safe_load(recipe(folder).read_text())["weights"]
    layers = [{"filter": f"layers.{i}.", "value": weights[f"layers.{i}"]} for i in range(shape.layers)]
    rest = [{"filter": name, "value": weights[name]} for name in ("embed_tokens", "lm_head", "norm")]
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / "target"), "parameters": {"weight": 1.0}},
            {"model": str(folder / "tuned"), "parameters": {"weight": [*layers, *rest, {"value": 0.5}]}},
        ],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    path = folder / "mergekit.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
