"""A live model of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.state_dict import StateDict

__all__ = ["TransformersModel", "load_tokenizer", "unread_tensors"]


def unread_tensors(checkpoint: Checkpoint) -> list[str]:
    """Checkpoint tensors that the model does not hold as its own: duplicates of a tied tensor, stale buffers.

    Builds the model without memory for its weights and reads no weight.

    Raises:
        CheckpointError: transformers does not know the architecture, or its configuration asks for other shapes.
        IncompatibleError: a parameter of the model is in no tensor of the checkpoint.
    """
    _be_quiet()
    folder = checkpoint.model.path
    with _explained(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    live = _live_tensors(model, checkpoint.names)
    for name, tensor in live.items():
        shape = checkpoint.spec(name).shape
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{folder}: {name} has the shape {list(shape)}, where config.json asks for {list(tensor.shape)}: "
                "use the configuration of these weights"
            )
    return [name for name in checkpoint.names if name not in live]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: there is none, or transformers cannot load it.
    """
    _be_quiet()
    with _explained(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class TransformersModel:
    """A causal language model and its tokenizer, whose weights are replaced in place.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the tokenizer of the same folder.
        checkpoint_names: how the checkpoint spells the tensors.

    Raises:
        IncompatibleError: a parameter of the model is in no tensor of the checkpoint.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint_names: Sequence[str]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._live = _live_tensors(model, checkpoint_names)

    @classmethod
    def from_folder(cls, folder: Path, *, checkpoint_names: Sequence[str], device: str) -> TransformersModel:
        """Load a model folder, in the dtype that loading it anywhere else would give.

        Args:
            folder: configuration, tokenizer and safetensors weights.
            checkpoint_names: names of the tensors in its files.
            device: as torch spells it.

        Raises:
            CheckpointError: transformers cannot load it, or it does not fit on the device.
        """
        tokenizer = load_tokenizer(folder)
        with _explained(folder):
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
            model.to(torch.device(device)).eval()
        return cls(model, tokenizer, checkpoint_names)

    def load(self, state_dict: StateDict) -> None:
        """Fill the model in place; a tied tensor is written once.

        Args:
            state_dict: all tensors of the model, spelled as in its checkpoint.
        """
        with torch.no_grad():
            for name in state_dict.names:
                state_dict.read(name, out=self._live[name])


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what transformers raises on a folder it cannot load into one line."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())}") from error


def _be_quiet() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _live_tensors(model: PreTrainedModel, checkpoint_names: Sequence[str]) -> Mapping[str, Tensor]:
    """Checkpoint name → the model's tensor, each tensor once. transformers itself says which name becomes which."""
    # Parameters under their first name: of tied tensors that is the embedding, never the head.
    owned = dict(model.named_parameters())
    known = model.state_dict()
    live = {**owned, **{name: buffer for name, buffer in model.named_buffers() if name in known}}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found = {}
    for name in checkpoint_names:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if converter is None and renamed in live:
            found[name] = live.pop(renamed)
    unfilled = sorted(owned.keys() & live.keys())
    if unfilled:
        raise IncompatibleError(
            f"{len(unfilled)} of {len(owned)} parameters of {type(model).__name__} are no single tensor of its "
            f"checkpoint, the first is {unfilled[0]}: such an architecture is not supported yet"
        )
    return found
