"""Writes mergekit_moe.json: what mergekit-moe makes of tiny models, to hold `tvmerge moe` against (test_golden_moe.py).

Run it where tvmerge's tests run, and give it the command of another environment in which mergekit is installed:

    PYTHONPATH=tests python tests/golden/make_mergekit_moe.py ENVIRONMENT/bin/mergekit-moe

The models are made of the raw bits of numpy's PCG64, which are the same in every release of numpy and on every machine,
and the test makes them again. Of mergekit nothing is kept but what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import yaml
from conftest import save_tokenizer
from safetensors import safe_open
from safetensors.numpy import save_file

__all__ = ["CASES", "CONFIG_KEYS", "GOLDEN", "LAYERS", "Case", "fingerprint", "read_tensors", "save_models", "yaml_of"]

GOLDEN = Path(__file__).with_name("mergekit_moe.json")
MODULES = ("mergekit", "transformers", "torch")
CHARACTERS = "abcdefghij 東京タワー。\n"
LAYERS, HIDDEN, INNER, HEADS = 2, 16, 24, 2

_SIZES: Mapping[str, Any] = {
    "vocab_size": len(CHARACTERS) + 3,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
#: The config.json of dense models, as releases of transformers before 5 wrote it, as most on the Hub are.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mistral": {
        **_SIZES,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "rope_theta": 5000.0,
        "sliding_window": 8,
    },
    "llama": {
        **_SIZES,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": _LLAMA3,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        **_SIZES,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        **_SIZES,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rope_theta": 700.0,
        "head_dim": 12,
    },
}
#: Of config.json, what a model computes by, and what it is generated with.
CONFIG_KEYS = (
    *("architectures", "model_type", "dtype", "torch_dtype", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "sliding_window", "layer_types"),
    *("use_sliding_window", "max_window_layers", "tie_word_embeddings", "attention_bias", "qkv_bias"),
    *("num_local_experts", "num_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step"),
    *("mlp_only_layers", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits"),
)

Prompts = Sequence[tuple[Sequence[str], Sequence[str]]]

#: (positive, negative) prompts by expert; the latter empty for some, and a window of 8 is shorter than the longest.
UNEVEN: Prompts = (
    (["東京タワー", "abc", "a"], ["j"]),
    (["fghij fghij fghij"], []),
    (["。", "bbb。"], ["タワー", "hhhhhh\nh"]),
    (["ha", "京京京"], ["a b"]),
)
#: The same, where all of one kind have one length, so that a batch of them needs no padding.
EVEN: Prompts = (
    (["東京タワー", "abcde"], ["j"]),
    (["fghij fghij fghij"], []),
    (["。b", "bb"], ["タワー", "hhh"]),
    (["haha", "京京京京"], ["a b"]),
)
#: As UNEVEN, of letters alone: transformers gives a Qwen2 a tokenizer that takes all else apart into bytes, which have
#: no tokens here.
LETTERS: Prompts = ((["abcde", "fgh", "a"], ["j"]), (["fghijfghijfghij"], []), (["b", "bbbj"], ["cde", "hhhhhhh"]))


@dataclass(frozen=True)
class Case:
    """A mixture: its models, as `save_models` calls them, and what else stands in its file."""

    family: str  # a key of FAMILIES
    gate_mode: str
    experts: int = 2
    base: str = "base"  # or the number of an expert
    weights: str = "bfloat16"  # of the models; or float32
    prompts: Prompts = UNEVEN
    more: Mapping[str, Any] = field(default_factory=dict)  # keys of the file

    def model(self, label: object) -> str:
        """The folder's name of a model."""
        return f"{self.family}-{self.weights}-{label}"

    @property
    def is_random(self) -> bool:
        """Whether the router is another one each time."""
        return self.gate_mode in ("random", "uniform_random")


CASES: Mapping[str, Case] = {
    "mistral, cheap_embed": Case("mistral", "cheap_embed", base="0"),
    "mistral, cheap_embed, float32": Case(
        "mistral", "cheap_embed", experts=3, weights="float32", more={"experts_per_token": 1}
    ),
    "mistral, cheap_embed, bfloat16 to float32": Case("mistral", "cheap_embed", experts=4, more={"dtype": "float32"}),
    "mistral, hidden": Case("mistral", "hidden", experts=3),
    "mistral, hidden, float32": Case("mistral", "hidden", experts=4, weights="float32", base="1"),
    "mistral, hidden, float32 to float16": Case("mistral", "hidden", weights="float32", more={"dtype": "float16"}),
    "mistral, hidden_avg, no padding": Case("mistral", "hidden_avg", experts=4, weights="float32", prompts=EVEN),
    "mistral, hidden_avg": Case("mistral", "hidden_avg", experts=3, weights="float32"),
    "mistral, random": Case("mistral", "random", experts=4, more={"dtype": "float16", "experts_per_token": 1}),
    "mistral, uniform_random": Case("mistral", "uniform_random", experts=2, base="0"),
    "llama, cheap_embed": Case("llama", "cheap_embed", experts=3, more={"experts_per_token": 3}),
    "llama, hidden": Case("llama", "hidden", weights="float32", more={"dtype": "bfloat16"}),
    "llama, hidden, bfloat16 to float32": Case("llama", "hidden", base="1", more={"dtype": "float32"}),
    "qwen2, cheap_embed": Case("qwen2", "cheap_embed", prompts=LETTERS),
    "qwen2, hidden": Case(
        "qwen2", "hidden", experts=3, base="0", weights="float32", prompts=LETTERS, more={"experts_per_token": 1}
    ),
    "qwen3, cheap_embed": Case("qwen3", "cheap_embed", prompts=LETTERS, more={"experts_per_token": 1}),
    "qwen3, hidden": Case("qwen3", "hidden", experts=3, weights="float32", prompts=LETTERS),
}


def yaml_of(case: Case, folder: Path) -> dict[str, Any]:
    """The content of a case's file, its models in a folder."""
    experts = []
    for n, (positive, negative) in enumerate(case.prompts[: case.experts]):
        expert: dict[str, Any] = {"source_model": str(folder / case.model(n)), "positive_prompts": list(positive)}
        experts.append({**expert, "negative_prompts": list(negative)} if negative else expert)
    content = {"base_model": str(folder / case.model(case.base)), "gate_mode": case.gate_mode, "experts": experts}
    return {**content, **case.more}


def save_models(case: Case, folder: Path) -> None:
    """The experts and the base of a case, those that are not there yet."""
    for label in ("base", *range(case.experts)):
        if not (folder / case.model(label)).exists():
            _save(folder / case.model(label), case)


def _save(folder: Path, case: Case) -> None:
    folder.mkdir(parents=True)
    config = FAMILIES[case.family]
    dtype = ml_dtypes.bfloat16 if case.weights == "bfloat16" else np.float32
    tensors = {}
    for name, shape in _shapes(config).items():
        values = _uniform(f"{folder.name}/{name}", shape) * (1 if "embed" in name else 0.5)
        tensors[name] = (values + name.endswith("norm.weight")).astype(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": case.weights}))
    save_tokenizer(folder, CHARACTERS)
    if case.family.startswith("qwen"):  # whose tokenizers have no token that begins a text
        settings = folder / "tokenizer_config.json"
        without = {key: value for key, value in json.loads(settings.read_text()).items() if key != "bos_token"}
        settings.write_text(json.dumps(without))


def _uniform(label: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Values from -1 to 1, multiples of 2⁻²³, that depend on the label alone."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    bits = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(40)
    return (bits.astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a dense model."""
    head = config.get("head_dim", HIDDEN // HEADS)
    attention = {"q_proj": HEADS * head, "k_proj": head, "v_proj": head}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], HIDDEN)}
    for layer in (f"model.layers.{n}." for n in range(LAYERS)):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (HIDDEN,)
        for name, width in attention.items():
            shapes[f"{layer}self_attn.{name}.weight"] = (width, HIDDEN)
            if config["model_type"] == "qwen2":
                shapes[f"{layer}self_attn.{name}.bias"] = (width,)
        if config["model_type"] == "qwen3":
            shapes |= {f"{layer}self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, HEADS * head)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INNER)
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (config["vocab_size"], HIDDEN)}


def fingerprint(array: npt.NDArray[Any]) -> list[Any]:
    """Shape, dtype and a hash of the bytes of a tensor."""
    return [list(array.shape), str(array.dtype), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]


#: Read when Python starts: mergekit loads the model that answers prompts in bfloat16, whatever its weights are in.
_IN_FLOAT32 = """
import torch, transformers
inner = transformers.AutoModelForCausalLM.from_pretrained
def load(*args, **kwargs):
    return inner(*args, **{**kwargs, "torch_dtype": torch.float32})
transformers.AutoModelForCausalLM.from_pretrained = load
"""


class Mergekit:
    """An installed mergekit-moe."""

    def __init__(self, command: Path, scratch: Path) -> None:
        self._command = command
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        self._scratch = scratch
        (scratch / "float32").mkdir()
        (scratch / "float32" / "sitecustomize.py").write_text(_IN_FLOAT32)

    def versions(self) -> dict[str, str]:
        """What it runs on."""
        code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {MODULES}}}))"
        python = str(self._command.with_name("python"))
        found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, env=self._environment)
        versions: dict[str, str] = json.loads(found.stdout)
        return versions

    def run(self, content: Mapping[str, Any], name: str, *, in_float32: bool = False) -> Path:
        """The folder that it writes for a file of this content."""
        file, out = self._scratch / f"{name}.yaml", self._scratch / name
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        path = str(self._scratch / "float32") if in_float32 else ""
        command = [str(self._command), str(file), str(out), "--device", "cpu"]
        subprocess.run(command, check=True, env={**self._environment, "PYTHONPATH": path})
        return out


def read_tensors(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """All tensors of a written model, by name."""
    found: dict[str, npt.NDArray[Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    return found


def _router(tensors: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
    """The rows of each layer's experts, in digits enough to tell each float32 from all others."""
    rows = [tensors[f"model.layers.{n}.mlp.gate.weight"].astype(np.float32) for n in range(LAYERS)]
    return [[[float(str(value)) for value in row] for row in layer] for layer in rows]


def measure(case: Case, mergekit: Mergekit, models: Path, name: str) -> dict[str, Any]:
    """What mergekit-moe makes of a case."""
    save_models(case, models)
    content = yaml_of(case, models)
    if case.family == "qwen2":  # which mergekit makes no mixture of without; its prompts give it a row of its own
        shared = {"source_model": content["base_model"], "positive_prompts": ["a"]}
        content["shared_experts"] = [shared]
    out = mergekit.run(content, name)
    tensors = read_tensors(out)
    config = json.loads((out / "config.json").read_text())
    found: dict[str, Any] = {
        "config": {key: config[key] for key in CONFIG_KEYS if key in config},
        "tensors": {key: fingerprint(tensors[key]) for key in sorted(tensors)},
    }
    if case.is_random:
        for key in (key for key in tensors if key.endswith("mlp.gate.weight")):
            found["tensors"][key][-1] = ""
        return found
    found["router"] = _router(tensors)
    if case.gate_mode.startswith("hidden"):
        exact = mergekit.run({**content, "dtype": "float32"}, f"{name}-float32", in_float32=True)
        found["router_in_float32"] = _router(read_tensors(exact))
    return found


def main() -> None:
    """Measure all cases and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("command", type=Path, help="mergekit-moe in the environment where mergekit is installed")
    command = parser.parse_args().command.absolute()
    with tempfile.TemporaryDirectory() as folder:
        mergekit = Mergekit(command, Path(folder))
        models = Path(folder) / "models"
        cases = {name: measure(case, mergekit, models, f"out{n}") for n, (name, case) in enumerate(CASES.items())}
        versions = mergekit.versions()
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in cases.items())
    GOLDEN.write_text(f'{{"versions": {json.dumps(versions)},\n"cases": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
