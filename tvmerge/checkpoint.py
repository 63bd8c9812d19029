"""Checkpoints in: a model folder as a lazy state dict over memory-mapped safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.hub import ModelId
from tvmerge.state_dict import BFLOAT16, MERGEABLE_DTYPES, Array, Dtype, TensorSpec, WithTensors, deliver

__all__ = ["INDEX", "SAFETENSORS_DTYPES", "SINGLE", "Checkpoint", "Header", "check_mergeable", "read_json"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

#: dtypes as the header of a safetensors file spells them.
SAFETENSORS_DTYPES: Mapping[str, Dtype] = {
    "BF16": BFLOAT16,
    **{
        name: np.dtype(dtype)
        for name, dtype in (
            *(("F64", np.float64), ("F32", np.float32), ("F16", np.float16)),
            *(("I64", np.int64), ("I32", np.int32), ("I16", np.int16), ("I8", np.int8)),
            *(("U64", np.uint64), ("U32", np.uint32), ("U16", np.uint16), ("U8", np.uint8), ("BOOL", np.bool_)),
        )
    },
}


class Header(WithTensors):
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

    def array(self, name: str, *, out: Array | None = None) -> Array:
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

    @property
    def dtype(self) -> str | None:
        """The dtype that most of the floating values have, as torch spells it; None if there are none."""
        sizes: dict[str, int] = {}
        for spec in self._specs.values():
            if spec.dtype in MERGEABLE_DTYPES:
                sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.size
        return max(sorted(sizes), key=lambda name: sizes[name], default=None)

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the vocabulary tensors, by the configuration of the model or of its text part; None if untold."""
        text = self.config.get("text_config")
        size = self.config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
        return size if isinstance(size, int) else None


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
        self._files = {file: _File(model.path / file) for file in _list_weights(model.path, single)}
        self._file_of = _locate_tensors(model.path, self._files, single)
        super().__init__(model, {name: self._files[file].spec(name) for name, file in self._file_of.items()})
        # Beside the weights, what an adapter's scale and a vocabulary's rows are read from.
        others = [file for file in ("adapter_config.json", "tokenizer.json") if (model.path / file).is_file()]
        self._state = {file: self._state_of(file) for file in (*self._files, *others)}

    def array(self, name: str, *, out: Array | None = None) -> Array:
        """Read one tensor; without `out` it is a view of the mapped file.

        Raises:
            CheckpointError: the file was changed. Reading what was cut off would end the process.
        """
        self._check_file(self._file_of[name])
        return deliver(self._files[self._file_of[name]].array(name), out)

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
        for file in self._state:
            self._check_file(file)

    def _check_file(self, file: str) -> None:
        try:
            now = self._state_of(file)
        except OSError:
            now = (0, 0)
        if now != self._state[file]:
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
            digest.update(f"{name} {spec.shape} torch.{spec.dtype.name}\n".encode())
            values = self.array(name).reshape(-1).view(np.uint8)
            step = len(values) // 16
            blocks = [values] if len(values) <= 1 << 16 else [values[i * step : i * step + 4096] for i in range(16)]
            for block in blocks:
                digest.update(block.tobytes())
        return digest.hexdigest()[:16]


class _File:
    """A memory-mapped safetensors file: eight bytes of header length, a header of JSON, the tensors' bytes.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="np"):  # it checks that header and length fit
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._entries: dict[str, Any] = json.loads(file.read(length))
            self._entries.pop("__metadata__", None)
            empty = all(entry["data_offsets"][1] == 0 for entry in self._entries.values())
            self._data = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r", offset=8 + length)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}): fetch it again or save the model with safetensors"
            ) from error

    @property
    def names(self) -> Collection[str]:
        return self._entries.keys()

    def spec(self, name: str) -> TensorSpec:
        entry = self._entries[name]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{self._path}: {name} has the dtype {entry['dtype']}, which cannot be merged: "
                "use the unquantized weights"
            )
        return TensorSpec(shape=tuple(entry["shape"]), dtype=dtype)

    def array(self, name: str) -> Array:
        start, stop = self._entries[name]["data_offsets"]
        spec = self.spec(name)
        return self._data[start:stop].view(np.ndarray).view(spec.dtype).reshape(spec.shape)


def _list_weights(folder: Path, single: str) -> list[str]:
    """Names of the files that hold a model's weights."""
    if (folder / single).is_file():  # as transformers does, which reads it and no index
        return [single]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: has no weight_map, fetch the file again")
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX}: places tensors in what is no file name, fetch the file again")
        shards = sorted(set(weight_map.values()))
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
    return shards


def _no_weights(folder: Path) -> str:
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder}: holds pickled weights only, which are not loaded because a pickle can run code: "
            "save the model with safetensors"
        )
    if (folder / "adapter_model.safetensors").is_file():
        return f"{folder}: is a LoRA adapter, which can be a tuned model only"
    return f"{folder}: holds neither {SINGLE} nor {INDEX}, name the folder of a model saved with safetensors"


def _locate_tensors(folder: Path, files: Mapping[str, _File], single: str) -> dict[str, str]:
    """Tensor name → file name, checked against the index if there is one."""
    found = {name: file for file, handle in files.items() for name in handle.names}
    if single not in files:
        weight_map: dict[str, str] = read_json(folder / INDEX)["weight_map"]
        for name, shard in weight_map.items():
            if name not in files[shard].names:
                raise CheckpointError(f"{folder / shard}: lacks {name}, which {INDEX} places there: fetch both again")
        return dict(weight_map)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: with the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, name the folder of a whole model") from None
    except (OSError, ValueError, RecursionError) as error:
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
