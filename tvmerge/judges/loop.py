"""An event loop of its own in a thread of its own, for requests that go on while the main thread works."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["BackgroundLoop", "cancel_others"]

T = TypeVar("T")

#: How long is waited at the end. The thread is a daemon: what still hangs then does not keep the program alive.
STOP_SECONDS = 1.0


class BackgroundLoop:
    """Runs coroutines in a thread that starts with the first of them."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio keeps no strong references

    def start(self, work: Callable[[], Coroutine[Any, Any, T]], done: Callable[[asyncio.Task[T]], None]) -> None:
        """Run a coroutine; returns at once.

        Args:
            work: makes the coroutine.
            done: called in the background thread with the task that has ended, in whichever way.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(self._loop,), name="judge", daemon=True)
            self._thread.start()
        self._loop.call_soon_threadsafe(self._add, work, done)

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel all coroutines, run a last one, and end the thread; within two seconds, whatever hangs."""
        if self._loop is None or self._thread is None:
            return
        loop, self._loop = self._loop, None
        loop.call_soon_threadsafe(self._add, lambda: self._end(last), lambda _: loop.stop())
        self._thread.join(1.5 * STOP_SECONDS)

    def _add(self, work: Callable[[], Coroutine[Any, Any, T]], done: Callable[[asyncio.Task[T]], None]) -> None:
        task = asyncio.get_running_loop().create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(done)

    async def _end(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        cancelled = cancel_others()
        if cancelled:
            await asyncio.wait(cancelled, timeout=STOP_SECONDS / 2)
        # Connections that do not close in time go with the process.
        await asyncio.wait([asyncio.ensure_future(last())], timeout=STOP_SECONDS / 2)

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


def cancel_others() -> set[asyncio.Task[Any]]:
    """Cancel all tasks of the running loop but the one that calls this; returns them."""
    current = asyncio.current_task()
    others = {task for task in asyncio.all_tasks() if task is not current}
    for task in others:
        task.cancel()
    return others
