"""A judge that is a language model: asked in words, its rating read from its text."""

from __future__ import annotations

import asyncio
import functools
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tvmerge.errors import BudgetError, ConfigError, JudgeError, RunError, TvmergeError
from tvmerge.judges import Case, Client, Completion, Judgment, MainThreadClient, Prompt
from tvmerge.judges.cache import JudgmentCache, cache_key
from tvmerge.judges.loop import BackgroundLoop, cancel_others
from tvmerge.judges.meter import Meter, Reservation

__all__ = ["PromptedJudge"]

CHECK_PROMPT = Prompt(name="check", system="", user="Reply with [[1]] and with nothing else.")
#: One, so that a server that is not there is found out at once, and one lost connection is no reason to stop.
CHECK_RETRIES = 1
CHECK_SECONDS = 180.0
#: How long finish waits at a time, so that Ctrl-C comes through.
WAIT_SECONDS = 0.1
#: How often it is looked whether money that was set aside has come free.
BUDGET_SECONDS = 0.02
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class _Repeat:
    """What came of asking for one rating."""

    rating: float | None
    reason: str | None
    text: str
    is_lost: bool = False  # the request failed


class PromptedJudge:
    """Asks a client to rate cases, many at a time, in the background.

    A completion is taken from the cache if there is one, and two equal requests at the same time are one. A case whose
    request fails is unscored. What makes every request fail ends the run: each future then raises the same error.

    Args:
        client: the language model.
        name: as the files of judgments name the judge.
        identity: everything that a rating depends on but the case and the client: judge prompts, repeats.
        render: a case → what is asked.
        read_rating: the judge's text → its rating; None: there is none in it.
        meter: counts what it costs.
        cache: of completions; None: none.
        parallel: requests at a time.
        deadline: seconds for one request with all its retries and the waits between them.
        repeats: how often a case is rated; the rating is the median.

    Raises:
        ConfigError: a number that cannot work.
    """

    def __init__(
        self,
        *,
        client: Client,
        name: str,
        identity: Mapping[str, Any],
        render: Callable[[Case], Prompt],
        read_rating: Callable[[str], float | None],
        meter: Meter,
        cache: JudgmentCache | None = None,
        parallel: int = 8,
        deadline: float = 600.0,
        repeats: int = 1,
    ) -> None:
        if parallel < 1 or repeats < 1 or not deadline > 0:
            raise ConfigError(
                f"a judge needs 1 or more requests at a time ({parallel}), 1 or more repeats ({repeats}) and a "
                f"deadline above 0 seconds ({deadline})"
            )
        self._client, self._name, self._identity = client, name, identity
        self._render, self._read_rating = render, read_rating
        self._meter, self._cache = meter, cache
        self._deadline, self._repeats = deadline, repeats
        self._slots = asyncio.Semaphore(parallel)
        self._asked: dict[str, asyncio.Task[Completion]] = {}  # under way, by cache key
        #: What was refused in this process. The next one asks again: a judge may have been out of sorts.
        self._refused: dict[str, Completion] = {}
        self._loop = BackgroundLoop()
        self._changed = threading.Condition()
        self._open: set[Future[Any]] = set()
        self._failure: TvmergeError | None = None  # why no request is made any more
        self._cancelled = False  # what was under way when it failed

    @property
    def name(self) -> str:
        """As the files of judgments name it."""
        return self._name

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that a rating depends on but the case, as plain JSON values."""
        return {**self._identity, "client": dict(self._client.identity), "repeats": self._repeats}

    def check(self) -> None:
        """Ask something tiny, so that what cannot work is known before models are loaded.

        Nothing is asked if the budget does not allow for it: there may be no need to, with a full cache.

        Raises:
            ConfigError: what does not work, where, and what to do.
        """
        future: Future[None] = self._start(self._ask_tiny)
        self._wait(future.done)
        try:
            future.result()
        except BudgetError:
            self._failure, self._cancelled = None, False
        except ConfigError:
            raise
        except RunError as error:
            raise ConfigError(
                f"the judge {self._name} cannot be asked: {error}; mend this or name another judge"
            ) from None

    def submit(self, case: Case) -> Future[Judgment]:
        """Begin to judge a case, while others are under way.

        Args:
            case: what was asked and answered.

        Returns:
            a future that raises only what ends the run.
        """
        return self._start(functools.partial(self._judge, case, self._meter.name))

    def finish(self) -> None:
        """Bring every case that was submitted to its judgment; returns when all futures are done."""
        self._wait(lambda: not self._open)

    def close(self) -> None:
        """Give up what is under way, and let connections go; within two seconds."""
        with self._changed:
            self._failure = self._failure or RunError("the judge was closed before it had rated everything")
            self._cancelled = True  # by the loop, which ends with a task of its own
        self._loop.stop(self._client.close)
        for future in list(self._open):  # of tasks that did not end when cancelled
            self._resolve(future, error=self._failure)

    def _start(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # what is begun is not cancelled by one who waits
        with self._changed:
            if self._failure is not None:
                future.set_exception(_again(self._failure))
            else:
                self._open.add(future)
                self._loop.start(work, functools.partial(self._end, future))
        return future

    def _end(self, future: Future[Any], task: asyncio.Task[Any]) -> None:
        """A task has ended: hand its result on, or stop everything."""
        if task.cancelled():
            self._resolve(future, error=self._failure or RunError("the judge was stopped"))
        elif (error := task.exception()) is None:
            self._resolve(future, result=task.result())
        else:
            self._failure = self._failure or _as_ours(error)
            if not self._cancelled:
                self._cancelled = True
                cancel_others()
            self._resolve(future, error=self._failure)

    def _resolve(self, future: Future[Any], *, result: Any = None, error: TvmergeError | None = None) -> None:
        with self._changed:
            if future not in self._open:
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(_again(error))
            self._open.discard(future)
            self._changed.notify_all()

    def _wait(self, done: Callable[[], bool]) -> None:
        if isinstance(self._client, MainThreadClient):
            self._client.serve(done)
        with self._changed:
            while not done():
                self._changed.wait(WAIT_SECONDS)

    async def _ask_tiny(self) -> None:
        reservation = await self._reserve(CHECK_PROMPT, "")
        seconds = min(CHECK_SECONDS, self._deadline)
        await self._complete(CHECK_PROMPT, reservation, seconds=seconds, attempt=0, retries=CHECK_RETRIES)

    async def _judge(self, case: Case, model: str) -> Judgment:
        prompt = self._render(case)
        repeats = await asyncio.gather(*(self._rate(prompt, repeat, model) for repeat in range(self._repeats)))
        return _judgment(prompt, repeats)

    async def _rate(self, prompt: Prompt, repeat: int, model: str) -> _Repeat:
        text = ""
        for attempt in range(2):
            try:
                completion = await self._ask(prompt, repeat, attempt, model)
            except JudgeError as error:
                return _Repeat(None, str(error), text, is_lost=True)
            text = completion.text
            if completion.refusal is not None:
                return _Repeat(None, completion.refusal, text)
            rating = self._read_rating(text)
            if rating is not None:
                return _Repeat(rating, None, text)
        end = " ".join(text.split())
        shown = end if len(end) <= SHOWN_CHARACTERS else f"…{end[-SHOWN_CHARACTERS:]}"
        return _Repeat(None, f"no rating in the judge's text, asked twice: '{shown}'", text)

    async def _ask(self, prompt: Prompt, repeat: int, attempt: int, model: str) -> Completion:
        """The completion of one request, which is made once however many wait for it."""
        key = cache_key(self._client.identity, prompt, repeat=repeat, attempt=attempt)
        task = self._asked.get(key)
        if task is None:
            task = asyncio.ensure_future(self._fetch(key, prompt, 2 * repeat + attempt, model))
            self._asked[key] = task
            task.add_done_callback(lambda _: self._asked.pop(key, None))
        return await task

    async def _fetch(self, key: str, prompt: Prompt, attempt: int, model: str) -> Completion:
        known = self._refused.get(key) or (self._cache.get(key) if self._cache is not None else None)
        if known is not None:
            return known
        async with self._slots:
            if self._failure is not None:
                raise _again(self._failure)
            try:
                reservation = await self._reserve(prompt, model)
                completion = await self._complete(prompt, reservation, seconds=self._deadline, attempt=attempt)
                if completion.refusal is not None:
                    self._refused[key] = completion
                elif self._cache is not None:
                    self._cache.put(key, completion)
            except JudgeError:
                raise
            except TvmergeError as error:  # known before the next one takes the slot: it would ask in vain
                self._failure = self._failure or error
                raise
        return completion

    async def _reserve(self, prompt: Prompt, model: str) -> Reservation:
        while True:
            if self._failure is not None:  # while it waited: it would be asked and paid for in vain
                raise _again(self._failure)
            reservation = self._meter.reserve(prompt, self._client.max_tokens, name=model)
            if reservation is not None:
                return reservation
            await asyncio.sleep(BUDGET_SECONDS)  # other judges, with loops of their own, may share the meter

    async def _complete(
        self, prompt: Prompt, reservation: Reservation, *, seconds: float, attempt: int, retries: int | None = None
    ) -> Completion:
        try:
            request = self._client.complete(prompt, attempt=attempt, retries=retries)
            completion = await asyncio.wait_for(request, seconds)
            self._meter.settle(reservation, completion)
            return completion
        except asyncio.TimeoutError:
            raise JudgeError(f"no reply within {seconds:g} seconds, retries included") from None
        finally:
            self._meter.release(reservation)


def _judgment(prompt: Prompt, repeats: Sequence[_Repeat]) -> Judgment:
    ratings = tuple(each.rating for each in repeats if each.rating is not None)
    text = repeats[0].text
    if 2 * len(ratings) > len(repeats):
        return Judgment(rating=statistics.median(ratings), prompt=prompt, text=text, ratings=ratings)
    reason = next(each.reason for each in repeats if each.rating is None)
    is_lost = any(each.is_lost for each in repeats)
    if len(repeats) > 1:
        reason = f"{len(repeats) - len(ratings)} of {len(repeats)} repeats are unscored, the first: {reason}"
    return Judgment(None, reason, prompt=prompt, text=text, ratings=ratings, is_lost=is_lost)


def _as_ours(error: BaseException) -> TvmergeError:
    """An error that ends the run."""
    if isinstance(error, TvmergeError):
        return error
    ours = RunError(f"the judge failed: {type(error).__name__}: {' '.join(str(error).split())}")
    ours.__cause__ = error
    return ours


def _again(error: TvmergeError) -> TvmergeError:
    """The same error for another to raise: an exception that is raised twice mixes up two tracebacks."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
