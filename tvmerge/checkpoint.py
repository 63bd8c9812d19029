"""Checkpoints: a local folder or a Hub id as a lazy state dict, and a writer of sharded safetensors."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.state_dict import MERGEABLE_DTYPES, StateDict, TensorSpec, deliver

__all__ = [
    "Checkpoint",
    "ModelId",
    "check_mergeable",
    "check_same_vocabulary",
    "copy_model_files",
    "model_files",
    "resolve",
    "write_weights",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Files of a model folder that go into a merged one: configuration, tokenizer, licence; never weights or a README.
MODEL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")


@dataclass(frozen=True)
class ModelId:
    """A model as the user named it, and where it lies."""

    name: str  # a folder or a Hub id, without the revision
    revision: str | None  # the resolved commit of a Hub model; None for a local folder
    path: Path  # the local folder


def resolve(name: str, *, cache_dir: str | None = None) -> ModelId:
    """Find a model: a local folder, else a Hub id that is downloaded (or found in the cache).

    Args:
        name: a folder, or `owner/model`, or `owner/model@revision` where the revision is a branch, a tag or a commit.
        cache_dir: the Hub cache; None means the default one.

    Raises:
        CheckpointError: neither a folder nor a model of the Hub.
    """
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, or of a user who is not here
        raise CheckpointError(f"model {name}: no such folder ({error})") from error
    if is_folder:
        return ModelId(name=name, revision=None, path=path)
    if is_file:
        raise CheckpointError(f"model {name}: is a file, name the folder it lies in")
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise CheckpointError(f"model {name}: no such folder, and not of the form owner/model or owner/model@revision")
    return _download(name, repo=match["repo"], revision=match["revision"], cache_dir=cache_dir)


def _download(name: str, *, repo: str, revision: str | None, cache_dir: str | None) -> ModelId:
    from huggingface_hub import snapshot_download

    # HTTPError is that of the HTTP library, which differs between versions of huggingface_hub.
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    patterns = [*MODEL_FILES, "*.safetensors"]
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "consolidated*"],  # the same weights again, in another format
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"model {name}: {_why_not(error, repo=repo, revision=revision)}") from error
    # huggingface_hub lays a snapshot out as .../snapshots/<commit>.
    return ModelId(name=repo, revision=Path(folder).name, path=Path(folder))


def _why_not(error: Exception, *, repo: str, revision: str | None) -> str:
    """One line for what huggingface_hub says in many, or says wrongly: a missing model is a bad password to it."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "no such folder, and the Hub cannot be reached to look for it there: "
            "mend the path, or try again with a network"
        )
    if isinstance(error, errors.GatedRepoError):  # is a RepositoryNotFoundError too
        return f"is gated on the Hub: ask for access on the page of {repo} there, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, and no such model on the Hub: mend the name, or run `hf auth login` if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} on the Hub has no branch, tag or commit {revision or 'main'}"
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, errors.HFValidationError):
        return f"no such folder, and no Hub id: {reason}"
    return f"no such folder, and fetching it from the Hub failed, try again: {reason}"


class Checkpoint:
    """A model folder as a lazy state dict, over one or many memory-mapped safetensors files.

    Opening reads and checks the headers of all files and no weight.

    Args:
        model: where the model lies.

    Raises:
        CheckpointError: no safetensors weights, a missing or damaged shard, a tensor that the index places wrongly.
    """

    def __init__(self, model: ModelId) -> None:
        self.model = model
        self._files = _open_weights(model.path)
        self._file_of = _locate_tensors(model.path, self._files)
        self._specs = {
            name: _spec(self._files[file], model.path / file, name) for name, file in sorted(self._file_of.items())
        }

    @property
    def names(self) -> Sequence[str]:
        """Tensor names, sorted."""
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype, from the header."""
        return self._specs[name]

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """Read one tensor; without `out` it is a view of the mapped file, which must not be changed."""
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        return deliver(tensor, out)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            CheckpointError: there is none, or it is no JSON object.
        """
        return _read_json(self.model.path / "config.json")

    @cached_property
    def fingerprint(self) -> str:
        """A digest that differs when a tensor was trained further, wherever its files lie.

        Of each tensor's name, shape and dtype, and of all its bytes up to 64 KiB, or of 16 blocks of 4 KiB: reading all
        of a 7 B model at every start would take half a minute.
        """
        digest = hashlib.sha256()
        for name, spec in self._specs.items():
            digest.update(f"{name} {spec.shape} {spec.dtype}\n".encode())
            values = self.read(name).reshape(-1).view(torch.uint8)
            step = len(values) // 16
            blocks = [values] if len(values) <= 1 << 16 else [values[i * step : i * step + 4096] for i in range(16)]
            for block in blocks:
                digest.update(block.numpy().tobytes())
        return digest.hexdigest()[:16]


def _open_weights(folder: Path) -> dict[str, Any]:
    """File name → open safetensors file."""
    if (folder / SINGLE).is_file():  # as transformers does, which reads it and no index
        return {SINGLE: _open_file(folder / SINGLE)}
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: has no weight_map, fetch the file again")
        shards = sorted(set(map(str, weight_map.values())))
    else:
        raise CheckpointError(_no_weights(folder))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{folder / INDEX}: names {outside[0]!r}, which is not a file beside it")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards missing, the first is {missing[0]}: "
            "finish the download or the copy"
        )
    return {shard: _open_file(folder / shard) for shard in shards}


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}): fetch it again or save the model with safetensors"
        ) from error


def _no_weights(folder: Path) -> str:
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder}: holds pickled weights only, which are not loaded because a pickle can run code: "
            "save the model with safetensors"
        )
    if (folder / "adapter_model.safetensors").is_file():
        return f"{folder}: is a LoRA adapter, merge it into its base model first"
    return f"{folder}: holds neither {SINGLE} nor {INDEX}, name the folder of a model saved with safetensors"


def _locate_tensors(folder: Path, files: Mapping[str, Any]) -> dict[str, str]:
    """Tensor name → file name, checked against the index if there is one."""
    found = {name: file for file, handle in files.items() for name in handle.keys()}  # noqa: SIM118 - no mapping
    if SINGLE not in files:
        weight_map: dict[str, str] = _read_json(folder / INDEX)["weight_map"]
        for name, shard in weight_map.items():
            if name not in files[shard].keys():  # noqa: SIM118 - safe_open is no mapping
                raise CheckpointError(f"{folder / shard}: lacks {name}, which {INDEX} places there: fetch both again")
        return dict(weight_map)
    return found


def _spec(file: Any, path: Path, name: str) -> TensorSpec:
    view = file.get_slice(name)
    dtype = _DTYPES.get(view.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has the dtype {view.get_dtype()}, which cannot be merged: use the unquantized weights"
        )
    return TensorSpec(shape=tuple(view.get_shape()), dtype=dtype)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, name the folder of a whole model") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def check_same_vocabulary(reference: Checkpoint, other: Checkpoint, *, reference_name: str, other_name: str) -> None:
    """Refuse two models whose tokenizers give different ids to tokens, where both ship a tokenizer.json.

    Only the model's own vocabulary counts: a chat format may rename added tokens.

    Raises:
        IncompatibleError: with the number of tokens that differ.
    """
    ours, theirs = _vocabulary(reference.model.path), _vocabulary(other.model.path)
    if ours is None or theirs is None:
        return
    moved = sorted(token for token, index in ours.items() if theirs.get(token, index) != index)
    only_ours, only_theirs = len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())
    if moved or only_ours or only_theirs:
        raise IncompatibleError(
            f"the vocabularies of {reference_name} and {other_name} differ: {only_ours} tokens only in the former, "
            f"{only_theirs} only in the latter, {len(moved)} with another id: use models of one tokenizer"
        )


def _vocabulary(folder: Path) -> dict[str, int] | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    vocabulary = _read_json(path).get("model", {}).get("vocab")
    if isinstance(vocabulary, list):  # a unigram model: [token, score] pairs, in the order of their ids
        return {str(entry[0]): index for index, entry in enumerate(vocabulary)}
    return vocabulary if isinstance(vocabulary, dict) else None


def write_weights(state_dict: StateDict, folder: Path, *, shard_bytes: int = 2_000_000_000) -> None:
    """Write a state dict as one or many safetensors files, with an index if there are many.

    Holds one shard in memory. The same state dict gives the same bytes.

    Args:
        state_dict: what to write.
        folder: an existing folder.
        shard_bytes: a new file is begun before this size would be passed; a larger tensor gets a file of its own.
    """
    shards = list(_shards(state_dict, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # transformers refuses a file whose metadata does not name its framework.
        tensors = {name: state_dict.read(name).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(state_dict.spec(name).nbytes for name in state_dict.names)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(state_dict: StateDict, shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name in state_dict.names:
        nbytes = state_dict.spec(name).nbytes
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    yield shard


def model_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer and licence files of a model folder, and no weights."""
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".safetensors.index.json"))


def copy_model_files(source: Path, folder: Path) -> None:
    """Copy what `model_files` lists."""
    for path in model_files(source):
        shutil.copyfile(path, folder / path.name)


def check_mergeable(checkpoint: Checkpoint, *, name: str) -> None:
    """Refuse a model that cannot be merged whatever the others are.

    Raises:
        IncompatibleError: quantized weights, or no floating-point tensor at all.
    """
    quantization = checkpoint.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "some method") if isinstance(quantization, dict) else quantization
        raise IncompatibleError(f"{name} is quantized ({method}): use its original weights")
    if not any(checkpoint.spec(tensor).dtype in MERGEABLE_DTYPES for tensor in checkpoint.names):
        raise IncompatibleError(f"{name} holds no floating-point tensor: name a model folder")
