"""What the clients of remote language models share: settings, keys, and one line for whatever goes wrong.

A key is read from the environment, handed to the provider's client and kept nowhere else than for `redact`: a server
may send it back, in an error or in an answer.
"""

from __future__ import annotations

import html
import importlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from tvmerge.errors import ConfigError, JudgeError, RunError, TvmergeError
from tvmerge.judges import Completion, Prompt

__all__ = ["ClientSettings", "RemoteClient", "field", "text_bytes"]

#: Local servers ask for no key, and the providers' clients for any.
NO_KEY = "none"
#: Shorter ones are words of those who run a local server, such as EMPTY, not secrets.
SECRET_LENGTH = 8
#: A host that does not answer at all is given up sooner than one that thinks.
CONNECT_SECONDS = 10.0
REASON_LENGTH = 300
#: The rating is at the end. A server that does not keep to the tokens it was given must not fill the disk.
LONGEST_TEXT = 100_000
#: How servers say that they do not know a parameter, or not this value of it.
UNSUPPORTED = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|deprecated|extra (input|field)|not (permit|allow)",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """How a remote language model is asked."""

    model: str
    base_url: str | None = None  # None: the provider's, or what its environment variable names
    timeout: float = 120.0  # seconds until the server must go on with its reply, at each attempt
    max_retries: int = 5
    max_tokens: int = 2048
    temperature: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: with the setting and its value.
        """
        if not self.model.strip():
            raise ConfigError("the judge has no model, write for instance openai:gpt-4o")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ConfigError(f"the judge's timeout is {self.timeout}, it must be above 0 seconds")
        if self.max_retries < 0 or self.max_tokens < 1:
            raise ConfigError(f"the judge's retries ({self.max_retries}) or tokens ({self.max_tokens}) are too few")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"the judge's temperature is {self.temperature}, it must be 0 or more")


class RemoteClient(ABC):
    """A Client over HTTP; providers say how their requests and replies look.

    Args:
        settings: of the model.

    Raises:
        ConfigError: the provider's package or the key is missing, or base_url is no address.
    """

    provider: ClassVar[str]
    package: ClassVar[str]
    key_variable: ClassVar[str]
    url_variable: ClassVar[str]
    default_url: ClassVar[str]

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        self.notes: list[str] = []  # what was found out about the server, for the user to read
        self._without: set[str] = set()  # parameters that the server does not take
        self._has_answered = False
        self.base_url, is_own = self.address(settings.base_url)
        key = _key(self.key_variable, needed=is_own)
        self._secret = key if len(key) >= SECRET_LENGTH else None
        self._sdk: Any = _import(self.package)
        try:
            self._client: Any = self._connect(key, self._sdk.Timeout(settings.timeout, connect=CONNECT_SECONDS))
        # Of proxies and certificates that the environment names, and of addresses that are none.
        except Exception as error:  # noqa: BLE001  # of two packages and what they stand on
            raise ConfigError(
                f"the client of {self.name} at {self.base_url} cannot be made, see proxies and certificates in the "
                f"environment: {self._in_one_line(_cause(error))}"
            ) from None

    @classmethod
    def address(cls, base_url: str | None) -> tuple[str, bool]:
        """Where a model is asked, and whether that is the provider's own address.

        Args:
            base_url: as the user gave it; None: what the environment names, else the provider's own.

        Raises:
            ConfigError: it is no address.
        """
        named = base_url or os.environ.get(cls.url_variable, "").strip()
        url = _checked_url(named or cls.default_url)
        return url, url == cls.default_url

    @property
    def name(self) -> str:
        """The judge's name with its provider."""
        return f"{self.provider}:{self.settings.model}"

    @property
    def max_tokens(self) -> int:
        """How long a completion can be."""
        return self.settings.max_tokens

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that a completion depends on but the prompt. Not the address: the same model may have moved."""
        settings = self.settings
        return {
            "provider": self.provider,
            "model": settings.model,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }

    @abstractmethod
    def _connect(self, key: str, timeout: Any) -> Any:
        """The provider's own client."""

    @abstractmethod
    async def _send(self, client: Any, prompt: Prompt, without: frozenset[str]) -> Any:
        """Ask, leaving parameters out; returns the provider's raw response."""

    @abstractmethod
    def _read(self, reply: Mapping[str, Any]) -> tuple[str, str | None, tuple[int | None, int | None]]:
        """A reply's text, why it is of no use, and its tokens in and out.

        Raises:
            JudgeError: a field is missing.
        """

    async def complete(self, prompt: Prompt, *, attempt: int, retries: int | None = None) -> Completion:
        """Ask once; what can be tried again is, by the provider's client.

        Args:
            prompt: what to ask.
            attempt: not used: the server is asked the same.
            retries: how often at most a failure is tried again; None: as often as the settings say.

        Raises:
            JudgeError: there is no completion of this prompt.
            ConfigError: the key is refused, or the model is unknown.
            RunError: no request can work from now on.
        """
        client = self._client if retries is None else self._client.with_options(max_retries=retries)
        while True:  # each turn leaves one more parameter out
            without = frozenset(self._without)
            try:
                response = (await self._send(client, prompt, without)).http_response
            except self._sdk.APIStatusError as error:
                if self._leave_out(error, without):
                    continue
                failure = self._status_failure(error)
            # ValueError: of text that is no Unicode, and of what the packages make of odd replies
            except (self._sdk.APIError, ValueError) as error:
                failure = JudgeError(f"{self.base_url}: {self._in_one_line(_cause(error))}")
            else:
                return self._completion(prompt, response)
            # Here, not above: chained, a traceback would show what the server sent, and it may have sent the key.
            raise failure

    async def close(self) -> None:
        """Let connections go."""
        await self._client.close()

    def redact(self, text: str) -> str:
        """A text without the key."""
        return text if self._secret is None else text.replace(self._secret, "[key]")

    def _completion(self, prompt: Prompt, response: Any) -> Completion:
        try:
            reply = response.json()
        except ValueError:
            kind = response.headers.get("content-type", "no type")
            raise JudgeError(f"{self.base_url}: replied with no JSON but {self._body(response)} ({kind})") from None
        if not isinstance(reply, dict):
            raise JudgeError(f"{self.base_url}: replied with JSON that is no completion: {self._body(response)}")
        text, refusal, (tokens_in, tokens_out) = self._read(reply)
        estimated = tokens_in is None or tokens_out is None
        if estimated:
            self._note(f"{self.name}: the server does not say how many tokens it read and wrote; bytes are counted")
            tokens_in = text_bytes(prompt.system + prompt.user)
            # A text without visible words may have been thought over at length.
            tokens_out = text_bytes(text) or self.max_tokens
        # A lone surrogate is valid JSON and no UTF-8: no file could hold it.
        text = self.redact(text).encode("utf-8", "replace").decode("utf-8")[-LONGEST_TEXT:]
        if refusal is None and not text.strip():
            refusal = "the judge's text is empty"
        reason = self._in_one_line(refusal) if refusal is not None else None
        assert tokens_in is not None, "said or estimated"
        assert tokens_out is not None, "said or estimated"
        self._has_answered = True
        return Completion(text, tokens_in, tokens_out, refusal=reason, estimated=estimated)

    def _leave_out(self, error: Any, without: frozenset[str]) -> bool:
        """Whether the server refused a parameter that can be left out; remembers it."""
        body = _message(error.response.text)  # not the whole of it, which may hold the prompt
        if error.status_code not in (400, 422) or not UNSUPPORTED.search(body):
            return False
        # The one named first is the refused one: OpenAI's message goes on with what to use instead.
        named = [name for name in self._optional() if name in body and name not in without]
        for name in sorted(named, key=body.index)[:1]:
            self._without.add(name)
            self._note(f"{self.name}: the server does not take {name}, {self._optional()[name]}")
        return bool(named)

    def _optional(self) -> Mapping[str, str]:
        """Parameters that can be left out, with what is done instead."""
        return {"temperature": "its own default is used"}

    def _status_failure(self, error: Any) -> TvmergeError:
        status, body = error.status_code, self._body(error.response)
        said = f"{self.name} at {self.base_url}: HTTP {status}, {body}"
        if status == 401:
            return ConfigError(f"{said}; the key in {self.key_variable} is refused, set another")
        if status == 403 and not self._has_answered:  # later on it is the prompt that some gateways refuse by it
            return ConfigError(f"{said}; the key in {self.key_variable} may not use this model")
        if status == 404:
            return ConfigError(f"{said}; check --judge_model_name and --judge_base_url")
        if status == 402 or any(
            word in error.response.text for word in ("insufficient_quota", "credit balance is too")
        ):
            return RunError(f"{said}; add credit, and the same command goes on")
        return JudgeError(f"{self.base_url}: HTTP {status}, {body}")

    def _body(self, response: Any) -> str:
        """What a server says in an error, in one line."""
        text: str = response.text
        if re.match(r"\s*<(!doctype|html|head|body)", text, re.IGNORECASE):
            title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
            said = f"an HTML page '{html.unescape(title[1]).strip()}'" if title else "an HTML page"
        else:
            said = _message(text) or "an empty body"
        return self._in_one_line(said)

    def _in_one_line(self, text: str) -> str:
        """Redacted before it is cut: half a key would not be found."""
        line = " ".join(self.redact(text).split())
        line = line if len(line) <= REASON_LENGTH else line[:REASON_LENGTH] + "…"
        return line.encode("utf-8", "replace").decode("utf-8")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def field(value: Any, *path: str | int) -> Any:
    """A value inside of JSON; None if it is not there."""
    for step in path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and len(value) > step else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def text_bytes(text: str) -> int:
    """The length in UTF-8, which no number of tokens exceeds: a token is a byte at least."""
    return len(text.encode("utf-8", "replace"))


def _message(text: str) -> str:
    """What an error's JSON says, whichever of the usual forms it has."""
    try:
        body = json.loads(text)
    except ValueError:
        return text
    for path in (("error", "message"), ("message",), ("detail",), ("error",)):
        if said := field(body, *path):
            return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return text


def _cause(error: Exception) -> str:
    """What went wrong below: the packages say 'Connection error.' of everything."""
    said = str(error) or type(error).__name__
    cause = error.__cause__
    return f"{said.rstrip('.')} ({str(cause) or type(cause).__name__})" if cause is not None else said


def _key(variable: str, *, needed: bool) -> str:
    key = os.environ.get(variable, "").strip()  # a key from a file often ends with a line feed
    if not key and needed:
        raise ConfigError(f"{variable} is not set: put the judge's key there, or name another --judge_model_name")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{variable} holds characters that no key has, set it again")
    return key or NO_KEY


def _checked_url(text: str) -> str:
    """An address that can be asked, with nothing secret in it.

    Raises:
        ConfigError: it is none, or has a password or a query, which would be written to files. They are not shown.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ConfigError("--judge_base_url: is no address, write for instance http://localhost:8000/v1") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError("--judge_base_url: has a password or a query, put the key into the environment instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or any(map(str.isspace, text)):
        raise ConfigError(f"--judge_base_url: {text} is no address, write for instance http://localhost:8000/v1")
    return text.rstrip("/")


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"the judge needs the package {package}: pip install 'tvmerge[judge]'") from error
