"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tvmerge.errors import ConfigError

__all__ = [
    "check_new",
    "check_output",
    "check_writable",
    "local_path",
    "remove_staged",
    "staged_directory",
    "write_bytes",
    "write_text",
]

#: How names of files and folders end that are being written: a number of a process, or as tempfile.mkdtemp has it.
STAGED = r"\.(\d+|[a-z0-9_]{8})\.tmp"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file beside its place, flush it to the disk and rename it there."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk and rename it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, flushed to the disk and renamed to `path` at the end; removed if anything was raised.

    Args:
        path: where the folder appears; an empty folder may be there.
        replace: whether a folder with something in it may be there, which stays until the new one is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield staging
        _finish(staging)
        if replace and path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            path.replace(old / path.name)
            try:
                staging.replace(path)
            except OSError:
                (old / path.name).replace(path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            staging.replace(path)  # over an empty folder, never over a full one
        _flush(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_staged(directory: Path, *names: str) -> None:
    """Remove what a kill left of files and folders that were being written into a folder.

    Args:
        directory: which may not be there.
        names: of these files and folders, which no other process may be writing; `*` stands for any letters.
    """
    staged = re.compile("|".join(rf"\.{re.escape(name).replace(re.escape('*'), '.+')}{STAGED}" for name in names))
    for leftover in directory.iterdir() if directory.is_dir() else ():
        if not staged.fullmatch(leftover.name):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def local_path(text: str, *, flag: str) -> Path:
    """A path as the user wrote it, with `~` expanded.

    Raises:
        ConfigError: it is empty, or `~` is of a user who is not here.
    """
    if not text.strip():
        raise ConfigError(f"{flag} is empty, name a path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{flag} {text}: {error}") from error


def check_writable(directory: Path) -> None:
    """Refuse an output folder that is a file or that cannot be written, without making it.

    Raises:
        ConfigError: with the path and what is in the way.
    """
    existing = directory
    try:
        while not existing.exists() and not existing.is_symlink() and existing != existing.parent:
            existing = existing.parent
    except OSError as error:
        raise ConfigError(f"--output_dir {directory}: {error.strerror}, name another folder") from error
    if existing.is_symlink() and not existing.exists():
        raise ConfigError(f"--output_dir {directory}: {existing} is a link to nowhere, mend it or name another folder")
    if not existing.is_dir():
        raise ConfigError(f"--output_dir {directory}: {existing} is a file, name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {directory}: no permission to write in {existing}")


def check_new(directory: Path) -> None:
    """Refuse an output folder that holds something or that cannot be written, without making it.

    Raises:
        ConfigError: with the folder.
    """
    check_writable(directory.parent)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"--output_dir {directory}: exists and is not empty, name a new folder")


def check_output(directory: Path) -> None:
    """Refuse a run's folder that cannot be written, or whose `best` is not ours to replace.

    Raises:
        ConfigError: with the folder.
    """
    check_writable(directory)
    # The study itself may be in a database elsewhere.
    if (directory / "best").exists() and not any((directory / name).exists() for name in ("study.db", "scores.jsonl")):
        raise ConfigError(f"--output_dir {directory}: holds a 'best' that no study made, name another folder")


def _finish(staging: Path) -> None:
    """Flush a staged folder to the disk, with the permissions of new files; safetensors and mkdtemp give fewer."""
    mask = os.umask(0o022)
    os.umask(mask)
    for folder, _, files in os.walk(staging, topdown=False):
        for name in sorted(files):
            path = Path(folder, name)
            path.chmod(0o666 & ~mask)
            _flush(path)
        Path(folder).chmod(0o777 & ~mask)
        _flush(Path(folder))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
