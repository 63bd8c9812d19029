"""A live model of transformers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging

from tvmerge.checkpoint import Header
from tvmerge.errors import CheckpointError, IncompatibleError, RunError
from tvmerge.models.conversion import find_live_tensors
from tvmerge.models.device import DeviceWriter
from tvmerge.state_dict import StateDict

__all__ = ["TransformersModel", "check_tokenizer", "load_tokenizer", "unread_by_all", "unread_tensors"]


def unread_tensors(checkpoint: Header) -> list[str]:
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
        model: PreTrainedModel = _auto_class(config).from_config(config, trust_remote_code=False)
    try:
        read = set(find_live_tensors(model, checkpoint).names)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return [name for name in checkpoint.names if name not in read]


def unread_by_all(models: Sequence[Header]) -> list[str]:
    """The tensors that the models hold and do not read, which the merged model is not to hold; sorted.

    Raises:
        CheckpointError: transformers does not know a model, or its configuration asks for other shapes.
        IncompatibleError: one model reads a tensor that another one holds and does not read, as a head that is tied.
    """
    unread_by = [frozenset(unread_tensors(model)) for model in models]
    for model, unread in zip(models, unread_by, strict=True):
        for other, unread_by_other in zip(models, unread_by, strict=True):
            if differ := sorted((unread - unread_by_other) & set(other.names)):
                raise IncompatibleError(
                    f"{differ[0]} is in {model.model.name} and not read by it, perhaps because it is tied to another "
                    f"tensor, but {other.model.name} reads it: all models of a merge must share one architecture"
                )
    return sorted(frozenset().union(*unread_by))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: there is none, or transformers cannot load it.
    """
    _be_quiet()
    with _explained(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_tokenizer(folder: Path, vocabulary: Mapping[str, int]) -> None:
    """Refuse a folder whose tokenizer, as transformers loads it, has other ids than its files are to say.

    Some classes of tokenizers build themselves anew from parts of the files.

    Args:
        folder: configuration and tokenizer.
        vocabulary: token → id.

    Raises:
        CheckpointError: with a token, or transformers cannot load it.
    """
    loaded = load_tokenizer(folder)
    found = loaded.get_vocab()
    for token, index in vocabulary.items():
        if found.get(token) != index:
            raise CheckpointError(
                f"{type(loaded).__name__} of transformers gives the token {token!r} the id {found.get(token)}, not "
                f"{index}: save the tokenizers of all models with transformers, or use models of one tokenizer"
            )


class TransformersModel:
    """A model and its tokenizer, whose weights are replaced in place.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the tokenizer of the same folder.
        checkpoint: how the tensors are spelled, and their shapes; its values are not read.

    Raises:
        CheckpointError: a tensor of the checkpoint has another shape than the model's configuration asks for.
        IncompatibleError: a parameter of the model is in no tensor of the checkpoint.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: StateDict) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._checkpoint = checkpoint
        self._loaded: dict[str, Hashable] = {}
        self._find_live()

    def _find_live(self) -> None:
        """Find the tensors that are to be filled, where they are now."""
        self._live = find_live_tensors(self.model, self._checkpoint)
        device = self.model.device
        self._write = None if device.type == "cpu" else DeviceWriter(device).write

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        checkpoint: StateDict,
        device: str,
        dtype: str = "auto",
        vocabulary_size: int | None = None,
    ) -> TransformersModel:
        """Load a model folder.

        Args:
            folder: configuration, tokenizer and safetensors weights.
            checkpoint: names and specs of the tensors in its files.
            device: as torch spells it.
            dtype: as torch spells it; `auto` is the dtype that loading the folder anywhere else would give.
            vocabulary_size: rows of the vocabulary tensors, to be filled by `load`; None for those of the folder.

        Raises:
            CheckpointError: transformers cannot load it, or it does not fit on the device.
            IncompatibleError: a parameter of the model is in no tensor of the checkpoint.
        """
        tokenizer = load_tokenizer(folder)
        with _explained(folder):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = _auto_class(config).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
            if vocabulary_size not in (None, model.get_input_embeddings().num_embeddings):
                model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
            model.to(torch.device(device)).eval()
        return cls(model, tokenizer, checkpoint)

    @classmethod
    def from_config(cls, folder: Path, *, state_dict: StateDict, device: str, dtype: str = "auto") -> TransformersModel:
        """Build a model that lies in no folder, as a mixture of experts, and fill it.

        Args:
            folder: configuration and tokenizer, and no weights.
            state_dict: its weights, spelled as in a checkpoint of its class.
            device: as torch spells it.
            dtype: as torch spells it; `auto` is the dtype that config.json names.

        Raises:
            CheckpointError: transformers cannot build it, or it does not fit on the device.
            IncompatibleError: a parameter of the model is in no tensor of the state dict.
        """
        tokenizer = load_tokenizer(folder)
        with _explained(folder):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            wanted = config.dtype if dtype == "auto" else dtype
            # Every parameter is filled below; to draw them all at random first would take minutes.
            with no_init_weights(), torch.device(device):
                model = _auto_class(config).from_config(config, dtype=wanted, trust_remote_code=False)
            model.tie_weights()
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
            model.to(torch.device(device)).eval()
        live = cls(model, tokenizer, state_dict)
        live.load(state_dict)
        return live

    def load(self, state_dict: StateDict) -> None:
        """Fill the model in place; a tied tensor is written once, and one that is there already not at all.

        Args:
            state_dict: all tensors of the model, spelled as in its checkpoint.

        Raises:
            RunError: values that float16, whose greatest is 65,504, cannot hold. Other dtypes are not looked at.
        """
        before = dict(self._loaded)
        with torch.no_grad():
            self._live.fill(state_dict, self._loaded, write=self._write)
            for name, view in self._live.views.items():
                if view.dtype == torch.float16 and before.get(name) != self._loaded[name] and not view.isfinite().all():
                    self.forget()
                    raise RunError(f"{name} has values that float16 cannot hold: use --dtype bfloat16 or float32")

    def move(self, device: str) -> None:
        """Put the model on another device, as it is.

        Args:
            device: as torch spells it.

        Raises:
            torch.OutOfMemoryError: it does not fit; parts of it are there.
        """
        if self.model.device != torch.device(device):
            self.model.to(torch.device(device))
            self._find_live()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def forget(self) -> None:
        """Fill everything at the next `load`: somebody else has written into the model."""
        self._loaded.clear()


#: What transformers may know a model as, from what writes text to what only computes: the first that fits is taken.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModel",
)


def _auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that builds the model of a configuration.

    Some configurations are those of a whole model and of its decoder alone, as of Llama 4. Then it is the class that
    wrote the checkpoint that counts: the decoder alone would lose all other tensors.
    """
    # Releases of transformers differ in which of them they have.
    classes = [getattr(transformers, name) for name in _AUTO_CLASSES if hasattr(transformers, name)]
    fitting = [each for each in classes if type(config) in each._model_mapping]
    for each in fitting:
        built = each._model_mapping[type(config)]
        names = [model.__name__ for model in (built if isinstance(built, (list, tuple)) else [built])]
        if each is not transformers.AutoModel and set(names) & set(config.architectures or []):
            return each
    return fitting[0] if fitting else classes[0]  # which says what it knows


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
