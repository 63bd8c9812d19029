"""The cache of completions: what is known is not asked, whoever else is at work and whoever is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from judge_server import JudgeServer, case_of, client_of, judge_of, rating_of, render

from tvmerge.errors import ConfigError, RunError
from tvmerge.judges import Completion, Prompt
from tvmerge.judges.cache import JudgmentCache, cache_key

#: A process that judges cases 0 to N - 1 and prints `done`.
RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from judge_server import *
count, url, cache = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
client = make_client("openai", ClientSettings(model="m", base_url=url, max_tokens=64))
with judge_of(client, cache=cache, parallel=8) as judge:
    futures = [judge.submit(case_of(i)) for i in range(count)]
    judge.finish()
    assert [f.result(0).rating for f in futures] == [rating_of(render(case_of(i)).user) for i in range(count)]
print("done")
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def start(server: JudgeServer, cache: Path, count: int) -> subprocess.Popen[str]:
    code = RUN.format(tests=str(ROOT / "tests"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code, str(count), f"{server.url}/v1", str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def end(process: subprocess.Popen[str]) -> None:
    out, errors = process.communicate(timeout=60)
    assert (out, errors) == ("done\n", "")


def test_what_comes_back_is_what_was_put(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "cache.db"
    whole = Completion("東京\n[[3]]\x00 end", 5, 6, refusal="no", estimated=True)
    cache = JudgmentCache(path)
    assert cache.get("k") is None
    cache.put("k", whole)
    cache.put("k", Completion("later", 1, 1))
    cache.close()
    cache = JudgmentCache(path)
    assert cache.get("k") == whole
    cache.close()


def test_the_key_depends_on_all_that_was_asked() -> None:
    client = {"provider": "openai", "model": "m", "temperature": 0.0, "max_tokens": 5}
    prompt = Prompt("single-v1", "s", "u")
    keys = [cache_key(client, prompt, repeat=0, attempt=0)]
    for name, other in (("provider", "x"), ("model", "x"), ("temperature", 0.5), ("max_tokens", 6)):
        keys.append(cache_key({**client, name: other}, prompt, repeat=0, attempt=0))
    keys += [cache_key(client, Prompt("single-v1", *each), repeat=0, attempt=0) for each in (("", "u"), ("su", ""))]
    keys += [cache_key(client, prompt, repeat=1, attempt=0), cache_key(client, prompt, repeat=0, attempt=1)]
    assert len(set(keys)) == len(keys)
    turned = dict(reversed(client.items()))
    assert cache_key(turned, Prompt("other", "s", "u"), repeat=0, attempt=0) == keys[0]
    cache_key(client, Prompt("n", "", "\ud800"), repeat=0, attempt=0)  # no Unicode, and still a key


def test_the_second_run_asks_nothing(server: JudgeServer, tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        rig = judge_of(client_of(server), cache=tmp_path / "c.db", repeats=2)
        with rig as judge:
            futures = [judge.submit(case_of(i)) for i in range(20)]
            judge.finish()
            said.append([future.result(0) for future in futures])
        assert sum(server.asked.values()) == 40
    assert said[0] == said[1]
    assert rig.meter.total.requests == 0


def test_failures_and_refusals_are_asked_again_by_the_next_process(server: JudgeServer, tmp_path: Path) -> None:
    faults = ["400", "bad-json", "hang", "html-200", "refusal", "empty"]
    server.rule = lambda request, earlier: faults[int(request.prompt[-1])] if not earlier else "ok"
    reasons = []
    for _ in range(2):
        client = client_of(server, timeout=0.3, max_retries=0)
        with judge_of(client, cache=tmp_path / "c.db") as judge:
            futures = [judge.submit(case_of(i)) for i in range(len(faults))]
            judge.finish()
            reasons.append([future.result(0).reason for future in futures])
    assert all(reasons[0])
    assert reasons[1] == [None] * len(faults)
    assert [server.asked[render(case_of(i)).user] for i in range(len(faults))] == [2] * len(faults)


def test_a_refusal_is_not_asked_again_by_the_same_process(server: JudgeServer, tmp_path: Path) -> None:
    server.rule = lambda request, earlier: "refusal"
    with judge_of(client_of(server), cache=tmp_path / "c.db") as judge:
        for _ in range(3):
            future = judge.submit(case_of(1))
            judge.finish()
            assert "I cannot rate this" in str(future.result(0).reason)
    assert server.asked[render(case_of(1)).user] == 1


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    text, other, folder = tmp_path / "a.txt", tmp_path / "other.db", tmp_path / "folder"
    text.write_text("not a database, and longer than a header of one hundred bytes " * 9)
    folder.mkdir()
    with sqlite3.connect(other) as file:
        file.execute("CREATE TABLE trials (number)")
    file.close()
    for path in (text, other, folder, text / "below.db"):
        with pytest.raises(ConfigError, match=str(path)) as error:
            JudgmentCache(path)
        assert "\n" not in str(error.value)
    with sqlite3.connect(other) as file:
        assert [name for (name,) in file.execute("SELECT name FROM sqlite_master")] == ["trials"]
    file.close()


def test_a_cache_that_cannot_be_written_stops_the_run(server: JudgeServer, tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    JudgmentCache(path).close()
    with judge_of(client_of(server), cache=path, parallel=1) as judge:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("DROP TABLE completions")
        other.close()
        futures = [judge.submit(case_of(i)) for i in range(50)]
        judge.finish()
        for future in futures:
            with pytest.raises(RunError, match=r"c\.db cannot be"):
                future.result(0)
    assert len(server.requests) <= 1


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache = JudgmentCache(tmp_path / "c.db")

    def work(first: int) -> None:
        for i in range(first, first + 200):
            cache.put(str(i), Completion(str(i), i, i))
            assert cache.get(str(i)) == Completion(str(i), i, i)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 800, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(cache.get(str(i)) == Completion(str(i), i, i) for i in range(900))
    cache.close()


def test_who_finds_the_cache_locked_waits(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    cache = JudgmentCache(path)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    unlock = threading.Timer(0.5, other.execute, ["COMMIT"])
    unlock.start()
    started = time.monotonic()
    assert cache.get("k") is None  # readers do not wait
    assert time.monotonic() - started < 0.4
    cache.put("k", Completion("a", 1, 1))
    assert time.monotonic() - started > 0.4
    assert cache.get("k") == Completion("a", 1, 1)
    unlock.join()
    other.close()
    cache.close()


def test_processes_share_a_cache(server: JudgeServer, tmp_path: Path) -> None:
    """Both make the file at once; a case is asked twice at most, when both are at it at the same time."""
    processes = [start(server, tmp_path / "c.db", 100) for _ in range(2)]
    for process in processes:
        end(process)
    assert set(server.asked.values()) <= {1, 2}
    before = sum(server.asked.values())
    end(start(server, tmp_path / "c.db", 100))
    assert sum(server.asked.values()) == before


def test_a_run_that_was_killed_goes_on(server: JudgeServer, tmp_path: Path) -> None:
    server.delay = 0.02
    killed = start(server, tmp_path / "c.db", 100)
    deadline = time.monotonic() + 60
    while len(server.requests) < 40:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=10)
    end(start(server, tmp_path / "c.db", 100))
    assert len(server.asked) == 100
    # Asked twice: at most the 8 that were under way when it was killed, and their replies that were not yet kept.
    assert sum(server.asked.values()) <= 100 + 2 * 8


def test_the_ratings_of_the_server_differ() -> None:
    """Or the tests above could not tell one answer from another."""
    assert len({rating_of(render(case_of(i)).user) for i in range(100)}) == 10
