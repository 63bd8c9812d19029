"""Remote judges against a real server on this machine: each fault has its outcome, and nothing is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from judge_server import KEY, TOKENS_IN, TOKENS_OUT, JudgeServer, Rig, case_of, client_of, judge_of, rating_of, render

from tvmerge.config import MtBenchConfig
from tvmerge.errors import ConfigError, JudgeError, RunError
from tvmerge.judges import Completion, Prompt
from tvmerge.judges.meter import LEDGER, Meter
from tvmerge.judges.openai import OpenAIClient
from tvmerge.judges.prompted import PromptedJudge
from tvmerge.judges.providers import PROVIDERS, make_client, parse_judge
from tvmerge.judges.remote import ClientSettings
from tvmerge.judging import prices_of

BOTH = pytest.mark.parametrize("provider", sorted(PROVIDERS))


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "OPENAI_CUSTOM_HEADERS", "ANTHROPIC_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


def prompt_of(answer: object) -> str:
    return render(case_of(answer)).user


def always(fault: str) -> Callable[..., str]:
    return lambda request, earlier: fault


def first(fault: str, times: int = 1) -> Callable[..., str]:
    return lambda request, earlier: fault if earlier < times else "ok"


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


# ---- what is sent, and what is read


@BOTH
def test_an_answer_becomes_a_rating(server: JudgeServer, provider: str) -> None:
    with judge_of(client_of(server, provider)) as judge:
        future = judge.submit(case_of("東京"))
        judge.finish()
        judgment = future.result(0)
    assert (judgment.rating, judgment.reason) == (rating_of(prompt_of("東京")), None)
    assert judgment.prompt == render(case_of("東京"))
    assert judgment.text.startswith("Good.\nRating: [[")
    (request,) = server.requests
    assert request.path == {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}[provider]
    assert request.headers["authorization"] == f"Bearer {KEY}"
    user = {"role": "user", "content": prompt_of("東京")}
    common = {"model": "m", "temperature": 0.0}
    if provider == "openai":
        system = {"role": "system", "content": "You are a judge."}
        assert request.body == {**common, "messages": [system, user], "max_completion_tokens": 64}
    else:
        assert request.body == {**common, "messages": [user], "system": "You are a judge.", "max_tokens": 64}


@BOTH
def test_tokens_are_the_servers_or_an_upper_bound(server: JudgeServer, provider: str) -> None:
    server.rule = lambda request, earlier: "no-usage" if "?" in request.prompt else "ok"
    client = client_of(server, provider)
    rig = judge_of(client)
    with rig as judge:
        judge.submit(case_of("a")).result(5)
        assert (rig.meter.total.tokens_in, rig.meter.total.tokens_out) == (TOKENS_IN, TOKENS_OUT)
        text = judge.submit(case_of("あ?")).result(5).text
    asked = render(case_of("あ?"))
    assert rig.meter.total.tokens_in == TOKENS_IN + len((asked.system + asked.user).encode())
    assert rig.meter.total.tokens_out == TOKENS_OUT + len(text.encode())
    assert len(client.notes) == 1
    assert "does not say how many tokens" in client.notes[0]


@pytest.mark.parametrize(
    ("fault", "gone", "limit", "notes"),
    [
        ("old", {"max_completion_tokens"}, "max_tokens", 1),
        ("reasoning", {"temperature"}, "max_completion_tokens", 1),
        ("oldest", {"max_completion_tokens", "temperature"}, "max_tokens", 2),
    ],
)
def test_parameters_that_a_server_refuses_are_left_out(
    server: JudgeServer, fault: str, gone: set[str], limit: str, notes: int
) -> None:
    server.rule = always(fault)
    client = client_of(server)
    with judge_of(client, parallel=1) as judge:
        futures = [judge.submit(case_of(i)) for i in range(5)]
        judge.finish()
        assert [f.result(0).rating for f in futures] == [rating_of(prompt_of(i)) for i in range(5)]
    assert not gone & server.requests[-1].body.keys()
    assert server.requests[-1].body[limit] == 64
    assert len(server.requests) == 5 + len(gone)  # remembered after the first
    assert len(client.notes) == notes


def test_anthropic_without_temperature(server: JudgeServer) -> None:
    server.rule = always("reasoning")
    with judge_of(client_of(server, "anthropic")) as judge:
        assert judge.submit(case_of(1)).result(5).rating == rating_of(prompt_of(1))
    assert [("temperature" in request.body) for request in server.requests] == [True, False]


# ---- faults


@BOTH
@pytest.mark.parametrize("fault", ["429", "429-soon", "500-soon", "html-502", "cut", "cut-body"])
def test_what_passes_is_tried_again(server: JudgeServer, provider: str, fault: str) -> None:
    server.rule = first(fault)
    with judge_of(client_of(server, provider)) as judge:
        assert judge.submit(case_of(1)).result(10).rating == rating_of(prompt_of(1))
    assert server.asked == {prompt_of(1): 2}


@BOTH
@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("429-soon", "HTTP 429, slow down", 3),
        ("500-soon", "HTTP 500, it broke", 3),
        ("html-502", "HTTP 502, an HTML page 'Bad & gone'", 3),
        ("html-200", "replied with no JSON but an HTML page 'Bad & gone' (text/html)", 1),
        ("bad-json", "replied with no JSON but {", 1),
        ("list", "JSON that is no completion: [1, 2]", 1),
        ("no-fields", "replied with no ", 1),
        ("error-200", "upstream is down", 1),
        ("400", "HTTP 400, this prompt is too long", 1),
        ("echo-400", "HTTP 400, too long", 1),
        ("empty", "the judge's text is empty", 1),
        ("refusal", "the judge refused", 1),
        ("filter", "", 1),
        ("no-choices", "", 1),
    ],
)
def test_what_stays_is_unscored(server: JudgeServer, provider: str, fault: str, reason: str, requests: int) -> None:
    server.rule = lambda request, earlier: fault if request.prompt == prompt_of("bad") else "ok"
    with judge_of(client_of(server, provider)) as judge:
        bad, good = judge.submit(case_of("bad")), judge.submit(case_of("good"))
        judge.finish()
        judgment = bad.result(0)
        assert good.result(0).rating == rating_of(prompt_of("good"))
    assert judgment.rating is None
    assert judgment.reason
    assert reason in judgment.reason
    assert "\n" not in judgment.reason
    assert server.asked[prompt_of("bad")] == requests


@BOTH
@pytest.mark.parametrize("fault", ["hang", "cut"])
def test_a_server_that_says_nothing_is_left(server: JudgeServer, provider: str, fault: str) -> None:
    server.rule = always(fault)
    with judge_of(client_of(server, provider, timeout=0.2, max_retries=1)) as judge:
        judgment = judge.submit(case_of(1)).result(10)
    assert judgment.rating is None
    assert server.asked == {prompt_of(1): 2}


@BOTH
@pytest.mark.parametrize("fault", ["hang", "trickle", "429-long"])
def test_the_deadline_holds(server: JudgeServer, provider: str, fault: str) -> None:
    server.rule = always(fault)
    started = time.monotonic()
    with judge_of(client_of(server, provider, timeout=60), deadline=0.5) as judge:
        judgment = judge.submit(case_of(1)).result(10)
        took = time.monotonic() - started
    assert judgment.rating is None
    # openai does not wait for more than two minutes; anthropic would sleep for a day
    assert (took < 0.5) if (provider, fault) == ("openai", "429-long") else ("0.5 seconds" in str(judgment.reason))
    assert took < 5


@BOTH
def test_a_prompt_that_a_gateway_forbids_is_unscored_and_others_go_on(server: JudgeServer, provider: str) -> None:
    server.rule = lambda request, earlier: "403" if request.prompt == prompt_of(5) else "ok"
    with judge_of(client_of(server, provider), parallel=1) as judge:
        judgments = [judge.submit(case_of(i)) for i in range(9)]
        judge.finish()
        assert [future.result(0).rating is None for future in judgments] == [i == 5 for i in range(9)]
        assert "HTTP 403" in str(judgments[5].result(0).reason)
    with judge_of(client_of(server, provider), parallel=1) as judge, pytest.raises(ConfigError, match="may not use"):
        judge.submit(case_of(5)).result(5)  # nothing was answered yet: it is the key


@BOTH
@pytest.mark.parametrize(
    ("fault", "kind", "advice"),
    [
        ("401", ConfigError, "_API_KEY is refused"),
        ("404", ConfigError, "check --judge_model_name"),
        ("quota", RunError, "add credit"),
        ("credit", RunError, "add credit"),
    ],
)
def test_what_fails_for_all_stops_all(
    server: JudgeServer, provider: str, fault: str, kind: type[Exception], advice: str
) -> None:
    server.rule = lambda request, earlier: fault if request.prompt == prompt_of(5) else "ok"
    server.delay = 0.01
    with judge_of(client_of(server, provider), parallel=2) as judge:
        futures = [judge.submit(case_of(i)) for i in range(300)]
        judge.finish()
        late = judge.submit(case_of("late"))
        errors = [future.exception(0) for future in futures]
        with pytest.raises(kind, match=advice):
            late.result(0)
    assert sum(error is None for error in errors) < 100
    for error in filter(None, errors):
        assert type(error) is kind
        assert advice in str(error)
        assert "\n" not in str(error)
    assert len(server.requests) < 100


def test_what_fails_for_all_does_not_wait_for_what_hangs(server: JudgeServer) -> None:
    server.rule = lambda request, earlier: "401" if request.prompt == prompt_of("bad") else "hang"
    with judge_of(client_of(server, timeout=60), parallel=2) as judge:
        hanging = judge.submit(case_of("hang"))
        started = time.monotonic()
        while not server.requests:
            assert time.monotonic() - started < 5
        judge.submit(case_of("bad"))
        judge.finish()
        assert time.monotonic() - started < 5
        with pytest.raises(ConfigError, match="is refused"):
            hanging.result(0)


def test_a_fault_of_ours_is_not_lost(server: JudgeServer) -> None:
    def broken(case: Any) -> Prompt:
        raise KeyError(case.answers[0])

    with judge_of(client_of(server), render=broken) as judge:
        future = judge.submit(case_of("x"))
        judge.finish()
        with pytest.raises(RunError, match="KeyError: 'x'"):
            future.result(0)


# ---- keys


@BOTH
def test_the_key_is_nowhere(
    server: JudgeServer, provider: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = ["echo-500", "ok", "bad-json", "html-502", "cut", "echo-text", "401"]
    server.rule = lambda request, earlier: faults[int(request.prompt.split()[-1]) % len(faults)]
    server.text = lambda request, earlier: f"You sent {KEY}. [[7]]"
    caplog.set_level(logging.DEBUG)
    said = []
    client = client_of(server, provider, max_retries=1)
    meter = Meter(path=tmp_path / LEDGER, judge=client.name)
    with judge_of(client, meter=meter, cache=tmp_path / "cache.db", parallel=1) as judge:
        futures = [judge.submit(case_of(i)) for i in range(len(faults))]
        judge.finish()
        for future in futures:
            try:
                said.append(repr(future.result(0)))
            except ConfigError as error:
                said.append("".join(traceback.format_exception(error)))
        with pytest.raises(ConfigError) as refused:
            judge.check()
        said += [repr(judge), repr(client), repr(client.settings), repr(client.identity), str(client.notes)]
    said.append("".join(traceback.format_exception(refused.value)))
    assert "You sent [key]. [[7]]" in str(said)
    assert "Incorrect API key provided: [key]" in str(said) or "is refused" in str(said)
    assert len(caplog.records) > 20
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"[key]" in files
    for text in (*said, caplog.text, files.decode("utf-8", "replace")):
        for part in (KEY, KEY[:20], KEY[-12:]):
            assert part not in text


@BOTH
def test_a_key_is_needed_and_a_local_server_needs_none(
    server: JudgeServer, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"{provider.upper()}_API_KEY"
    monkeypatch.delenv(variable)
    with pytest.raises(ConfigError, match=f"{variable} is not set"):
        make_client(provider, ClientSettings(model="m"))
    with judge_of(client_of(server, provider)) as judge:
        assert judge.submit(case_of(1)).result(5).rating == rating_of(prompt_of(1))
    monkeypatch.setenv(variable, f" {KEY}\n")  # as from a file
    with judge_of(client_of(server, provider)) as judge:
        judge.check()
    assert server.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv(variable, "sk-one\nsk-two")
    with pytest.raises(ConfigError, match="no key has") as error:
        client_of(server, provider)
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "http://",
        "ftp://host/v1",
        "http://host:x/",
        "http://u:hunter2@host/",
        "http://h/?key=hunter2",
    ],
)
def test_an_address_that_cannot_be_asked(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url") as error:
        make_client("openai", ClientSettings(model="m", base_url=url))
    assert "hunter2" not in "".join(traceback.format_exception(error.value))


# ---- check


@BOTH
def test_check_asks_once_and_is_not_cached(server: JudgeServer, provider: str, tmp_path: Path) -> None:
    rig = judge_of(client_of(server, provider), cache=tmp_path / "c.db")
    with rig as judge:
        judge.check()
        judge.check()
        assert rig.meter.total.requests == len(server.requests) == 2
        assert judge.submit(case_of(1)).result(5).rating == rating_of(prompt_of(1))


@BOTH
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "is refused, set another"),
        ("404", "check --judge_model_name"),
        ("quota", "add credit"),
        ("400", "too long"),
        ("html-200", "HTML page"),
    ],
)
def test_check_finds_what_cannot_work(server: JudgeServer, provider: str, fault: str, words: str) -> None:
    server.rule = always(fault)
    with (
        judge_of(client_of(server, provider, max_retries=5)) as judge,
        pytest.raises(ConfigError, match=words) as error,
    ):
        judge.check()
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.requests) <= 2


@BOTH
def test_check_of_a_server_that_is_not_there_is_quick(server: JudgeServer, provider: str) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    started = time.monotonic()
    with judge_of(client_of(server, provider, base_url=url, max_retries=5)) as judge:
        with pytest.raises(ConfigError, match=url):
            judge.check()
        assert time.monotonic() - started < 3


def test_check_learns_what_the_server_does_not_take(server: JudgeServer) -> None:
    server.rule = always("oldest")
    with judge_of(client_of(server)) as judge:
        judge.check()
        judge.submit(case_of(1)).result(5)
    assert server.asked[prompt_of(1)] == 1


# ---- asking


def test_equal_requests_at_a_time_are_one(server: JudgeServer) -> None:
    server.delay = 0.1
    with judge_of(client_of(server), parallel=16) as judge:
        futures = [judge.submit(case_of(i % 3)) for i in range(30)]
        judge.finish()
        assert [f.result(0).rating for f in futures] == [rating_of(prompt_of(i % 3)) for i in range(30)]
    assert server.asked == {prompt_of(i): 1 for i in range(3)}


@pytest.mark.parametrize("parallel", [1, 4])
def test_no_more_requests_at_a_time_than_allowed(server: JudgeServer, parallel: int) -> None:
    server.delay = 0.02
    with judge_of(client_of(server), parallel=parallel) as judge:
        for i in range(20):
            judge.submit(case_of(i))
        judge.finish()
    assert server.at_once == parallel


def test_submit_does_not_wait(server: JudgeServer) -> None:
    server.delay = 0.3
    with judge_of(client_of(server)) as judge:
        judge.check()
        started = time.monotonic()
        future = judge.submit(case_of(1))
        assert time.monotonic() - started < 0.2
        while len(server.requests) < 2:  # under way without finish
            assert time.monotonic() - started < 5
        assert future.result(5).rating is not None


def test_a_text_without_rating_is_asked_for_again(server: JudgeServer, tmp_path: Path) -> None:
    server.text = lambda request, earlier: "[[4]]" if earlier and "a" in request.prompt[-1] else "I would say\nnine."
    for _ in range(2):  # the second time from the cache, with the same end
        with judge_of(client_of(server), cache=tmp_path / "c.db") as judge:
            mended, never = judge.submit(case_of("a")), judge.submit(case_of("b"))
            judge.finish()
            assert (mended.result(0).rating, mended.result(0).text) == (4.0, "[[4]]")
            assert never.result(0).rating is None
            assert never.result(0).reason == "no rating in the judge's text, asked twice: 'I would say nine.'"
            assert never.result(0).text == "I would say\nnine."
    assert server.asked == {prompt_of("a"): 2, prompt_of("b"): 2}


@pytest.mark.parametrize(
    ("texts", "rating", "ratings"),
    [
        (["[[2]]", "[[9]]", "[[4]]"], 4.0, [2, 4, 9]),
        (["[[2]]", "[[3]]", "[[9]]", "[[10]]"], 6.0, [2, 3, 9, 10]),
        (["[[2]]", "refusal", "[[4]]"], 3.0, [2, 4]),
        (["[[2]]", "refusal", "refusal"], None, [2]),
        (["[[2]]", "refusal"], None, [2]),
    ],
)
def test_repeats(server: JudgeServer, texts: list[str], rating: float | None, ratings: list[float]) -> None:
    server.rule = lambda request, earlier: "refusal" if texts[earlier] == "refusal" else "ok"
    server.text = lambda request, earlier: texts[earlier]
    with judge_of(client_of(server), repeats=len(texts), parallel=1) as judge:
        judgment = judge.submit(case_of(1)).result(5)
        assert judge.identity["repeats"] == len(texts)
    assert judgment.rating == rating
    assert sorted(judgment.ratings) == ratings
    assert judgment.spread == max(ratings) - min(ratings)
    assert judgment.text == "[[2]]"
    assert (judgment.reason is None) == (rating is not None)
    if judgment.reason:
        assert judgment.reason.startswith(f"{len(texts) - 1} of {len(texts)} repeats are unscored")


def test_close_leaves_a_server_that_hangs(server: JudgeServer) -> None:
    server.rule = always("hang")
    rig = judge_of(client_of(server, timeout=60), parallel=3)
    with rig as judge:
        futures = [judge.submit(case_of(i)) for i in range(5)]
        while len(server.requests) < 3:
            time.sleep(0.01)
    for future in futures:  # Rig measured how long close took
        with pytest.raises(RunError, match="closed"):
            future.result(0)
    with pytest.raises(RunError, match="closed"):
        rig.judge.submit(case_of(9)).result(0)
    rig.judge.finish()
    rig.judge.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "judge"]


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
from judge_server import *
with judge_of(make_client("openai", ClientSettings(model="m", base_url={url!r}))) as judge:
    future = judge.submit(case_of(1))
    judge.finish()
"""


def test_ctrl_c_ends_a_run_that_waits(server: JudgeServer) -> None:
    server.rule = always("hang")
    code = INTERRUPTED.format(tests=str(ROOT / "tests"), url=f"{server.url}/v1")
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 60
    while not server.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - sent < 5
    assert errors.strip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1


class LocalClient:
    """A language model that works only in the thread that waits."""

    identity: dict[str, Any]
    max_tokens = 5

    def __init__(self) -> None:
        self.identity = {"model": "local"}
        self.todo: list[Prompt] = []
        self.done: dict[str, Completion] = {}
        self.threads: set[int] = set()
        self.failing = False

    async def complete(self, prompt: Prompt, *, attempt: int, retries: int | None = None) -> Completion:
        self.todo.append(prompt)
        while prompt.user not in self.done:
            await asyncio.sleep(0.005)
        if self.failing:
            raise JudgeError("out of memory")
        return self.done[prompt.user]

    def serve(self, done: Callable[[], bool]) -> None:
        while not done():
            self.threads.add(threading.get_ident())
            while self.todo:
                self.done[self.todo.pop().user] = Completion("[[3]]", 1, 1)
            time.sleep(0.005)

    async def close(self) -> None:
        pass


def test_a_client_may_work_in_the_thread_that_waits() -> None:
    client = LocalClient()
    meter = Meter(path=None, judge="local")
    judge = PromptedJudge(
        client=client, name="local", identity={}, render=render, read_rating=lambda text: 3.0, meter=meter
    )
    judge.check()
    futures = [judge.submit(case_of(i)) for i in range(20)]
    judge.finish()
    assert [future.result(0).rating for future in futures] == [3.0] * 20
    client.failing = True
    future = judge.submit(case_of("later"))
    judge.finish()
    assert future.result(0).reason == "out of memory"
    assert client.threads == {threading.get_ident()}
    judge.close()


# ---- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai:gpt-4o", ("openai", "gpt-4o")),
        ("anthropic:claude-haiku-4-5", ("anthropic", "claude-haiku-4-5")),
        ("claude-haiku-4-5", ("anthropic", "claude-haiku-4-5")),
        ("gpt-4", ("openai", "gpt-4")),
        ("openai:claude-clone", ("openai", "claude-clone")),
        ("openai:ft:gpt-4o:us", ("openai", "ft:gpt-4o:us")),
        ("llama3:8b", ("openai", "llama3:8b")),
    ],
)
def test_names(name: str, expected: tuple[str, str]) -> None:
    assert parse_judge(name) == expected


@pytest.mark.parametrize("name", ["", "  ", "openai:", "anthropic: "])
def test_names_without_a_model(name: str) -> None:
    with pytest.raises(ConfigError, match="names no model; write PROVIDER:MODEL, of anthropic, openai"):
        parse_judge(name)


def test_an_unknown_provider_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known are anthropic, openai"):
        make_client("nobody", ClientSettings(model="m"))


@pytest.mark.parametrize(
    "settings", [{"model": ""}, {"timeout": 0}, {"max_retries": -1}, {"max_tokens": 0}, {"temperature": float("nan")}]
)
def test_settings_that_cannot_work(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ClientSettings(**{"model": "m", **settings})


def test_the_identity_names_all_that_a_completion_depends_on(server: JudgeServer) -> None:
    rig: Rig = judge_of(client_of(server), identity={"prompts": "abc"})
    with rig as judge:
        assert judge.identity == {
            "prompts": "abc",
            "repeats": 1,
            "client": {
                "provider": "openai",
                "model": "m",
                "temperature": 0.0,
                "max_tokens": 64,
            },
        }


def test_a_new_provider_is_one_class_and_one_line(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(OpenAIClient):
        provider, key_variable, url_variable = "mine", "MINE_API_KEY", "MINE_BASE_URL"
        default_url = f"{server.url}/v1"

    with pytest.raises(ConfigError, match="unknown provider of judges 'mine'"):
        make_client("mine", ClientSettings(model="m"))
    monkeypatch.setitem(PROVIDERS, "mine", Mine)
    assert parse_judge("mine:m") == ("mine", "m")
    with pytest.raises(ConfigError, match="MINE_API_KEY is not set"):
        make_client("mine", ClientSettings(model="m"))
    monkeypatch.setenv("MINE_API_KEY", KEY)
    with judge_of(make_client("mine", ClientSettings(model="m"))) as judge:
        judge.check()
        assert judge.submit(case_of(1)).result(5).rating == rating_of(prompt_of(1))
    assert (
        prices_of(MtBenchConfig(target_model="t", tuned_model="u", bench_name="b", judge_model_name="mine:m")) is None
    )
