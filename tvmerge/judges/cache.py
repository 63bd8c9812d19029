"""Completions that were paid for, kept by what was asked; shared by runs, processes and threads."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvmerge.errors import ConfigError, RunError
from tvmerge.judges import Completion, Prompt

__all__ = ["JudgmentCache", "cache_key"]

BUSY_SECONDS = 60.0
#: In the file's header: the bytes of "tvmj". A file of another program is left alone.
APPLICATION_ID = 0x74766D6A
TABLE = """
CREATE TABLE IF NOT EXISTS completions (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL,
    refusal TEXT, estimated INTEGER NOT NULL, time REAL NOT NULL
)
"""


def cache_key(client: Mapping[str, Any], prompt: Prompt, *, repeat: int, attempt: int) -> str:
    """What one request is known by.

    Args:
        client: the client's identity: provider, model and parameters.
        prompt: what is asked; its name does not matter.
        repeat: 0 for the first time that the judge is asked for a rating of a case, and so on.
        attempt: 0, or 1 if the text of the first had no rating.

    Returns:
        SHA-256, in hexadecimal digits.
    """
    asked = {
        "client": dict(client),
        "system": prompt.system,
        "user": prompt.user,
        "repeat": repeat,
        "attempt": attempt,
    }
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))  # ASCII, so a lone surrogate has bytes too
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


class JudgmentCache:
    """An SQLite file of completions. Of two that are put under one key the first stays.

    Args:
        path: the file; it and its folders are made.

    Raises:
        ConfigError: the file is no cache of completions, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # sqlite3 objects are for one thread at a time
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the cache of judgments {path}: {error.strerror}, name another --cache_dir") from error
        try:
            self._file = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise ConfigError(f"the cache of judgments {path}: {error}, name another --cache_dir") from error
        try:
            self._prepare()
        except (sqlite3.Error, ConfigError) as error:
            self._file.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the cache of judgments {path}: {error}, name another --cache_dir") from error

    def get(self, key: str) -> Completion | None:
        """What was completed under a key; None: nothing.

        Raises:
            RunError: the file cannot be read.
        """
        query = "SELECT text, tokens_in, tokens_out, refusal, estimated FROM completions WHERE key = ?"
        try:
            with self._lock:
                row = self._file.execute(query, (key,)).fetchone()
        except sqlite3.Error as error:
            raise RunError(f"the cache of judgments {self.path} cannot be read: {error}") from error
        if row is None:
            return None
        text, tokens_in, tokens_out, refusal, estimated = row
        return Completion(text, tokens_in, tokens_out, refusal=refusal, estimated=bool(estimated))

    def put(self, key: str, completion: Completion) -> None:
        """Keep a completion.

        Raises:
            RunError: the file cannot be written.
        """
        row = (
            *(key, completion.text, completion.tokens_in, completion.tokens_out),
            *(completion.refusal, int(completion.estimated), time.time()),
        )
        try:
            with self._lock:
                self._file.execute("INSERT OR IGNORE INTO completions VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise RunError(
                f"the cache of judgments {self.path} cannot be written: {error}; make it writable or free some space, "
                "and the same command goes on"
            ) from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _prepare(self) -> None:
        self._write_ahead()
        self._file.execute("PRAGMA synchronous = NORMAL")
        self._file.execute("BEGIN IMMEDIATE")  # another process may be making the same file
        try:
            made_by = self._file.execute("PRAGMA application_id").fetchone()[0]
            empty = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            if made_by != APPLICATION_ID and not empty:
                raise ConfigError(f"the cache of judgments {self.path} is the database of another program")
            self._file.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._file.execute(TABLE)
        except (sqlite3.Error, ConfigError):
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")

    def _write_ahead(self) -> None:
        """Readers do not wait for a writer. SQLite does not wait by itself when two processes change to this mode."""
        end = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._file.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.02)
