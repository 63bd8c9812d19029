"""Two thousand judgments, one request in five of which goes wrong."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import TOKENS_IN, JudgeServer, Request, case_of, client_of, judge_of, rating_of, render

from tvmerge.judges.meter import LEDGER, Meter, Prices

COUNT, PARALLEL, RETRIES = 2000, 16, 2
#: fault → what a reason has in it if it stays.
PASSING = {
    "429-soon": "HTTP 429",
    "500-soon": "HTTP 500",
    "html-502": "HTTP 502",
    "cut": "onnect",
    "cut-body": "onnect",
}
LASTING = {
    "400": "too long",
    "bad-json": "no JSON",
    "html-200": "HTML page",
    "no-fields": "replied with no ",
    "refusal": "refused",
    "empty": "empty",
    "no-choices": "",
    "hang": "3 seconds",
    "trickle": "3 seconds",
    "silent": "no rating in the judge's text",
}
FAULTS = sorted([*PASSING, *LASTING])


def fault_of(prompt: str) -> tuple[str, int]:
    """One prompt in five has a fault, and of the faults that can pass some stay."""
    seed = zlib.crc32(b"fault" + prompt.encode())
    if seed % 5:
        return "ok", 0
    fault = FAULTS[seed // 5 % len(FAULTS)]
    if fault in ("hang", "trickle") and seed // 5 // len(FAULTS) % 3:  # each takes three seconds
        fault = "cut"
    lasts = fault in LASTING or (seed // 5 // len(FAULTS)) % 4 == 0
    return fault, 99 if lasts else 1 + seed % RETRIES


def rule(request: Request, earlier: int) -> str:
    fault, times = fault_of(request.prompt)
    return fault if earlier < times else "ok"


def text(request: Request, earlier: int) -> str:
    if fault_of(request.prompt)[0] == "silent":
        return "I would rather not say."
    return f"[[{rating_of(request.prompt)}]]"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none-0123456789")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-none-0123456789")
    each = JudgeServer(rule=rule, text=text)
    each.start()
    yield each
    each.stop()


def requests_of(prompt: str) -> set[int]:
    """How often a prompt may be asked, by its fault."""
    fault, times = fault_of(prompt)
    if fault == "silent":
        return {2}
    if fault in PASSING:
        return {min(times, RETRIES) + 1}
    return {1}


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
def test_none_is_lost_and_none_is_asked_in_vain(server: JudgeServer, provider: str, tmp_path: Path) -> None:
    started = time.monotonic()
    meter = Meter(path=tmp_path / LEDGER, judge="m", prices=Prices(1, 1), max_cost=10.0)
    client = client_of(server, provider, max_retries=RETRIES, timeout=30)
    # Two waits after cut connections are 1.5 seconds; those that hang take all of it.
    rig = judge_of(client, meter=meter, cache=tmp_path / "c.db", parallel=PARALLEL, deadline=3.0)
    with rig as judge:
        futures = [judge.submit(case_of(i)) for i in range(COUNT)]
        judge.finish()
        judgments = [future.result(0) for future in futures]
    outcomes: Counter[str] = Counter()
    for i, judgment in enumerate(judgments):
        prompt = render(case_of(i)).user
        fault, times = fault_of(prompt)
        if fault == "ok" or (fault in PASSING and times <= RETRIES):
            assert (judgment.rating, judgment.reason) == (float(rating_of(prompt)), None)
        else:
            assert judgment.rating is None
            assert ({**PASSING, **LASTING}[fault]) in (judgment.reason or ""), (fault, judgment.reason)
        assert server.asked[prompt] in requests_of(prompt), (fault, server.asked[prompt])
        outcomes[fault] += 1
    assert min(outcomes[fault] for fault in FAULTS) >= 5, outcomes
    assert 0.15 < 1 - outcomes["ok"] / COUNT < 0.25
    assert server.at_once <= PARALLEL + outcomes["hang"] + outcomes["trickle"]  # the server learns late who has left
    assert time.monotonic() - started < 60

    answered = meter.total.requests
    assert meter.total.tokens_in == answered * TOKENS_IN
    assert answered == sum(server.faults[each] for each in ("ok", "silent", "refusal", "empty", "no-choices"))
    before = sum(server.asked.values())
    with judge_of(client_of(server, provider), cache=tmp_path / "c.db") as judge:
        futures = [judge.submit(case_of(i)) for i in range(COUNT) if fault_of(render(case_of(i)).user)[0] == "ok"]
        judge.finish()
        assert all(future.result(0).rating for future in futures)
    assert sum(server.asked.values()) == before
