"""A judge on this machine: a model of transformers, beside the candidate or in turns with it, as memory allows."""

from __future__ import annotations

import asyncio
import hashlib
import json
import queue
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import ConfigError, StopError, TvmergeError
from tvmerge.hub import resolve
from tvmerge.judges import Completion, Prompt
from tvmerge.models.chat import ChatAnswer, ChatModel, ChatRequest
from tvmerge.models.chat_template import open_template
from tvmerge.models.transformers import TransformersModel, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LOCAL", "LocalClient"]

#: How a judge's name begins that is a model on this machine.
LOCAL = "transformers:"
#: Seconds without another request after which a batch is answered.
QUIET_SECONDS = 0.02
#: The temperature at which a greedy judge is asked again: its words would be the same.
AGAIN_TEMPERATURE = 0.7
#: Beside each other two models need room for what they compute.
ROOM = 0.1

_Asked = tuple[Prompt, int, "asyncio.Future[Completion]"]


class LocalClient:
    """Answers in the thread that waits for the answers, as a GPU is best used by one.

    The model is loaded when it is first needed, once.

    Args:
        name: a folder or Hub id, also id@revision.
        cache_dir: where models of the Hub are kept.
        device: as torch spells it.
        max_tokens: of an answer.
        temperature: of answers; 0: greedy.
        batch_size: requests at a time.

    Raises:
        CheckpointError: it cannot be found or read.
        ConfigError: it has no chat template.
    """

    def __init__(
        self,
        name: str,
        *,
        cache_dir: str | None,
        device: str,
        max_tokens: int,
        temperature: float,
        batch_size: int | str,
    ) -> None:
        if not name.strip():
            raise ConfigError(f"--judge_model_name {LOCAL}: names no model")
        self._checkpoint = Checkpoint(resolve(name, cache_dir=cache_dir))
        folder = self._checkpoint.model.path
        tokenizer = load_tokenizer(folder)
        # Those that end a turn are often in no role, such as that of the end of a text, and special all the same.
        marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        marks = sorted(mark for mark in marked | set(tokenizer.all_special_tokens) if len(mark) > 1)
        #: What would end a turn if an answer could write it.
        self._control = re.compile("|".join(f"(?<={re.escape(m[0])})(?={re.escape(m[1:])})" for m in marks) or "(?!)")
        try:
            self._template = open_template(None, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"--judge_model_name {LOCAL}{name}: the judge has no chat template") from error
        self._device, self._batch_size = device, batch_size
        self._max_tokens, self._temperature = max_tokens, temperature
        self._identity = {
            "provider": "transformers",
            "weights": self._checkpoint.fingerprint,
            "template": self._template.digest,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        self._waiting: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._model: TransformersModel | None = None
        self._chat: ChatModel | None = None
        self._candidate: TransformersModel | None = None
        #: Whether the judge and the candidate take turns on the device.
        self.takes_turns = False

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that a completion depends on but the prompt."""
        return self._identity

    @property
    def max_tokens(self) -> int:
        """How long a completion can be."""
        return self._max_tokens

    def attach(self, candidate: TransformersModel) -> None:
        """Share the device with the model whose answers are judged."""
        self._candidate = candidate

    @property
    def notes(self) -> list[str]:
        """What the user should know of how it answers; there may be more after each trial."""
        return [] if self._chat is None else [f"the judge: {note}" for note in self._chat.notes]

    async def complete(self, prompt: Prompt, *, attempt: int, retries: int | None = None) -> Completion:
        """Wait until `serve` has answered.

        Args:
            prompt: what to ask.
            attempt: other ones than 0 are answered in other words.
            retries: of no account here.
        """
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.put((prompt, attempt, future))
        return await future

    async def close(self) -> None:
        """Nothing is open."""

    def serve(self, done: Callable[[], bool]) -> None:
        """Answer what is asked, in batches, until `done` is true.

        Raises:
            StopError: the judge does not fit in memory even alone.
            CheckpointError: it cannot be loaded.
        """
        while not done():
            if batch := self._batch():
                try:
                    with self._in_place() as chat:
                        self._answer(chat, batch)
                except Exception as error:
                    failure = error if isinstance(error, TvmergeError) else _stop(error)
                    for _, _, future in batch:  # nobody is to wait for what will not come
                        _resolve(future, error=failure)
                    raise failure from error

    def _answer(self, chat: ChatModel, batch: Sequence[_Asked]) -> None:
        requests = [self._request(prompt, attempt) for prompt, attempt, _ in batch]

        def tell(index: int, answer: ChatAnswer) -> None:
            refusal = answer.reason if answer.text is None else None if answer.text else "the judge's text is empty"
            completion = Completion(answer.text or "", answer.n_prompt, answer.n_tokens, refusal=refusal)
            _resolve(batch[index][2], result=completion)

        chat.answer(requests, tell)

    def _batch(self) -> list[_Asked]:
        """All that is asked until nothing more comes; a batch's composition does not change what is answered."""
        batch: list[_Asked] = []
        try:
            while True:
                batch.append(self._waiting.get(timeout=QUIET_SECONDS))
        except queue.Empty:
            return batch

    def _request(self, prompt: Prompt, attempt: int) -> ChatRequest:
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        messages.append({"role": "user", "content": self._control.sub(" ", prompt.user)})
        temperature = max(self._temperature, AGAIN_TEMPERATURE) if attempt else self._temperature
        digest = hashlib.sha256(json.dumps([prompt.system, prompt.user, attempt]).encode()).digest()
        return ChatRequest(messages=messages, temperature=temperature, seed=int.from_bytes(digest[:8], "big"))

    @contextmanager
    def _in_place(self) -> Iterator[ChatModel]:
        """The judge on the device, and the candidate back on it afterwards."""
        if self._model is None:
            self._load()
        assert self._model is not None
        if not self.takes_turns:
            yield self._ready()
            return
        candidate = self._candidate
        assert candidate is not None, "only a candidate can be in the way"
        candidate.move("cpu")
        try:
            try:
                self._model.move(self._device)
            except torch.OutOfMemoryError as error:
                raise StopError(f"the judge does not fit on {self._device}, even without the candidate") from error
            yield self._ready()
        finally:
            self._model.move("cpu")
            candidate.move(self._device)

    def _load(self) -> None:
        """Load the judge into main memory, and beside the candidate if there is room for both."""
        folder = self._checkpoint.model.path
        self._model = TransformersModel.from_folder(folder, checkpoint=self._checkpoint, device="cpu")
        if torch.device(self._device).type == "cpu":
            return
        try:
            self._model.move(self._device)
            self.takes_turns = self._candidate is not None and not _has_room(self._device)
        except torch.OutOfMemoryError:
            self.takes_turns = self._candidate is not None
            if not self.takes_turns:
                raise StopError(f"the judge does not fit on {self._device}") from None
        if self.takes_turns:
            self._model.move("cpu")

    def _ready(self) -> ChatModel:
        if self._chat is None:
            assert self._model is not None
            self._chat = ChatModel(
                self._model,
                template=self._template,
                max_new_tokens=self._max_tokens,
                batch_size="auto" if isinstance(self._batch_size, str) else self._batch_size,
            )
        return self._chat


def _resolve(
    future: asyncio.Future[Completion], *, result: Completion | None = None, error: Exception | None = None
) -> None:
    """Hand an answer, or why there is none, to the thread that waits for it."""

    def resolve() -> None:
        if future.done():  # given up meanwhile
            return
        if result is None:
            future.set_exception(error or RuntimeError("no answer"))
        else:
            future.set_result(result)

    future.get_loop().call_soon_threadsafe(resolve)


def _stop(error: Exception) -> StopError:
    return StopError(f"the judge on this machine failed: {type(error).__name__}: {' '.join(str(error).split())}")


def _has_room(device: str) -> bool:
    """Whether what two models compute has room beside their weights."""
    if torch.device(device).type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    return free >= ROOM * total
