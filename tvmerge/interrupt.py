"""Ctrl-C that is never lost.

A KeyboardInterrupt that is raised inside of a callback of C code, a finalizer or a thread's hook is printed and
forgotten. So it is remembered too, and a run looks whether it was asked to stop before it begins anything long.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

__all__ = ["check_interrupted", "listen", "was_interrupted"]

_asked: list[int] = []  # signals that came


def listen() -> None:
    """Let Ctrl-C, and what ends a process politely, raise KeyboardInterrupt; what is ignored, as by nohup, stays so."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _asked.append(number)
    raise KeyboardInterrupt


def check_interrupted() -> None:
    """Stop if that was asked for and got lost.

    Raises:
        KeyboardInterrupt: it was.
    """
    if was_interrupted():
        raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether a signal to end came, whatever became of it."""
    return bool(_asked)
