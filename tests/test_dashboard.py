"""The dashboard: opened in a real browser, beside a real run, and asked for what cannot be."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import ROOT, TASKS, Trio, last_target
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from optuna_dashboard import get_note, save_note

from tvmerge.cli import main
from tvmerge.config import DashboardConfig
from tvmerge.dashboard import DashboardThread, open_study
from tvmerge.errors import StudyError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: A picture of one pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


def flags(trio: Trio, output: Path, n_trials: int) -> list[str]:
    tasks = ["--jglue_tasks", "tiny_choice,tiny_extract", "--task_dir", str(TASKS), "--jglue_limit", "12,6"]
    return last_target(["jglue", *trio.flags(), *tasks, "--n_trials", str(n_trials), "--output_dir", str(output)])


@contextmanager
def served(output: Path, *more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a dashboard in a process of its own."""
    command = [sys.executable, "-m", "tvmerge", "dashboard", "--output_dir", str(output), "--port", "0", *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "It has no login, and whoever opens it can change and delete studies." in process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, (line, process.stderr.read() if process.stderr else "")
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


def api(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}api/studies/1", timeout=60) as reply:
        found: dict[str, Any] = json.load(reply)
        return found


def shown(address: str, page: str, profile: Path) -> str:
    """What is on a page after its scripts ran."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", f"{address}{page}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_the_run(trio: Trio, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(flags(trio, output, 3)) == 0
    plot = (output / "score_by_trial.png").read_bytes()
    with served(output) as (address, process):
        trial = shown(address, "dashboard/studies/1/trials?numbers=1", tmp_path / "profile")
        assert "tvmerge" in trial
        assert "layers.0" in trial
        text = re.sub("<[^>]+>", " ", trial)
        assert re.search(r"Trial 1 *: score [\d.]+, complete", text)
        assert re.search(r"tiny_choice +[\d.]+ +12 ", " ".join(text.split()))
        study = shown(address, "dashboard/studies/1/note", tmp_path / "profile")
        assert "A merge found by tvmerge" in study
        assert "best uniform" in study
        plots = {each["filename"]: each for each in api(address)["artifacts"]}
        assert plots.keys() == {path.name for path in output.glob("*.png")}
        artifact = plots["score_by_trial.png"]
        home = shown(address, "dashboard/studies/1", tmp_path / "profile")
        assert f"/artifacts/1/{artifact['artifact_id']}" in home
        with urllib.request.urlopen(f"{address}artifacts/1/{artifact['artifact_id']}") as reply:
            assert reply.read() == plot
            assert reply.headers["Content-Type"] == "image/png"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")


def test_beside_a_run_neither_sees_an_error(trio: Trio, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(flags(trio, output, 2)) == 0
    command = [sys.executable, "-m", "tvmerge", *flags(trio, output, 25)]
    with served(output) as (address, process):
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ended = threading.Event()
        said: list[str] = []

        def wait() -> None:
            said.append(run.communicate()[0])
            ended.set()

        threading.Thread(target=wait).start()
        while not ended.is_set():
            api(address)
        assert run.returncode == 0, said[0]
        seen = api(address)
        while not all(trial["note"]["body"] for trial in seen["trials"]):
            ended.clear()
            ended.wait(1)
            seen = api(address)
        assert len(seen["trials"]) == 25
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1] == ""
    counts: dict[tuple[int, str], int] = {}
    for line in map(json.loads, (output / "scores.jsonl").read_text().splitlines()):
        if line["trial"] is not None and line["split"] == "search" and line["model"] == "merge":
            place = line["trial"], line["task"]
            counts[place] = counts.get(place, 0) + (line["score"] == 1)
    for trial in seen["trials"]:
        right = counts[trial["number"], "tiny_choice"]
        assert re.search(rf"\| tiny\\_choice \| [\d.]+ \| \d+ \| 0 \| {right} \| ", trial["note"]["body"])


@pytest.fixture
def study(tmp_path: Path) -> Iterator[optuna.Study]:
    """Trials of all kinds: of parameters, of weights as an attribute, failed."""
    storage = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    study = optuna.create_study(study_name="tvmerge", storage=storage, direction="maximize")
    study.add_trial(
        create_trial(
            value=7.5,
            params={"layers.0": 0.5, "layers.1": 1.5},
            distributions={"layers.0": FloatDistribution(0, 2), "layers.1": FloatDistribution(0, 2)},
            user_attrs={"task_scores": {"a|b": 7.5}, "seconds": 12.25, "worker": "gpu0", "unscored": 0.25},
        )
    )
    weights = {f"layers.{n}": n / 1000 for n in range(1164)}
    attributes = {"weights": weights, "scores": {"mine": "1101"}, "task_scores": {"mine": 0.75}}
    study.add_trial(create_trial(value=0.75, user_attrs=attributes))
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"failure": "RunError: no ```room``` <b>here</b>"}))
    yield study
    storage.remove_session()
    storage.engine.dispose()


@pytest.fixture
def thread(study: optuna.Study, tmp_path: Path) -> Iterator[DashboardThread]:
    storage, _ = open_study(DashboardConfig(output_dir=str(tmp_path)), tmp_path)
    yield DashboardThread(storage, study_name="tvmerge", folder=tmp_path)
    storage.remove_session()
    storage.engine.dispose()


def notes(study: optuna.Study) -> list[str]:
    """Of all trials, as optuna-dashboard itself reads them."""
    return [get_note(optuna.trial.Trial(study, trial._trial_id)) for trial in study.trials]


def test_notes_say_what_the_run_knows(study: optuna.Study, thread: DashboardThread, tmp_path: Path) -> None:
    answers, judgments = tmp_path / "model_answer", tmp_path / "model_judgment"
    answers.mkdir()
    judgments.mkdir()
    hostile = "````\n<script>alert(1)</script>\n" + "長" * 5000
    texts = ["東京です。", hostile, "c", "not shown"]
    lines = [{"question_id": n, "choices": [{"index": 0, "turns": [text, "二"]}]} for n, text in enumerate(texts)]
    (answers / "trial-0000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    entries = [{"model": "trial-0000", "question_id": n, "turn": t, "score": 9 - t} for n in range(3) for t in (1, 2)]
    entries += [{"model": "trial-0000-heldout", "question_id": 0, "turn": 1, "score": 1}]
    (judgments / "m_single.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    thread.look()
    first, big, failed = notes(study)
    assert "**Trial 0**: score 7.5000, complete, 12.2 s, worker gpu0, 25.0% unscored" in first
    assert r"| a\|b | 7.5000 |" in first
    assert "turn 1, rated 8:\n```text\n東京です。\n```" in first
    assert "turn 2, rated 7:" in first
    assert "`````text\n````\n<script>" in first  # a fence that no answer can close
    assert max(map(len, notes(study))) <= 2045
    assert "not shown" not in first
    assert "1164 weights, 0.000 to 1.163, mean 0.582" in big
    assert "1101" not in big
    assert "layers" not in big
    assert "````text\nRunError: no ```room``` <b>here</b>\n````" in failed


def test_what_a_user_wrote_stays_and_new_trials_get_notes(study: optuna.Study, thread: DashboardThread) -> None:
    mine = optuna.trial.Trial(study, study.trials[1]._trial_id)
    save_note(mine, "mine")
    thread.look()
    assert notes(study)[1] == "mine"
    study.add_trial(create_trial(value=1.0, params={}, distributions={}))
    # As if a user had been faster than the thread.
    late = optuna.trial.Trial(study, study.trials[3]._trial_id)
    save_note(late, "late")
    study.add_trial(create_trial(value=2.0, params={}, distributions={}))
    thread.look()
    assert notes(study)[3] == "late"
    assert "score 2.0000" in notes(study)[4]


def test_a_file_of_scores_that_is_replaced_is_read_anew(
    study: optuna.Study, thread: DashboardThread, tmp_path: Path
) -> None:
    path = tmp_path / "scores.jsonl"

    def write(trial: int, n: int) -> str:
        line = {"model": "merge", "trial": trial, "split": "search", "task": "mine"}
        return "".join(json.dumps({**line, "question": q, "score": float(q < 2)}) + "\n" for q in range(n))

    path.write_text(write(1, 4) + write(3, 4)[:-20])
    thread.look()
    assert "| mine | 0.7500 | 4 | 0 | 2 | 2 |" in notes(study)[1]
    replacement = tmp_path / "new"
    replacement.write_text(write(1, 4) + write(3, 5))
    replacement.replace(path)
    study.add_trial(create_trial(value=0.4, user_attrs={"task_scores": {"mine": 0.4}}))
    thread.look()
    assert "| mine | 0.4000 | 5 | 0 | 2 | 3 |" in notes(study)[3]


def test_pictures_are_artifacts_once_and_follow_their_files(
    study: optuna.Study, thread: DashboardThread, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(PNG)
    for _ in range(2):
        thread.look()
        thread._seen.clear()  # as at the next start
        metas = optuna.artifacts.get_all_artifact_meta(study)
        assert sorted(meta.filename for meta in metas) == ["a.png", "b.png"]
        assert {path.name for path in (tmp_path / "artifacts").iterdir()} == {meta.artifact_id for meta in metas}
    (tmp_path / "a.png").write_bytes(PNG + b"more")
    thread.look()
    assert optuna.artifacts.get_all_artifact_meta(study) == metas
    names = {meta.filename: tmp_path / "artifacts" / meta.artifact_id for meta in metas}
    assert names["a.png"].read_bytes() == PNG + b"more"
    assert names["b.png"].read_bytes() == PNG


def test_the_card_is_the_study_note_until_a_user_changes_it(
    study: optuna.Study, thread: DashboardThread, tmp_path: Path
) -> None:
    card = tmp_path / "best" / "README.md"
    card.parent.mkdir()
    for text in ("# Found\n" + "long " * 1000, "# Found again", "# Found last"):
        card.write_text(f"---\ntags: [merge]\n---\n\n{text}\n\n## Weights\n\n| a | 1 |\n")
        thread.look()
        assert get_note(study) == text.strip()
    save_note(study, "mine")
    card.write_text("# Newest")
    thread.look()
    assert get_note(study) == "mine"


def test_a_study_that_vanishes_and_comes_back(
    study: optuna.Study, thread: DashboardThread, capsys: pytest.CaptureFixture[str]
) -> None:
    thread.look()
    optuna.delete_study(study_name="tvmerge", storage=study._storage)
    thread.look()
    thread.look()
    assert capsys.readouterr().err.count("\n") == 1
    new = optuna.create_study(study_name="tvmerge", storage=study._storage, direction="maximize")
    new.add_trial(create_trial(value=1.0))
    thread.look()
    assert "score 1.0000" in notes(new)[0]


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_what_cannot_be_is_said_in_one_line(
    study: optuna.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ["--output_dir", str(tmp_path)]
    refused(["--output_dir", str(tmp_path / "no")], "there is no study", capsys)
    assert not (tmp_path / "no").exists()
    refused([*here, "--study_name", "other"], "holds no study 'other', --study_name may be tvmerge", capsys)
    refused(["--storage", f"sqlite:///{tmp_path}/none.db"], "there is no such file", capsys)
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "torn.db").write_bytes(b"x" * 5000)
    refused(["--storage", f"sqlite:///{tmp_path}/torn.db"], "file is not a database", capsys)
    refused(["--storage", "nothing://u:secret@host/x"], "nothing://u@host/x: there is no such kind of database", capsys)
    refused([*here, "--port", "65536"], "--port must be from 0 to 65535", capsys)
    refused([*here, "--host", " "], "--host is empty", capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused([*here, "--port", port], f"--port {port}: cannot listen there (Address already in use)", capsys)
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    refused(here, 'pip install "tvmerge[dashboard]"', capsys)


def test_a_study_of_another_optuna_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").touch()
    with pytest.raises(StudyError, match="holds 0 studies"):
        open_study(DashboardConfig(), tmp_path)


def test_other_machines_are_let_in_with_a_warning_only(study: optuna.Study, tmp_path: Path) -> None:
    with served(tmp_path, "--host", "0.0.0.0") as (_, process):
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert err.startswith("warning: --host 0.0.0.0 lets other machines in")
        assert err.count("\n") == 1
