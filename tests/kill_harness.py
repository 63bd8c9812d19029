"""Kills a search again and again at random moments of its life, and compares what it ends with.

`python tests/kill_harness.py --kills 100` is the long version, `--judged` that with a judge. A round is a run that is
killed a few times and then left alone; rounds go on until there were so many kills.

Processes are forked from one that has imported everything, as a kill in the middle of `import torch` tells nothing and
takes five seconds; the first of each call is one of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from conftest import ROOT, TASKS, Trio, save_mistral
from judge_server import KEY, JudgeServer, rating_of
from optuna.storages import RDBStorage

#: Runs the command line and writes down what it begins. With "-" it does so in a fork for each line of its input.
TRACED = """
import json, os, sys

from tvmerge import proof, run, study
from tvmerge.cli import main

path = sys.argv[1]


def say(*words):
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(words) + chr(10)).encode())
    os.close(descriptor)


def traced(owner, name, words):
    real = getattr(owner, name)

    def told(*args, **kwargs):
        say(*words(*args))
        return real(*args, **kwargs)

    setattr(owner, name, told)


traced(study.MergeStudy, "run", lambda self, claim, evaluate: ("trials", claim.number))
traced(proof.Proof, "_measured", lambda self, column, *rest: ("proof", column.model, column.trial, rest[-1]))
traced(proof.Proof, "save", lambda *args: ("saving",))
if sys.argv[2] != "-":
    os._exit(main(sys.argv[2:]))
for line in sys.stdin:
    child = os.fork()
    if not child:
        descriptor = os.open(path + ".errors", os.O_WRONLY | os.O_TRUNC | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os._exit(main(json.loads(line)))
    os.write(1, f"{child}\\n".encode())
    os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n".encode())
"""
#: What differs between two runs of the same trials.
OF_THIS_RUN = ("seconds", "beat", "repeats", "judge_usage")


class Processes:
    """Starts the command line and kills it."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._parent: subprocess.Popen[bytes] | None = None

    def run(self, arguments: list[str], *, moment: tuple[int, float] | None = None, fresh: bool = False) -> int:
        """The exit status of a process that is killed once it began so many things, and after so many seconds more."""
        if fresh:
            command = [sys.executable, "-c", TRACED, str(self.log), *arguments]
            with Path(f"{self.log}.errors").open("wb") as errors:
                process = subprocess.Popen(command, cwd=ROOT, stdout=errors, stderr=errors)
                if self._comes(moment, lambda seconds: _ends(process, seconds)):
                    process.send_signal(signal.SIGKILL)
                return process.wait()
        parent = self._parent or self._start()
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(json.dumps(arguments).encode() + b"\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        told = [parent.stdout]
        if self._comes(moment, lambda seconds: bool(select.select(told, [], [], seconds)[0])):
            os.kill(child, signal.SIGKILL)  # it is this one still: its parent tells before another one gets its number
        return int(parent.stdout.readline())

    def _comes(self, moment: tuple[int, float] | None, has_ended: Callable[[float], bool]) -> bool:
        """Wait for a moment; false if there is none, or the process ends before it."""
        if moment is None:
            return False
        n_events, seconds = len(self.events()) + moment[0], moment[1]
        while len(self.events()) < n_events:
            if has_ended(0.002):
                return False
        return not has_ended(seconds)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", TRACED, str(self.log), "-"]
        self._parent = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        return self._parent

    def close(self) -> None:
        if self._parent is not None:
            assert self._parent.stdin is not None
            assert self._parent.stdout is not None
            self._parent.stdin.close()
            self._parent.wait()
            self._parent.stdout.close()

    def events(self) -> list[list[Any]]:
        """What was begun so far, by all processes."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def errors(self) -> str:
        return Path(f"{self.log}.errors").read_text()


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def study_of(output: Path) -> list[tuple[object, ...]]:
    """All that is kept of the trials, but what differs between two runs of them."""
    storage = RDBStorage(f"sqlite:///{output / 'study.db'}")
    trials = optuna.load_study(study_name="tvmerge", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    return [
        (t.number, t.state, t.values, t.params, {k: v for k, v in t.user_attrs.items() if k not in OF_THIS_RUN})
        for t in trials
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def done_in(output: Path) -> set[tuple[Any, ...]]:
    """The events that need not come again: trials that are finished, models whose scores are written."""
    if not (output / "study.db").exists():
        return set()
    try:
        done = {("trials", number) for number, state, *_ in study_of(output) if state.is_finished()}  # type: ignore[attr-defined]
    except (KeyError, RuntimeError):  # the study is not begun
        return set()
    counts: Counter[tuple[Any, ...]] = Counter()
    if (output / "scores.jsonl").exists():
        for text in (output / "scores.jsonl").read_text().splitlines(keepends=True):
            if text.endswith("\n"):
                line = json.loads(text)
                counts["proof", line["model"], line["trial"], line["split"]] += 1
    most: dict[str, int] = {}
    for (*_, split), n in counts.items():
        most[split] = max(n, most.get(split, 0))
    return done | {key for key, n in counts.items() if n == most[key[-1]] and key[1:] != ("merge", key[2], "search")}


@dataclass
class Found:
    """What the kills came to."""

    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # what was under way
    requests: int = 0
    judgments: int = 0


@dataclass
class Harness:
    """A search, and what it ends with if nobody kills it.

    `arguments` maps a folder to the command; `server` is the judge, if there is one, of `at_once` requests.
    """

    folder: Path
    arguments: Callable[[Path], list[str]]
    server: JudgeServer | None = None
    at_once: int = 4

    def run(self, *, kills: int, seed: int) -> Found:
        """Rounds until there were so many kills."""
        processes, found, generator = Processes(self.folder / "events"), Found(), random.Random(seed)
        try:
            straight = self._directory("straight")
            assert processes.run(self.arguments(straight), fresh=True) == 0, processes.errors()
            self._forget()
            again = self._directory("again")
            begun = time.monotonic()
            assert processes.run(self.arguments(again)) == 0, processes.errors()
            begun = time.monotonic()
            timed = self._directory("timed")
            assert processes.run(self.arguments(timed)) == 0, processes.errors()
            whole = time.monotonic() - begun
            self._compare(straight, again)
            while found.kills.total() < kills:
                self._forget()
                output = self._directory(f"killed-{found.rounds}")
                self._round(processes, output, generator, whole, found, kills)
                self._compare(straight, output)
        finally:
            processes.close()
        return found

    def _directory(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name / "run"

    def _forget(self) -> None:
        if self.server is not None:
            self.server.asked.clear()
            self.server.requests.clear()

    def _round(
        self, processes: Processes, output: Path, generator: random.Random, whole: float, found: Found, kills: int
    ) -> None:
        found.rounds += 1
        n_kills = 0
        while True:
            done, n_events = done_in(output), len(processes.events())
            paid, asked = paid_in(output), self._judged()
            is_last = found.kills.total() >= kills
            # Half of them at any second of a run, the others once it has begun so many trials or models.
            moments = [(0, generator.uniform(0, whole)), (generator.randint(1, 6), generator.uniform(0, 0.2))]
            moment = None if is_last else generator.choice(moments)
            fresh = found.kills.total() == 0
            status = processes.run(self.arguments(output), moment=moment, fresh=fresh)
            begun = [tuple(event) for event in processes.events()[n_events:]]
            assert not done & set(begun), f"done twice: {sorted(done & set(begun), key=str)}"
            assert len(set(begun)) == len(begun)
            again = {prompt for prompt in (self._judged() - asked) if answer_to(prompt) in paid}
            assert not again, "a judgment was paid again"
            if status == 0:
                break
            assert status == -signal.SIGKILL, processes.errors()
            found.kills[begun[-1][0] if begun else "start"] += 1
            n_kills += 1
        lost = self._judged().total() - len(self._judged())
        assert lost <= n_kills * self.at_once, f"{n_kills} kills lost {lost} replies"
        found.requests += self._judged().total()
        found.judgments += len(self._judged())

    def _judged(self) -> Counter[str]:
        """How often each prompt was asked."""
        asked = {} if self.server is None else self.server.asked
        return Counter({prompt: n for prompt, n in asked.items() if not prompt.startswith("Reply with [[1]]")})

    @staticmethod
    def _compare(expected: Path, output: Path) -> None:
        assert study_of(output) == study_of(expected)
        assert files_of(output / "best") == files_of(expected / "best")
        ours, theirs = (sorted((each / "scores.jsonl").read_text().splitlines()) for each in (output, expected))
        assert ours == theirs
        assert not [path.name for path in output.iterdir() if path.name.endswith(".tmp")]


def answer_to(prompt: str) -> str:
    """What the judge answers: the prompt can be told from it."""
    return f"{hashlib.sha256(prompt.encode()).hexdigest()}\nRating: [[{rating_of(prompt)}]]"


def paid_in(output: Path) -> set[str]:
    """The answers of the judge that are kept."""
    path = output.parent / "cache" / "tvmerge" / "judgments.db"
    if not path.exists():
        return set()
    with closing(sqlite3.connect(path)) as cache:
        has_table = cache.execute("SELECT name FROM sqlite_master WHERE name = 'completions'").fetchone()
        return {text for (text,) in cache.execute("SELECT text FROM completions")} if has_table else set()


def jglue(trio: Trio, folder: Path) -> Harness:
    """A search on tasks."""
    return Harness(
        folder,
        lambda output: [
            *("jglue", *trio.flags(), "--jglue_tasks", "tiny_choice,tiny_extract", "--task_dir", str(TASKS)),
            *("--jglue_limit", "12,6", "--n_trials", "12", "--output_dir", str(output)),
        ],
    )


def mt_bench(trio: Trio, folder: Path, server: JudgeServer) -> Harness:
    """A search that a judge rates; each folder has a cache of its own."""
    questions = folder / "bench"
    questions.mkdir()
    entries = [
        {"question_id": 100 + n, "category": "writing", "turns": [f"{'abcdefghij'[n]}東", "京タワー"][: 1 + n % 2]}
        for n in range(10)
    ]
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (questions / "question.jsonl").write_text(text, encoding="utf-8")
    server.delay = 0.02
    server.text = lambda request, _: answer_to(request.prompt)
    return Harness(
        folder,
        lambda output: [
            *("mt_bench", *trio.flags(), "--bench_dir", str(questions), "--chat_template", "none"),
            *("--max_new_token", "6", "--n_trials", "9", "--output_dir", str(output)),
            *("--cache_dir", str(output.parent / "cache"), "--parallel", "4", "--judge_timeout", "5"),
            *("--judge_model", "openai:m", "--judge_base_url", f"{server.url}/v1"),
        ],
        server=server,
    )


@contextmanager
def judge() -> Iterator[JudgeServer]:
    """A judge on this machine, and a key for it."""
    os.environ |= {"OPENAI_API_KEY": KEY, "NO_PROXY": "*"}
    server = JudgeServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


def main() -> None:
    """Kill, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judged", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, judge() as server:
        root = Path(folder)
        base = save_mistral(root / "base", seed=0)
        drifted = {
            name: save_mistral(root / name, seed=n, drift_from=base) for n, name in enumerate(["target", "tuned"], 1)
        }
        trio = Trio(base=base, **drifted)
        harness = mt_bench(trio, root, server) if chosen.judged else jglue(trio, root)
        begun = time.monotonic()
        found = harness.run(kills=chosen.kills, seed=chosen.seed)
        print(f"{found} in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
