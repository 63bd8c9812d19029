"""Tiny random models of the decoders that must work, none of which tvmerge knows by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

_SIZES: dict[str, Any] = {
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
_NEOX = {k: v for k, v in _SIZES.items() if k not in {"num_key_value_heads", "head_dim"}}
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1}

#: Name → configuration.
ARCHITECTURES: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "mistral": lambda: MistralConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SIZES),
    "gemma2": lambda: Gemma2Config(**_SIZES),
    "gemma3": lambda: Gemma3TextConfig(**_SIZES),
    "phi3": lambda: Phi3Config(**_SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**_NEOX),
    "gpt2": lambda: GPT2Config(**_GPT2, eos_token_id=2),
}


def build(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of an architecture."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()
