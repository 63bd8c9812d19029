"""Workers: real processes that are killed, frozen and cut off, on a file and on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from conftest import ROOT, Trio
from gated_task import N_QUESTIONS, Gated
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from postgresql import PASSWORD, PostgreSQL, binaries

from tvmerge.cli import main
from tvmerge.samplers.observations import N_START

N_TRIALS = 14
#: No test is timed; one that waits for what never comes ends after so many seconds.
PATIENCE = 200.0

needs_postgresql = pytest.mark.skipif(binaries() is None, reason="needs a PostgreSQL server: apt install postgresql")


@pytest.fixture(scope="module")
def database() -> Iterator[PostgreSQL]:
    server = PostgreSQL()
    yield server
    server.close()


@pytest.fixture
def task(tmp_path: Path) -> Gated:
    return Gated.make(tmp_path / "task")


class Group:
    """Processes of the command line, none of which outlives the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._all: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.said").open("ab") as said:
            command = [sys.executable, "-m", "tvmerge", *arguments]
            self._all[name] = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        return self._all[name]

    def said(self, name: str) -> str:
        return (self._folder / f"{name}.said").read_text()

    def status(self, name: str) -> int:
        return self._all[name].wait(PATIENCE)

    def wait_for(self, what: Callable[[], object]) -> None:
        """Wait until something is so, which these processes bring about."""
        begun = time.monotonic()
        while not what():
            over = time.monotonic() - begun > PATIENCE
            dead = [name for name, process in self._all.items() if process.poll() not in (None, -signal.SIGKILL)]
            assert not dead, "".join(self.said(name) for name in dead)
            assert not over, "it never came"
            time.sleep(0.1)

    def close(self) -> None:
        for process in self._all.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self._all.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    processes = Group(tmp_path)
    yield processes
    processes.close()


def trials(url: str, name: str = "tvmerge") -> list[FrozenTrial]:
    """All trials of a study; none if it is not begun."""
    path = url.removeprefix("sqlite:///")
    if path != url and not Path(path).exists():
        return []
    storage = RDBStorage(url)
    try:
        return optuna.load_study(study_name=name, storage=storage).trials
    except KeyError:
        return []
    finally:
        storage.remove_session()
        storage.engine.dispose()


def running(url: str, name: str = "tvmerge") -> dict[str, int]:
    """Worker → the trial that it runs."""
    return {t.user_attrs["worker"]: t.number for t in trials(url, name) if t.state == TrialState.RUNNING}


def search(trio: Trio, task: Gated, output: Path, *more: str) -> list[str]:
    return [
        *("jglue", *trio.flags(), *task.flags(), "--n_trials", str(N_TRIALS), "--output_dir", str(output)),
        *("--heartbeat", "1", "--optuna_sampler", "random", "--device", "cpu", *more),
    ]


def check_all_done(found: list[FrozenTrial], output: Path) -> None:
    """Every trial is finished, once, and is in the scores once; no two tried the same."""
    assert [t.number for t in found] == list(range(N_TRIALS))
    assert {t.state for t in found} == {TrialState.COMPLETE}
    # The first ones have one weight for all, which may be a given one.
    tried = [json.dumps(t.user_attrs["weights"], sort_keys=True) for t in found[N_START:]]
    assert len(set(tried)) == N_TRIALS - N_START
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    # What is recommended is scored on these questions too, unless it is one of the trials.
    searched = [line for line in lines if line["split"] == "search" and line["trial"] is not None]
    counts = Counter((line["trial"], line["question"]) for line in searched)
    assert set(counts.values()) == {1}
    assert Counter(number for number, _ in counts) == dict.fromkeys(range(N_TRIALS), N_QUESTIONS)
    assert (output / "best" / "recipe.yaml").is_file()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_on_one_machine_killed_workers_lose_nothing(trio: Trio, task: Gated, group: Group, tmp_path: Path) -> None:
    output = tmp_path / "run"
    url = f"sqlite:///{output / 'study.db'}"
    task.shut()
    group.start("search", *search(trio, task, output))
    group.wait_for(lambda: running(url))
    join = ["worker", "--output_dir", str(output), "--device", "cpu"]
    alone = group.start("alone", *join, "--restart", "false", "--name", "alone")
    parent = group.start("parent", *join, "--name", "restarted")
    group.wait_for(lambda: running(url).keys() == {"main", "alone", "restarted"})
    group.wait_for(lambda: task.child_of(parent.pid))
    before, child = running(url), task.child_of(parent.pid)
    assert child is not None
    alone.kill()
    os.kill(child, signal.SIGKILL)
    group.wait_for(lambda: trials(url)[before["alone"]].state == TrialState.WAITING)
    group.wait_for(
        lambda: "restarted" in running(url) and trials(url)[running(url)["restarted"]].user_attrs.get("repeats")
    )
    task.open()
    assert group.status("search") == 0, group.said("search")
    assert group.status("parent") == 0, group.said("parent")
    assert "worker restarted: died with status -9, starting it again" in group.said("parent")
    found = trials(url)
    check_all_done(found, output)
    assert [t.user_attrs.get("repeats", 0) for t in found if t.number in (before["alone"], before["restarted"])] == [
        1,
        1,
    ]
    assert found[before["alone"]].user_attrs["worker"] != "alone"


@needs_postgresql
def test_on_postgresql_workers_are_killed_and_frozen_and_nothing_is_lost(
    trio: Trio, task: Gated, group: Group, database: PostgreSQL, tmp_path: Path
) -> None:
    output, url = tmp_path / "run", database.url()
    task.shut()
    command = search(trio, task, output, "--storage", url, "--study_name", "four")
    group.start("search", *command)
    group.wait_for(lambda: running(url, "four"))
    names = [f"w{n}" for n in range(4)]
    join = ["worker", "--storage", url, "--study_name", "four", "--device", "cpu", "--restart", "false"]
    processes = {name: group.start(name, *join, "--name", name) for name in names}
    group.wait_for(lambda: running(url, "four").keys() == {"main", *names})
    before = running(url, "four")
    assert len(set(before.values())) == 5
    processes["w0"].kill()
    processes["w1"].kill()
    processes["w2"].send_signal(signal.SIGSTOP)
    handed_back = [before[name] for name in ("w0", "w1", "w2")]
    group.wait_for(lambda: all(trials(url, "four")[n].state == TrialState.WAITING for n in handed_back))
    task.open()
    group.wait_for(lambda: trials(url, "four")[before["w2"]].state == TrialState.COMPLETE)
    value = trials(url, "four")[before["w2"]].value
    processes["w2"].send_signal(signal.SIGCONT)
    for name in ("search", "w2", "w3"):
        assert group.status(name) == 0, group.said(name)
    found = trials(url, "four")
    check_all_done(found, output)
    assert [found[n].user_attrs["repeats"] for n in handed_back] == [1, 1, 1]
    assert found[before["w2"]].value == value
    assert found[before["w2"]].user_attrs["worker"] != "w2"
    done = everything(output)
    assert main(command) == 0
    assert trials(url, "four") == found
    assert everything(output) == done
    assert not [path for path, content in everything(tmp_path).items() if PASSWORD.encode() in content]


@needs_postgresql
def test_a_server_that_goes_away_ends_all_in_one_line_and_they_go_on_later(
    trio: Trio, task: Gated, group: Group, database: PostgreSQL, tmp_path: Path
) -> None:
    output, url = tmp_path / "run", database.url()
    task.shut()
    command = search(trio, task, output, "--storage", url)
    join = ["worker", "--storage", url, "--study_name", "run", "--device", "cpu", "--restart", "false"]
    group.start("search", *command)
    group.wait_for(lambda: running(url, "run"))
    group.start("worker", *join, "--name", "w")
    group.wait_for(lambda: len(running(url, "run")) == 2)
    database.stop()
    try:
        task.open()
        for name in ("search", "worker"):
            assert group.status(name) == 1, group.said(name)
            last = group.said(name).splitlines()[-1]
            assert re.match(r"tvmerge (jglue|worker): error: .*: cannot be written \(.*refused", last), last
            assert "Traceback" not in group.said(name)
        assert "the same command goes on" in group.said("search")
    finally:
        database.start()
    group.start("worker", *join, "--name", "w")
    assert main(command) == 0
    assert group.status("worker") == 0, group.said("worker")
    check_all_done(trials(url, "run"), output)
    assert PASSWORD not in group.said("search") + group.said("worker")


@pytest.fixture(scope="module")
def small(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, of two trials, that workers may join in vain."""
    folder = tmp_path_factory.mktemp("small")
    task = Gated.make(folder / "task")
    assert main(search(trio, task, folder / "run", "--n_trials", "2")) == 0
    return folder / "run"


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one line that a worker says."""
    capsys.readouterr()
    assert main(["worker", "--restart", "false", "--device", "cpu", *arguments]) == status
    errors = capsys.readouterr().err
    assert PASSWORD not in errors
    lines = [line for line in errors.splitlines() if not line.startswith("worker ")]
    assert len(lines) == 1, errors
    return lines[0]


def test_workers_say_in_one_line_what_is_not_there(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--output_dir or --storage is needed" in refuse(capsys)
    assert f"{tmp_path}: holds no study, start the search first" in refuse(capsys, "--output_dir", str(tmp_path))
    line = refuse(capsys, "--output_dir", str(small), "--study_name", "another")
    assert "holds no study 'another', it holds tvmerge" in line
    assert "no address of a database" in refuse(capsys, "--storage", f"somewhere:{PASSWORD}")
    assert "no such kind of database" in refuse(capsys, "--storage", f"nosuch://u:{PASSWORD}@127.0.0.1/x")
    refused = refuse(capsys, "--storage", f"postgresql+psycopg://u:{PASSWORD}@127.0.0.1:1/x")
    assert "127.0.0.1:1/x: cannot be opened as a study: " in refused
    # Drivers take a password as a parameter too.
    assert "127.0.0.1:1/x: cannot" in refuse(
        capsys, "--storage", f"postgresql+psycopg://127.0.0.1:1/x?password={PASSWORD}"
    )
    assert "none.db: there is no such file" in refuse(capsys, "--storage", f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    assert "--name must be letters" in refuse(capsys, "--output_dir", str(small), "--name", "../../elsewhere")
    assert "refused" in refused


def test_a_worker_finds_its_study_from_any_folder(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "the run"
    link.symlink_to(small)
    for given in (["--output_dir", "the run"], ["--storage", "sqlite:///the run/study.db"]):
        monkeypatch.chdir(tmp_path)
        assert main(["worker", "--restart", "false", "--device", "cpu", *given]) == 0
        assert " trials are done: there is nothing to do" in capsys.readouterr().err


@needs_postgresql
def test_workers_say_in_one_line_what_a_server_refuses(
    database: PostgreSQL, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "password authentication failed" in refuse(capsys, "--storage", database.url(f"{PASSWORD}-not"))
    assert 'database "nosuch" does not exist' in refuse(capsys, "--storage", database.url(database="nosuch"))
    assert "holds no study 'x'" in refuse(capsys, "--storage", database.url(), "--study_name", "x")


def test_a_worker_with_other_weights_is_refused(
    trio: Trio, task: Gated, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trio.target, tmp_path / "target")
    output = tmp_path / "run"
    assert main(search(Trio(tmp_path / "target", trio.base, trio.tuned), task, output, "--n_trials", "2")) == 0
    shutil.copy(trio.tuned / "model.safetensors", tmp_path / "target")
    line = refuse(capsys, "--output_dir", str(output))
    assert "target_model was 'weights " in line
    assert "another --output_dir" not in line


def test_ctrl_c_to_the_parent_alone_hands_the_trial_back(trio: Trio, task: Gated, group: Group, tmp_path: Path) -> None:
    output = tmp_path / "run"
    url = f"sqlite:///{output / 'study.db'}"
    task.shut()
    group.start("search", *search(trio, task, output))
    group.wait_for(lambda: running(url))
    parent = group.start("worker", "worker", "--output_dir", str(output), "--device", "cpu", "--name", "w")
    group.wait_for(lambda: "w" in running(url))
    group.wait_for(lambda: task.child_of(parent.pid))
    number, child = running(url)["w"], task.child_of(parent.pid)
    assert child is not None
    parent.send_signal(signal.SIGINT)
    assert group.status("worker") == 130
    assert group.said("worker").count("tvmerge worker: interrupted; its trial is handed back") == 1
    assert "Traceback" not in group.said("worker")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    handed_back = trials(url)[number]
    assert handed_back.state == TrialState.WAITING
    assert "repeats" not in handed_back.user_attrs, "nobody died"
    task.open()
    assert group.status("search") == 0, group.said("search")
    check_all_done(trials(url), output)


def test_a_trial_that_is_too_slow_fails_and_one_that_hangs_ends_the_process(
    trio: Trio, task: Gated, group: Group, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    url = f"sqlite:///{output / 'study.db'}"
    command = search(trio, task, output, "--trial_timeout", "10")
    task.shut()
    group.start("search", *command, "--n_trials", "5")
    group.wait_for(lambda: running(url))
    task.open()
    assert group.status("search") == 0, group.said("search")
    task.sleep(14)
    assert main([*command, "--n_trials", "6"]) == 0
    assert trials(url)[5].state == TrialState.FAIL
    assert trials(url)[5].user_attrs["failure"] == "TrialTimeout: it took longer than 10 s"
    task.sleep(1e6)
    group.start("hanging", *command)
    assert group.status("hanging") == 75, group.said("hanging")
    assert group.said("hanging").splitlines()[-1].startswith("the trial hangs where nothing can interrupt it")
    assert main(command) == 0
    found = trials(url)
    assert [t.number for t in found if t.state == TrialState.FAIL] == [5, 6]
    assert found[6].user_attrs["failure"] == "it took over 10 s and hung"
    assert len(found) == N_TRIALS


def test_a_worker_finds_its_study_from_any_folder_and_has_batches_of_its_own(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The study remembers the folder that its search was started in, and a worker goes there.
    for folder, place in ((small.parent, ["--output_dir", small.name]), (small, ["--storage", "sqlite:///study.db"])):
        monkeypatch.chdir(folder)
        capsys.readouterr()
        worker = ["worker", "--restart", "false", "--device", "cpu", "--batch_size", "3", "--name", "w", *place]
        assert main(worker) == 0, capsys.readouterr().err
