"""The parent of a worker: starts a new process whenever one dies. It imports nothing heavy.

A worker is a session of its own, so that Ctrl-C reaches it once and through its parent, and its input is a pipe that
ends with its parent, however that dies: a worker without one hands its trial back and ends too.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["follow_parent", "own_name", "supervise"]

WORKER = (sys.executable, "-m", "tvmerge", "worker")
DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
#: A process that dies sooner, in seconds, has not come far; after so many of them in a row the parent gives up.
SOON, MOST_DEATHS = 60.0, 3
#: The same for one that says why it cannot go on: each of them may have failed a trial, which takes minutes.
SOON_FAILED = 3600.0
#: In the environment of a process whose input ends when its parent does.
SUPERVISED = "TVMERGE_SUPERVISED"


def own_name() -> str:
    """What a worker is called that was given no name: two of one name would hand back each other's trials.

    Containers may share the name of their machine and the numbers of their processes.
    """
    node = re.sub(r"[^\w.-]", "-", platform.node())[:60] or "worker"
    return f"{node}-{os.getpid()}-{secrets.token_hex(3)}"


def supervise(arguments: Sequence[str], *, name: str, program: Sequence[str] = WORKER) -> int:
    """Run a worker until it ends by itself.

    Args:
        arguments: of the worker, as on the command line.
        name: what it is called.
        program: that takes them.

    Returns:
        The exit status of the last process.
    """
    command = [*program, *arguments, "--name", name, "--restart", "false"]
    deaths, is_first = 0, True
    while True:
        begun = time.monotonic()
        status = _run(command)
        # What could be opened once may be there again after a while, as a database that is started anew.
        if status in (DONE, INTERRUPTED) or (status == WRONG_INPUT and is_first):
            return status
        is_first = False
        soon = SOON_FAILED if status == FAILED else SOON
        deaths = deaths + 1 if time.monotonic() - begun < soon else 1
        if deaths >= MOST_DEATHS:
            print(f"worker {name}: died {deaths} times in a row, the last with status {status}", file=sys.stderr)
            return status if status > 0 else 128 - status
        print(f"worker {name}: died with status {status}, starting it again", file=sys.stderr)


def _run(command: Sequence[str]) -> int:
    environment = {**os.environ, SUPERVISED: "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()  # not by SIGINT, which a shell has its background jobs ignore
        try:
            process.wait()
        except KeyboardInterrupt:  # asked for twice
            process.kill()
            process.wait()
        return INTERRUPTED


def follow_parent() -> None:
    """Interrupt this process when the parent has died that supervises it, if one does."""
    if os.environ.pop(SUPERVISED, None) is not None:
        threading.Thread(target=_wait_for_end, name="parent", daemon=True).start()


def _wait_for_end() -> None:
    with suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
