"""Tiny random models of the architectures that must work, none of which tvmerge knows by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    HrmTextConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from tvmerge.checkpoint import Checkpoint
from tvmerge.hub import ModelId

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_NEOX = {k: v for k, v in SIZES.items() if k not in {"num_key_value_heads", "head_dim"}}
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1}

_IMAGES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_PATCHES = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}

#: Decoders: name → configuration.
ARCHITECTURES: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES),
    "gemma3": lambda: Gemma3TextConfig(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**_NEOX),
    "gpt2": lambda: GPT2Config(**_GPT2, eos_token_id=2),
}


#: Models whose checkpoints hold other tensors than the live model does, or a tower beside the decoder.
CONVERTED: Mapping[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=3),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16),
    "hrm_text": lambda: HrmTextConfig(**{**SIZES, "num_hidden_layers": 1}, H_cycles=1, L_cycles=1),
    "gemma3_vision": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**SIZES),
        vision_config=SiglipVisionConfig(**_IMAGES),
        mm_tokens_per_image=4,
        image_token_index=39,
    ),
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**SIZES), vision_config=CLIPVisionConfig(**_IMAGES), image_token_index=39
    ),
    # transformers can build its decoder alone from the same configuration.
    "qwen3_5": lambda: Qwen3_5Config(
        text_config={**SIZES, "layer_types": ["linear_attention", "full_attention"], **_LINEAR},
        vision_config={**_PATCHES, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 4},
        image_token_id=39,
    ),
}


_WITH_IMAGES = {"gemma3_vision", "llava", "qwen3_5"}


def build(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of an architecture."""
    torch.manual_seed(seed)
    config = {**ARCHITECTURES, **CONVERTED}[name]()
    auto_class = AutoModelForImageTextToText if name in _WITH_IMAGES else AutoModelForCausalLM
    model: PreTrainedModel = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def save(name: str, folder: Path, *, seed: int, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    """A random model of an architecture, as a folder."""
    build(name, seed=seed).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return Checkpoint(ModelId(name=str(folder), revision=None, path=folder))


def load(name: str, folder: Path) -> PreTrainedModel:
    """A saved model, as transformers alone loads it."""
    auto_class = AutoModelForImageTextToText if name in _WITH_IMAGES else AutoModelForCausalLM
    model: PreTrainedModel = auto_class.from_pretrained(folder, dtype="auto")
    return model.eval()
