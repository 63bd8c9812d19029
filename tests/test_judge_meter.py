"""What judges cost: counted to the token, kept over processes, never more than the limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge_server import TOKENS_IN, TOKENS_OUT, JudgeServer, case_of, client_of, judge_of, rating_of, render

from tvmerge.config import MtBenchConfig
from tvmerge.errors import BudgetError, ConfigError, RunError
from tvmerge.judges import Completion, Prompt
from tvmerge.judges.meter import KNOWN_PRICES, LEDGER, Meter, Prices, Usage, known_prices
from tvmerge.judges.providers import PROVIDERS
from tvmerge.judging import prices_of

PRICES = Prices(2.0, 8.0)
EACH = (TOKENS_IN * 2 + TOKENS_OUT * 8) / 1e6  # USD of one answer


def used(answers: int) -> Usage:
    return Usage(answers, answers * TOKENS_IN, answers * TOKENS_OUT, round(answers * EACH, 12))


def rounded(usage: Usage) -> Usage:
    assert usage.cost is not None
    return Usage(usage.requests, usage.tokens_in, usage.tokens_out, round(usage.cost, 12))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_tokens_and_money_by_model_and_over_processes(server: JudgeServer, tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    for again in range(2):
        meter = Meter(path=path, judge="m", prices=PRICES)
        with judge_of(client_of(server), meter=meter, cache=tmp_path / "c.db") as judge:
            for name, cases in (("trial-0000", range(3)), ("trial-0001", range(2, 7))):
                meter.begin(name)
                for i in cases:
                    judge.submit(case_of(i + 100 * again))
                judge.finish()
        seen = again + 1
        assert rounded(meter.of("trial-0000")) == used(3 * seen)
        assert meter.of("trial-0001").requests == 4 * seen  # the fifth was in the cache
        assert rounded(meter.total) == used(7 * seen)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 14
    assert lines[0] == {
        "model": "trial-0000",
        "judge": "m",
        "tokens_in": TOKENS_IN,
        "tokens_out": TOKENS_OUT,
        "estimated": False,
        "cost": EACH,
    }


def test_failed_requests_and_prices_that_are_not_known(server: JudgeServer) -> None:
    server.rule = lambda request, earlier: "400" if request.prompt[-1] == "1" else "refusal"
    meter = Meter(path=None, judge="m")
    with judge_of(client_of(server), meter=meter) as judge:
        for i in range(2):
            judge.submit(case_of(i))
        judge.finish()
    assert meter.total == Usage(1, TOKENS_IN, TOKENS_OUT, None)  # a refusal is paid for


def test_a_torn_ledger(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    whole = {"model": "t", "judge": "m", "tokens_in": 10, "tokens_out": 20, "cost": 0.5}
    path.write_bytes((json.dumps(whole) + "\n").encode() * 2 + b'\xff{"model": "t", "tok')
    meter = Meter(path=path, judge="m", prices=PRICES)
    assert meter.total == Usage(2, 20, 40, 1.0)
    reservation = meter.reserve(Prompt("", "", "x"), 10, name="t")
    assert reservation is not None
    meter.settle(reservation, Completion("", 1_000_000, 0))
    assert Meter(path=path, judge="m", prices=PRICES).total == Usage(3, 1_000_020, 40, 3.0)


def test_tokens_without_cost_are_priced_later(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    path.write_text('{"model": "t", "tokens_in": 1000000, "tokens_out": 0, "cost": null}\n[1]\n{"model": "t"}\n')
    assert Meter(path=path, judge="m").total == Usage(1, 1_000_000, 0, None)
    assert Meter(path=path, judge="m", prices=PRICES, max_cost=5).total.cost == 2.0


def test_a_ledger_that_cannot_be_written_stops_the_run(server: JudgeServer, tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    meter = Meter(path=path, judge="m")
    path.mkdir()  # a folder in its place
    with judge_of(client_of(server), meter=meter, parallel=1) as judge:
        futures = [judge.submit(case_of(i)) for i in range(9)]
        judge.finish()
        for future in futures:
            with pytest.raises(RunError, match="cannot be written: Is a directory"):
                future.result(0)
    assert len(server.requests) == 1


def test_a_ledger_waits_for_its_folder(server: JudgeServer, tmp_path: Path) -> None:
    path = tmp_path / "to be" / LEDGER
    with judge_of(client_of(server), meter=Meter(path=path, judge="m")) as judge:
        judge.check()
        assert not path.parent.exists(), "a run that is refused leaves nothing"
        path.parent.mkdir()
        judge.submit(case_of(1))
        judge.finish()
    assert path.read_text().count("\n") == 2
    assert Meter(path=path, judge="m").total.requests == 2


def test_limits_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="the prices of m are not known"):
        Meter(path=None, judge="m", max_cost=1.0)
    for limit in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="max_cost"):
            Meter(path=None, judge="m", prices=PRICES, max_cost=limit)
    for price in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="price"):
            Prices(price, 1.0)


def test_what_is_set_aside_is_the_worst_case() -> None:
    prompt = Prompt("n", "あ", "い")  # 6 bytes, and 64 tokens of a chat's frame
    worst = (70 * 2 + 100 * 8) / 1e6
    meter = Meter(path=None, judge="m", prices=PRICES, max_cost=2.5 * worst)
    first, second = (meter.reserve(prompt, 100, name="t") for _ in range(2))
    assert first is not None
    assert second is not None
    assert meter.reserve(prompt, 100, name="t") is None  # wait: two are under way
    meter.release(second)
    third = meter.reserve(prompt, 100, name="t")
    assert third is not None
    for each in (first, third):
        meter.settle(each, Completion("", 70, 100))
    with pytest.raises(BudgetError, match=r"raise it, and the same command goes on"):
        meter.reserve(prompt, 100, name="t")
    assert meter.total.cost == pytest.approx(2 * worst)


def test_the_frame_of_a_chat_is_set_aside_too() -> None:
    meter = Meter(path=None, judge="m", prices=Prices(1e6, 0), max_cost=64.0 + 1)  # 1 USD a token
    with pytest.raises(BudgetError):
        meter.reserve(Prompt("n", "", "ab"), 100, name="t")
    assert meter.reserve(Prompt("n", "", "a"), 100, name="t") is not None


def test_what_was_set_aside_for_failures_comes_back(server: JudgeServer) -> None:
    server.rule = lambda request, earlier: "ok" if request.prompt[-1] == "9" else "400"
    meter = Meter(path=None, judge="m", prices=PRICES, max_cost=0.001)  # one request's worst case, and no two
    with judge_of(client_of(server), meter=meter, parallel=4) as judge:
        futures = [judge.submit(case_of(i)) for i in range(10)]
        judge.finish()
        assert [future.result(0).rating is None for future in futures] == [True] * 9 + [False]
    assert server.at_once == 1


def test_the_limit_holds_with_many_at_once_and_the_run_goes_on(server: JudgeServer, tmp_path: Path) -> None:
    """The limit is raised until all are rated; what was paid for is not asked again."""
    server.delay = 0.005
    count, limit, stops = 200, 0.0, 0
    while True:
        limit += 60 * EACH
        meter = Meter(path=tmp_path / LEDGER, judge="m", prices=PRICES, max_cost=limit)
        with judge_of(client_of(server), meter=meter, cache=tmp_path / "c.db", parallel=16) as judge:
            judge.check()
            futures = [judge.submit(case_of(i)) for i in range(count)]
            judge.finish()
            errors = [future.exception(0) for future in futures]
        spent = len(server.requests) * EACH
        assert meter.total.cost == pytest.approx(spent)
        assert spent <= limit
        if not any(errors):
            break
        stops += 1
        assert {type(error) for error in errors if error} == {BudgetError}
        worst = ((len("You are a judge.") + len("Rate 199") + 64) * 2 + 64 * 8) / 1e6
        assert spent > limit - 2 * worst  # and it is used up, but for one request's worst case
    assert stops >= 3
    assert [future.result(0).rating for future in futures] == [rating_of(render(case_of(i)).user) for i in range(count)]
    assert {server.asked[render(case_of(i)).user] for i in range(count)} == {1}


def test_no_money_is_enough_for_what_is_known(server: JudgeServer, tmp_path: Path) -> None:
    with judge_of(client_of(server), cache=tmp_path / "c.db") as judge:
        judge.submit(case_of(1))
        judge.finish()
    meter = Meter(path=None, judge="m", prices=PRICES, max_cost=0.0)
    with judge_of(client_of(server), meter=meter, cache=tmp_path / "c.db") as judge:
        judge.check()
        assert judge.submit(case_of(1)).result(5).rating == rating_of(render(case_of(1)).user)
        with pytest.raises(BudgetError):
            judge.submit(case_of(2)).result(5)
    assert len(server.requests) == 1


def test_known_prices() -> None:
    assert known_prices("gpt-4o") == known_prices("gpt-4o-2024-08-06") == Prices(2.5, 10)
    assert known_prices("gpt-4o-2024-05-13") == Prices(5, 15)
    assert known_prices("claude-haiku-4-5-20251001") == Prices(1, 5)
    assert known_prices("claude-3-5-haiku-latest") == Prices(0.8, 4)
    for other in ("gpt-5-pro", "gpt-5.1", "gpt-4o-audio-preview", "claude-opus-4-8", "llama3:8b", "gpt-4-32k"):
        assert known_prices(other) is None
    assert all(prices.output > prices.input > 0 for prices in KNOWN_PRICES.values())


def config(judge: str, url: str | None) -> MtBenchConfig:
    return MtBenchConfig(
        target_model="t", tuned_model="u", bench_name="toy", judge_model_name=judge, judge_base_url=url
    )


def test_a_server_of_ones_own_has_no_list_price(monkeypatch: pytest.MonkeyPatch) -> None:
    for provider, model in (("openai", "gpt-4o"), ("anthropic", "claude-opus-4-5")):
        monkeypatch.delenv(f"{provider.upper()}_BASE_URL", raising=False)
        judge = f"{provider}:{model}"
        assert prices_of(config(judge, None)) == KNOWN_PRICES[model]
        assert prices_of(config(judge, PROVIDERS[provider].default_url + "/")) == KNOWN_PRICES[model]
        assert prices_of(config(judge, "http://localhost:1/v1")) is None
        monkeypatch.setenv(f"{provider.upper()}_BASE_URL", "http://localhost:1/v1/")
        assert prices_of(config(judge, None)) is None
