"""Making a router: the models that its gate mode asks for, opened when it asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tvmerge.errors import IncompatibleError, RunError
from tvmerge.models.transformers import TransformersModel, load_tokenizer
from tvmerge.router import ExpertPrompts, GateInputs, make_gates
from tvmerge.state_dict import Array, StateDict

__all__ = ["make_router"]


def make_router(
    mode: str,
    *,
    base: StateDict,
    folder: Path,
    config: Mapping[str, Any],
    prompts: Sequence[ExpertPrompts],
    seed: int,
    device: str,
) -> Array:
    """The router of a mixture.

    Args:
        mode: a key of GATE_MODES.
        base: the dense model that gives attention, norms and embeddings.
        folder: its configuration and tokenizer.
        config: the mixture's config.json.
        prompts: of each expert, empty ones where the mode needs none.
        seed: of the random modes.
        device: where the base answers prompts.

    Returns:
        `(layers, experts, hidden)`, float32.

    Raises:
        ConfigError: prompts that the mode cannot work with.
        IncompatibleError: the base has no embeddings that the mode could read.
        RunError: the base and its prompts do not fit on the device.
    """

    def embeddings() -> Array:
        found = [name for name in base.names if name.endswith("embed_tokens.weight")]
        if not found:
            raise IncompatibleError(f"{folder}: holds no embed_tokens.weight, which gate_mode {mode} is made from")
        return base.array(found[0])

    def model() -> PreTrainedModel:
        return TransformersModel.from_config(folder, state_dict=base, device=device).model

    inputs = GateInputs(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        prompts=prompts,
        seed=seed,
        tokenizer=lambda: load_tokenizer(folder),
        embeddings=embeddings,
        model=model,
    )
    try:
        return make_gates(mode, inputs)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the base model and its prompts do not fit on {device}: shorten them or use --device cpu"
        ) from error
