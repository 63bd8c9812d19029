"""A server on this machine that speaks OpenAI's and Anthropic's protocols, and misbehaves on demand."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tvmerge.judges import Case, Prompt
from tvmerge.judges.cache import JudgmentCache
from tvmerge.judges.meter import Meter
from tvmerge.judges.prompted import PromptedJudge
from tvmerge.judges.providers import make_client
from tvmerge.judges.remote import ClientSettings, RemoteClient

KEY = "sk-test-0123456789-SECRET-abcdef"
TOKENS_IN, TOKENS_OUT = 11, 7
SOON = {"retry-after-ms": "10"}
HTML = "<html><head><title>Bad &amp; gone</title></head><body>no</body></html>"

#: name → status, headers, body of replies that are not made from the prompt.
ERRORS: dict[str, tuple[int, dict[str, str], Any]] = {
    "400": (400, {}, {"error": {"message": "this prompt is\ntoo long", "type": "invalid_request_error"}}),
    "401": (401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}.", "code": "invalid_api_key"}}),
    "403": (403, {}, {"error": {"message": "not yours"}}),
    "404": (404, {}, {"error": {"message": "The model `m` does not exist", "code": "model_not_found"}}),
    "429": (429, {}, {"error": {"message": "slow down"}}),
    "429-soon": (429, SOON, {"error": {"message": "slow down"}}),
    "429-long": (429, {"retry-after": "100000"}, {"error": {"message": "slow down"}}),
    "quota": (429, SOON, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}),
    "credit": (400, {}, {"error": {"message": "Your credit balance is too low to access the API."}}),
    "echo-400": (
        400,
        {},
        {"error": {"message": "too long"}, "input": "which temperature is unsupported by max_completion_tokens?"},
    ),
    "500-soon": (500, SOON, {"error": {"message": "it broke"}}),
    "echo-500": (500, SOON, {"error": {"message": f"it broke at {'x' * 280} Bearer {KEY}"}}),
    "html-502": (502, SOON, HTML),
    "html-200": (200, {}, HTML),
    "bad-json": (200, {}, '{"choices": [{"mess'),
    "list": (200, {}, [1, 2]),
    "no-fields": (200, {}, {"id": "x"}),
    "error-200": (200, {}, {"error": {"message": "upstream is down"}}),
}


@dataclass
class Request:
    """One that came in."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    prompt: str


def rating_of(prompt: str) -> int:
    """What the server rates a prompt with."""
    return 1 + zlib.crc32(prompt.encode()) % 10


def _ok(request: Request, earlier: int) -> str:
    return "ok"


@dataclass
class JudgeServer:
    """Listens on a free port between `start` and `stop`.

    `rule` maps a request, and how often its prompt was asked before, to a fault; `text` makes the answer.
    """

    rule: Callable[[Request, int], str] = _ok
    text: Callable[[Request, int], str] = lambda request, earlier: f"Good.\nRating: [[{rating_of(request.prompt)}]]"
    delay: float = 0.0
    requests: list[Request] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    at_once: int = 0  # the most requests that were under way together

    def start(self) -> None:
        self.stopping = threading.Event()
        self._now, self._lock = 0, threading.Lock()
        self.sockets: set[socket.socket] = set()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.judge = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._thread.join()
        for each in list(self.sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def count(self, request: Request) -> tuple[str, int]:
        with self._lock:
            earlier = self.asked[request.prompt]
            self.asked[request.prompt] += 1
            self.requests.append(request)
            fault = self.rule(request, earlier)
            self.faults[fault] += 1
            return fault, earlier

    def under_way(self, change: int) -> None:
        with self._lock:
            self._now += change
            self.at_once = max(self.at_once, self._now)


class _Http(ThreadingHTTPServer):
    judge: JudgeServer
    daemon_threads = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients go away in these tests
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def setup(self) -> None:
        super().setup()
        self.server.judge.sockets.add(self.connection)

    def finish(self) -> None:
        self.server.judge.sockets.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        judge = self.server.judge
        sent = self.rfile.read(int(self.headers["content-length"]))
        if len(sent) < int(self.headers["content-length"]):  # whoever sent it was killed
            self.close_connection = True
            return
        body = json.loads(sent)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, headers, body, body["messages"][-1]["content"])
        fault, earlier = judge.count(request)
        judge.under_way(1)
        try:
            judge.stopping.wait(judge.delay)
            self.answer(request, fault, earlier)
        finally:
            judge.under_way(-1)

    def answer(self, request: Request, fault: str, earlier: int) -> None:
        if fault == "hang":
            self.server.judge.stopping.wait()
            self.close_connection = True
        elif fault == "cut":
            self.close_connection = True
        elif fault in ERRORS:
            self.reply(*ERRORS[fault])
        elif refused := self.unsupported(request, fault):
            self.reply(400, {}, {"error": {"message": refused, "code": "unsupported_parameter"}})
        else:
            make = self.message if request.path.endswith("/messages") else self.completion
            self.reply(200, {}, make(fault, self.server.judge.text(request, earlier)), how=fault)

    @staticmethod
    def unsupported(request: Request, fault: str) -> str | None:
        """What a server says that does not know a parameter, if it was sent."""
        if fault in ("old", "oldest") and "max_completion_tokens" in request.body:
            return "Unrecognized request argument supplied: max_completion_tokens"
        if fault in ("reasoning", "oldest") and "temperature" in request.body:
            return "Unsupported value: 'temperature' does not support 0.0 with this model."
        return None

    @staticmethod
    def completion(fault: str, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        reason = "stop"
        if fault == "refusal":
            message |= {"content": None, "refusal": "I cannot rate this."}
        if fault == "filter":
            reason = "content_filter"
        if fault == "empty":
            message["content"], reason = None, "length"
        reply: dict[str, Any] = {
            "choices": [] if fault == "no-choices" else [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {"prompt_tokens": TOKENS_IN, "completion_tokens": TOKENS_OUT},
        }
        if fault == "no-usage":
            del reply["usage"]
        return reply

    @staticmethod
    def message(fault: str, text: str) -> dict[str, Any]:
        empty = fault in ("empty", "no-choices", "refusal", "filter")
        reply: dict[str, Any] = {
            "type": "message",
            "content": [] if empty else [{"type": "text", "text": text}],
            "stop_reason": "refusal" if fault in ("refusal", "filter") else "end_turn",
            "usage": {"input_tokens": TOKENS_IN, "output_tokens": TOKENS_OUT},
        }
        if fault == "no-usage":
            del reply["usage"]
        return reply

    def reply(self, status: int, headers: dict[str, str], body: Any, how: str = "") -> None:
        page = isinstance(body, str)
        data = (body if page else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("content-type", "text/html" if page and body.startswith("<") else "application/json")
        self.send_header("content-length", str(len(data) + 1000 * (how == "trickle")))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if how == "cut-body":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if how == "trickle":
            for _ in range(1000):
                self.wfile.write(b" ")  # white space before JSON is JSON
                if self.server.judge.stopping.wait(0.02):
                    break
        self.wfile.write(data)


def read_rating(text: str) -> float | None:
    found = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", text)
    return float(found[1]) if found else None


def render(case: Case) -> Prompt:
    return Prompt(name="single-v1", system="You are a judge.", user=f"Rate {case.answers[-1]}")


def case_of(answer: object) -> Case:
    return Case(questions=("Q",), answers=(str(answer),))


def client_of(server: JudgeServer, provider: str = "openai", **settings: Any) -> RemoteClient:
    url = server.url + ("/v1" if provider == "openai" else "")
    chosen = {"model": "m", "base_url": url, "timeout": 5.0, "max_retries": 2, "max_tokens": 64, **settings}
    return make_client(provider, ClientSettings(**chosen))


def judge_of(client: RemoteClient, *, meter: Meter | None = None, cache: Path | None = None, **more: Any) -> Rig:
    return Rig(client, meter or Meter(path=None, judge="m"), JudgmentCache(cache) if cache else None, more)


class Rig:
    """A judge with what it needs, all closed at the end of a `with`."""

    def __init__(self, client: RemoteClient, meter: Meter, cache: JudgmentCache | None, more: dict[str, Any]) -> None:
        self.client, self.meter, self.cache = client, meter, cache
        chosen = {"name": "m", "identity": {}, "render": render, "read_rating": read_rating, **more}
        self.judge = PromptedJudge(client=client, meter=meter, cache=cache, **chosen)

    def __enter__(self) -> PromptedJudge:
        return self.judge

    def __exit__(self, *error: object) -> None:
        started = time.monotonic()
        self.judge.close()
        took = time.monotonic() - started
        if self.cache is not None:
            self.cache.close()
        assert took < 2
