"""Checkpoints out: a lazy state dict as safetensors files, a tensor at a time, and the files beside the weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from tvmerge.checkpoint import INDEX, SAFETENSORS_DTYPES, SINGLE
from tvmerge.delta import all_finite
from tvmerge.hub import MODEL_FILES
from tvmerge.state_dict import MERGEABLE_DTYPES, Array, Dtype, StateDict

__all__ = ["NotFiniteError", "copy_model_files", "model_files", "write_config", "write_weights"]

#: Bytes that are written before they are sent to the disk.
FLUSHED = 1 << 25

_NAMES: Mapping[Dtype, str] = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class NotFiniteError(ValueError):
    """A tensor to be written holds NaN or infinity. Its only argument is the tensor's name."""


def write_weights(state_dict: StateDict, folder: Path, *, shard_bytes: int = 2_000_000_000) -> None:
    """Write a state dict as one or many safetensors files, with an index if there are many.

    Holds two tensors in memory. The same state dict gives the same bytes.

    Args:
        state_dict: what to write.
        folder: an existing folder.
        shard_bytes: a new file is begun before this size would be passed; a larger tensor gets a file of its own.

    Raises:
        NotFiniteError: a value is NaN or infinite.
        OSError: the disk is full.
    """
    shards = list(_shards(state_dict, shard_bytes))
    largest = max((state_dict.spec(name).nbytes for name in state_dict.names), default=0)
    # While one tensor is written the next is merged.
    scratch = [np.empty(largest, np.uint8) for _ in range(2)]
    weight_map = {}
    with ThreadPoolExecutor(1, thread_name_prefix="tvmerge-writer") as writer:
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_file(state_dict, names, folder / file, scratch, writer)
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


def _write_file(
    state_dict: StateDict, names: Sequence[str], path: Path, scratch: Sequence[Array], writer: Executor
) -> None:
    """Write one file: eight bytes of header length, a header of JSON, the tensors one behind the other."""
    # The widest first, so that each begins at a multiple of its elements' size.
    ordered = sorted(names, key=lambda name: (-state_dict.spec(name).dtype.itemsize, name))
    # transformers refuses a file whose metadata does not name its framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        spec = state_dict.spec(name)
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end := end + spec.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _reserve(file.fileno(), 8 + len(text) + end)
        file.write(len(text).to_bytes(8, "little") + text)
        output = _Output(file)
        writing: list[Future[None]] = []
        try:
            for n, name in enumerate(ordered):
                spec = state_dict.spec(name)
                room = scratch[n % len(scratch)][: spec.nbytes]
                if len(writing) == len(scratch):  # this room is in use
                    writing.pop(0).result()
                tensor = state_dict.array(name, out=room.view(spec.dtype).reshape(spec.shape))
                if spec.dtype in MERGEABLE_DTYPES and not all_finite(tensor):
                    raise NotFiniteError(name)
                writing.append(writer.submit(output.write, room))
        finally:
            wait(writing)
        for done in writing:
            done.result()
        output.flush()


class _Output:
    """A file that is sent to the disk as it grows."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._waiting = 0

    def write(self, values: Array) -> None:
        """Append bytes."""
        written, data = 0, values
        while written < len(data):  # one call writes at most 2 GiB
            written += self._file.write(data[written:].data)
        self._waiting += len(data)
        if self._waiting >= FLUSHED:
            self.flush()

    def flush(self) -> None:
        """Send what was written to the disk and forget it.

        The system would keep it in memory and drop the sources for it, which are still to be read. Where memory is
        fresh, as on many virtual machines, keeping it takes four times as long as writing it.
        """
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._waiting = 0


def _reserve(descriptor: int, nbytes: int) -> None:
    """Ask for a file's space before any of it is written: a full disk is known at once, and the file is in one piece.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
                raise


def model_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer and licence files of a model folder, and no weights."""
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".safetensors.index.json"))


def copy_model_files(source: Path, folder: Path) -> None:
    """Copy what `model_files` lists."""
    for path in model_files(source):
        shutil.copyfile(path, folder / path.name)


def write_config(folder: Path, *, dtype: str) -> None:
    """Say in a folder's config.json that its weights have another dtype, wherever it names one.

    Args:
        folder: with a config.json.
        dtype: as transformers spells it: `bfloat16`.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))

    def rename(part: dict[str, Any]) -> None:
        for key, value in part.items():
            if key in {"dtype", "torch_dtype"} and isinstance(value, (str, type(None))):
                part[key] = dtype
            elif isinstance(value, dict):
                rename(value)

    rename(config)
    if not config.keys() & {"dtype", "torch_dtype"}:
        config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
