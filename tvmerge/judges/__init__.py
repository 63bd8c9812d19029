"""Judges: an answer in, a rating from 1 to 10 or the reason why there is none. One file per provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = ["Case", "Client", "Completion", "Judge", "Judgment", "MainThreadClient", "Prompt"]


@dataclass(frozen=True)
class Case:
    """One turn of a conversation, to be judged: what was asked up to it, and what was answered."""

    questions: tuple[str, ...]  # the user's turns, the judged one last
    answers: tuple[str, ...]  # as many
    references: tuple[str, ...] | None = None  # good answers, as many; None: there are none


@dataclass(frozen=True)
class Prompt:
    """A case as a language model is asked to judge it."""

    name: str  # of the judge prompt, as FastChat's files name it
    system: str  # empty: none
    user: str


@dataclass(frozen=True)
class Judgment:
    """What a judge made of a case."""

    rating: float | None  # from 1 to 10; None: unscored, which is no rating
    reason: str | None = None  # why it is unscored, in one line
    prompt: Prompt | None = None  # what the judge was asked; None: it was not asked in words
    text: str = ""  # what it said, of several repeats the first
    ratings: tuple[float, ...] = ()  # of each repeat that was scored
    is_lost: bool = False  # unscored as requests failed, not for anything that the judge said

    @property
    def spread(self) -> float:
        """How far the repeats are apart: greatest less least."""
        return max(self.ratings) - min(self.ratings) if self.ratings else 0.0


@dataclass(frozen=True)
class Completion:
    """What a language model said, and what it took."""

    text: str
    tokens_in: int
    tokens_out: int
    refusal: str | None = None  # why it said nothing of use, in one line: it refused, or was not let
    estimated: bool = False  # the tokens are an upper bound: the server did not say


class Client(Protocol):
    """A language model that can be asked: one class per provider."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that a completion depends on but the prompt, as plain JSON values; no key."""

    @property
    def max_tokens(self) -> int:
        """How long a completion can be."""

    async def complete(self, prompt: Prompt, *, attempt: int, retries: int | None = None) -> Completion:
        """Ask once; what can be tried again is, by the client's own machinery.

        Args:
            prompt: what to ask.
            attempt: 0, or how often the same prompt may have been asked before.
            retries: how often at most a failure is tried again; None: as often as the settings say.

        Raises:
            JudgeError: there is no completion of this prompt; others may work.
            ConfigError: no request can work: the key is refused, or the model is unknown.
            RunError: no request can work from now on.
        """

    async def close(self) -> None:
        """Let connections go."""


@runtime_checkable
class MainThreadClient(Client, Protocol):
    """A client that works in the thread that waits for it, not in the background."""

    def serve(self, done: Callable[[], bool]) -> None:
        """Work on what is asked until `done` is true; called by `Judge.finish`."""


class Judge(Protocol):
    """Rates answers."""

    @property
    def name(self) -> str:
        """As the files of judgments name it."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that a rating depends on but the case, as plain JSON values."""

    def submit(self, case: Case) -> Future[Judgment]:
        """Begin to judge a case, while others are under way; the future raises only what ends the run."""

    def finish(self) -> None:
        """Bring every case that was submitted to its judgment; returns when all futures are done."""

    def close(self) -> None:
        """Give up what is under way."""
