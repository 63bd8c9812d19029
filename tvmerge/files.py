"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tvmerge.errors import ConfigError

__all__ = ["check_writable", "staged_directory", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file beside its place, flush it to the disk and rename it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `path` at the end; removed if anything was raised.

    A folder that was at `path` before stays until the new one is complete.
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield staging
        _open_up(staging)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            path.replace(old / path.name)
            staging.replace(path)
            shutil.rmtree(old)
        else:
            staging.replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_writable(directory: Path) -> None:
    """Refuse an output folder that is a file or that cannot be written, without making it.

    Raises:
        ConfigError: with the path and what is in the way.
    """
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"--output_dir {directory}: {existing} is a file, name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {directory}: no permission to write in {existing}")


def _open_up(staging: Path) -> None:
    """Give a staged folder and its files the permissions that new ones have; safetensors and mkdtemp give fewer."""
    mask = os.umask(0o022)
    os.umask(mask)
    staging.chmod(0o777 & ~mask)
    for path in staging.iterdir():
        path.chmod(0o666 & ~mask)
