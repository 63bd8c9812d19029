"""Checkpoints in: a model folder as a lazy state dict over memory-mapped safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.hub import ModelId
from tvmerge.state_dict import MERGEABLE_DTYPES, TensorSpec, deliver

__all__ = ["INDEX", "SAFETENSORS_DTYPES", "SINGLE", "Checkpoint", "Header", "check_mergeable", "read_json"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

#: dtypes as the header of a safetensors file spells them.
SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
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


class Header:
    """What is known of a model before any of its weights is read.

    Args:
        model: where its configuration lies.
        specs: tensor name → shape and dtype.
    """

    def __init__(self, model: ModelId, specs: Mapping[str, TensorSpec]) -> None:
        self.model = model
        self._specs = dict(sorted(specs.items()))

    @property
    def names(self) -> Sequence[str]:
        """Tensor names, sorted."""
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype, from the header."""
        return self._specs[name]

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """What only a Checkpoint can."""
        raise RuntimeError(f"only the header of {self.model.name} is here, not {name}")

    def version(self, name: str) -> Hashable:
        """A header does not change."""
        return self, name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            CheckpointError: there is none, or it is no JSON object.
        """
        return read_json(self.model.path / "config.json")


class Checkpoint(Header):
    """A model folder as a lazy state dict, over one or many memory-mapped safetensors files.

    Opening reads and checks the headers of all files and no weight.

    Args:
        model: where the model lies.
        single: the name of its file of weights, if it has only one.

    Raises:
        CheckpointError: no safetensors weights, a missing or damaged shard, a tensor that the index places wrongly.
    """

    def __init__(self, model: ModelId, *, single: str = SINGLE) -> None:
        self._files = _open_weights(model.path, single)
        self._file_of = _locate_tensors(model.path, self._files, single)
        files = self._files
        super().__init__(model, {name: _spec(files[f], model.path / f, name) for name, f in self._file_of.items()})
        self._state = {file: self._state_of(file) for file in self._files}

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """Read one tensor; without `out` it is a view of the mapped file, which must not be changed."""
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        return deliver(tensor, out)

    def version(self, name: str) -> Hashable:
        """The same as long as `check_unchanged` finds the files unchanged."""
        return self, name

    def _state_of(self, file: str) -> tuple[int, int]:
        found = (self.model.path / file).stat()
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self) -> None:
        """Refuse weights whose files are no longer what they were when they were opened, by size or time of change.

        Raises:
            CheckpointError: with the file.
        """
        for file, state in self._state.items():
            try:
                now = self._state_of(file)
            except OSError:
                now = (0, 0)
            if now != state:
                raise CheckpointError(
                    f"{self.model.path / file}: was changed since this run opened it: put the old file back and run "
                    "again, or begin a new run with the new one"
                )

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


def _open_weights(folder: Path, single: str) -> dict[str, Any]:
    """File name → open safetensors file."""
    if (folder / single).is_file():  # as transformers does, which reads it and no index
        return {single: _open_file(folder / single)}
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
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
        return f"{folder}: is a LoRA adapter, which can be a tuned model only"
    return f"{folder}: holds neither {SINGLE} nor {INDEX}, name the folder of a model saved with safetensors"


def _locate_tensors(folder: Path, files: Mapping[str, Any], single: str) -> dict[str, str]:
    """Tensor name → file name, checked against the index if there is one."""
    found = {name: file for file, handle in files.items() for name in handle.keys()}  # noqa: SIM118 - no mapping
    if single not in files:
        weight_map: dict[str, str] = read_json(folder / INDEX)["weight_map"]
        for name, shard in weight_map.items():
            if name not in files[shard].keys():  # noqa: SIM118 - safe_open is no mapping
                raise CheckpointError(f"{folder / shard}: lacks {name}, which {INDEX} places there: fetch both again")
        return dict(weight_map)
    return found


def _spec(file: Any, path: Path, name: str) -> TensorSpec:
    view = file.get_slice(name)
    dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has the dtype {view.get_dtype()}, which cannot be merged: use the unquantized weights"
        )
    return TensorSpec(shape=tuple(view.get_shape()), dtype=dtype)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: with the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, name the folder of a whole model") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def check_mergeable(checkpoint: Header, *, name: str) -> None:
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
