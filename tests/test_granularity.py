"""Weight names: golden counts and names of real architectures, and what must hold for any tensor names."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, build
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MistralConfig

from tvmerge.checkpoint import Checkpoint
from tvmerge.granularity import Grouping, group_tensors, natural_key
from tvmerge.hub import ModelId

KINDS = {"input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"}
KINDS |= {"gate_proj", "up_proj", "down_proj", "embed_tokens", "norm", "lm_head"}


@pytest.fixture(scope="module")
def mistral_7b() -> list[str]:
    """Tensor names of Mistral-7B, whose sizes are the defaults of transformers' configuration."""
    with torch.device("meta"):
        return list(AutoModelForCausalLM.from_config(MistralConfig()).state_dict())


@pytest.mark.parametrize(("granularity", "n_weights"), [("all", 291), ("layer", 35), ("parameter", 12)])
def test_mistral_7b_has_the_known_number_of_weights(mistral_7b: list[str], granularity: str, n_weights: int) -> None:
    assert len(set(group_tensors(mistral_7b, Grouping(granularity)).values())) == n_weights


def test_mistral_7b_weights_are_called_what_people_call_them(mistral_7b: list[str]) -> None:
    layers = list(dict.fromkeys(group_tensors(mistral_7b, Grouping("layer")).values()))
    assert layers == ["embed_tokens", *(f"layers.{i}" for i in range(32)), "lm_head", "norm"]
    assert set(group_tensors(mistral_7b, Grouping("parameter")).values()) == KINDS
    tensors = group_tensors(mistral_7b, Grouping("all"))
    assert tensors["model.layers.3.self_attn.q_proj.weight"] == "layers.3.self_attn.q_proj"
    assert tensors["model.embed_tokens.weight"] == "embed_tokens"


#: Architecture → (number of tensors, layer weights, parameter weights) of the tiny models in architectures.py.
GOLDEN = {
    "llama": (21, ["embed_tokens", "layers.0", "layers.1", "lm_head", "norm"], KINDS),
    "mistral": (21, ["embed_tokens", "layers.0", "layers.1", "lm_head", "norm"], KINDS),
    "qwen2": (26, ["embed_tokens", "layers.0", "layers.1", "norm"], KINDS - {"lm_head"}),
    "qwen3": (25, ["embed_tokens", "layers.0", "layers.1", "lm_head", "norm"], KINDS | {"q_norm", "k_norm"}),
    "gemma2": (
        24,
        ["embed_tokens", "layers.0", "layers.1", "norm"],
        KINDS - {"lm_head"} | {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
    ),
    "gemma3": (
        28,
        ["embed_tokens", "layers.0", "layers.1", "norm"],
        KINDS - {"lm_head"} | {"pre_feedforward_layernorm", "post_feedforward_layernorm", "q_norm", "k_norm"},
    ),
    "phi3": (
        15,
        ["embed_tokens", "layers.0", "layers.1", "lm_head", "norm"],
        KINDS - {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} | {"qkv_proj", "gate_up_proj"},
    ),
    "gpt_neox": (
        28,
        ["embed_in", "embed_out", "final_layer_norm", "layers.0", "layers.1"],
        {"embed_in", "embed_out", "final_layer_norm", "input_layernorm", "post_attention_layernorm"}
        | {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "gpt2": (
        28,
        ["h.0", "h.1", "ln_f", "wpe", "wte"],
        {"wte", "wpe", "ln_f", "ln_1", "ln_2", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"},
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_gets_readable_weights(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    owned = Checkpoint(ModelId(name=name, revision=None, path=tmp_path)).names
    n_tensors, layers, kinds = GOLDEN[name]
    assert len(owned) == n_tensors
    assert list(dict.fromkeys(group_tensors(owned, Grouping("layer")).values())) == layers
    assert set(group_tensors(owned, Grouping("parameter")).values()) == kinds
    assert len(set(group_tensors(owned, Grouping("all")).values())) == n_tensors


def test_towers_of_one_model_do_not_share_weights() -> None:
    names = [
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.mlp.experts.0.w1.weight",
        "language_model.model.layers.0.mlp.experts.1.w1.weight",
    ]
    layers = group_tensors(names, Grouping("layer"))
    assert set(layers.values()) == {"encoder.layers.0", "model.layers.0"}
    kinds = group_tensors(names, Grouping("parameter"))
    assert kinds[names[0]] != kinds[names[1]]
    assert kinds[names[2]] == kinds[names[3]] == "w1"


NAMES = st.lists(
    st.lists(st.sampled_from(["model", "layers", "h", "attn", "mlp", "proj", "norm", "0", "1", "10"]), min_size=1).map(
        lambda parts: ".".join([*parts, "weight"])
    ),
    min_size=1,
    unique=True,
)


@given(
    names=NAMES,
    seed=st.integers(0, 99),
    granularity=st.sampled_from(["uniform", "block:2", "layer", "parameter", "all"]),
)
def test_groups_cover_all_names_and_do_not_depend_on_their_order(names: list[str], seed: int, granularity: str) -> None:
    groups = group_tensors(names, Grouping(granularity))
    assert set(groups) == set(names)
    shuffled = random.Random(seed).sample(names, len(names))
    assert list(group_tensors(shuffled, Grouping(granularity)).items()) == list(groups.items())


@given(names=NAMES)
def test_all_gives_every_tensor_its_own_weight(names: list[str]) -> None:
    assert len(set(group_tensors(names, Grouping("all")).values())) == len(names)


@given(names=NAMES)
def test_all_is_finer_than_layer(names: list[str]) -> None:
    layers, tensors = group_tensors(names, Grouping("layer")), group_tensors(names, Grouping("all"))
    assert len({(layers[name], tensors[name]) for name in names}) == len(set(tensors.values()))


def test_numbers_sort_by_value() -> None:
    names = ["layers.10", "layers.9", "norm", "embed"]
    assert sorted(names, key=natural_key) == ["embed", "layers.9", "layers.10", "norm"]
