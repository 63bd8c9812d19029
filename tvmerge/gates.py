"""Making a router: the models that its gate mode asks for, opened when it asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from tvmerge.errors import IncompatibleError, RunError
from tvmerge.models.transformers import TransformersModel, check_tokenizer, load_tokenizer
from tvmerge.rebuild import write_mixture_files
from tvmerge.router import ExpertPrompts, GateInputs, make_gates
from tvmerge.state_dict import Array, StateDict
from tvmerge.union import UnitedVocabulary

__all__ = ["make_router", "mixture_folder"]


@contextmanager
def mixture_folder(dense: Path, config: Mapping[str, Any], *, united: UnitedVocabulary | None) -> Iterator[Path]:
    """A mixture's folder without weights, which is here only for now: configuration and tokenizer.

    Args:
        dense: the folder of the model that they are taken from.
        config: the mixture's config.json.
        united: the vocabulary of all experts; None where they share one.

    Raises:
        CheckpointError: transformers reads the united tokenizer in another way.
        RunError: the disk is full.
    """
    with TemporaryDirectory() as folder:
        try:
            write_mixture_files(dense, config, Path(folder), united=united)
        except OSError as error:
            raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from error
        if united is not None and united.tokenizer is not None:
            # Also tokens that its files tell transformers elsewhere than in tokenizer.json keep their rows.
            of_first = load_tokenizer(dense).get_vocab()
            check_tokenizer(Path(folder), {**united.vocabulary, **of_first})
        yield Path(folder)


def make_router(
    mode: str,
    *,
    base: StateDict,
    folder: Path,
    tokenizer: Path,
    config: Mapping[str, Any],
    prompts: Sequence[ExpertPrompts],
    seed: int,
    device: str,
) -> Array:
    """The router of a mixture.

    Args:
        mode: a key of GATE_MODES.
        base: the dense model that gives attention, norms and embeddings.
        folder: a model like it, with as many rows or fewer.
        tokenizer: folder of the mixture's tokenizer.
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
        rows = int(config["vocab_size"])
        live = TransformersModel.from_folder(folder, checkpoint=base, device=device, vocabulary_size=rows)
        live.load(base)
        return live.model

    inputs = GateInputs(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        prompts=prompts,
        seed=seed,
        tokenizer=lambda: load_tokenizer(tokenizer),
        embeddings=embeddings,
        model=model,
    )
    try:
        return make_gates(mode, inputs)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the base model and its prompts do not fit on {device}: shorten them or use --device cpu"
        ) from error
