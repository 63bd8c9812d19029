"""The parent of a worker: starts a new process whenever one dies. It imports nothing heavy."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

__all__ = ["supervise"]

#: Exit statuses after which nothing is tried again: done, wrong input, interrupted.
FINAL = frozenset({0, 2, 130})
#: A process that dies sooner, in seconds, has not come far; after so many of them in a row the parent gives up.
SOON, MOST_DEATHS = 60.0, 3


def supervise(arguments: Sequence[str], *, name: str | None) -> int:
    """Run a worker until it ends by itself.

    Args:
        arguments: of the worker, as on the command line.
        name: what it is called; None: of this machine and process.

    Returns:
        The exit status of the last process.
    """
    name = name or f"{platform.node()}-{os.getpid()}"
    command = [sys.executable, "-m", "tvmerge", "worker", *arguments, "--name", name, "--restart", "false"]
    deaths = 0
    while True:
        begun = time.monotonic()
        status = _run(command)
        if status in FINAL:
            return status
        deaths = deaths + 1 if time.monotonic() - begun < SOON else 1
        if deaths >= MOST_DEATHS:
            print(f"worker {name}: died {deaths} times in a row, the last with status {status}", file=sys.stderr)
            return status if status > 0 else 128 - status
        print(f"worker {name}: died with status {status}, starting it again", file=sys.stderr)


def _run(command: Sequence[str]) -> int:
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
