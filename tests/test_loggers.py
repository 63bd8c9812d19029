"""Loggers: what they were given is read back with the libraries' own readers, across resumes, kills and failures."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tvmerge import loggers
from tvmerge.config import JglueConfig
from tvmerge.config.search import LOGGER_NAMES
from tvmerge.errors import ConfigError
from tvmerge.evaluators import QuestionScore
from tvmerge.loggers import LOGGERS, Loggers, check_loggers, hide, open_loggers
from tvmerge.results import Candidate, Results, TrialRow

pytestmark = [
    # Of mlflow's own tables, as SQLAlchemy 2.1 sees them.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"),
]
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
PASSWORD = "hunter2hunter2"
SETTINGS = {"n_trials": 3, "freeze": None, "storage": f"postgresql+psycopg://me:{PASSWORD}@host/db"}
KEY = "0123456789abcdef" * 2 + "01234567"


def row(number: int, *, n_weights: int = 2, score: float | None = None) -> TrialRow:
    return TrialRow(
        number=number,
        state="complete" if score is not None else "failed",
        is_given=False,
        weights={f"layers.{n}": n / 100 for n in range(n_weights)},
        score=score,
        tasks={} if score is None else {"jnli": score, "none": None},
        seconds=1.5,
        cost=0.25,
        failure=None if score is not None else "RunError: no room",
        facts={"unscored": 0.0, "unscored_reasons": {}},
    )


TRIALS = [row(0, score=0.5), row(1, score=0.75), row(2), row(3, score=0.25, n_weights=1164)]


def results(trials: Sequence[TrialRow]) -> Results:
    candidates = [
        Candidate("target", [QuestionScore("jnli", 0, 0.0)]),
        Candidate("best", [QuestionScore("jnli", 0, 1)]),
    ]
    return Results("run", SETTINGS, len(trials), trials, candidates=candidates, table="| a |\n|---|", verdict="a gain")


Points = list[tuple[int, float]]


def read_tensorboard(folder: Path, name: str) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)] if name in events.Tags()["scalars"] else []


def read_mlflow(folder: Path, name: str) -> Points:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}")
    run = json.loads((folder / "loggers.json").read_text())["mlflow"]["run"]
    return [(metric.step, metric.value) for metric in client.get_metric_history(run, name)]


def wandb_records(path: Path) -> list[Any]:
    """The records of an offline run: LevelDB's log format, after seven bytes of W&B's own."""
    from wandb.proto import wandb_internal_pb2

    data, place, found, part = path.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def read_wandb(folder: Path, name: str) -> Points:
    points = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in wandb_records(path):
            items = {"/".join(each.nested_key) or each.key: each.value_json for each in record.history.item}
            if "trial" in items and name in items:
                points.append((int(items["trial"]), float(items[name])))
    return points


READERS: dict[str, Callable[[Path, str], Points]] = {
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "tensorboard": read_tensorboard,
}


@pytest.fixture(params=sorted(LOGGERS))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    if importlib.util.find_spec(LOGGERS[request.param][2]) is None:
        pytest.skip(f"{LOGGERS[request.param][2]} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("HOME", str(tmp_path))  # where keys and caches are
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    yield str(request.param)
    if request.param == "wandb":
        import wandb

        wandb.teardown()  # it reads the environment once in a process


def logged(name: str, folder: Path, trials: Sequence[TrialRow], *, ends: bool = False) -> None:
    """One process of a run."""
    opened = open_loggers([name], settings=SETTINGS, folder=folder)
    for n in range(1, len(trials) + 1):
        opened.log(trials[:n])
    if ends:
        opened.finish(results(trials), folder)
    opened.close()


def test_what_is_logged_is_read_back(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "score_by_trial.png").write_bytes(PNG)
    (folder / "report.html").write_text("<p>report</p>")
    logged(name, folder, TRIALS[:2])
    time.sleep(1.1)
    logged(name, folder, TRIALS, ends=True)  # a process that goes on
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    read = READERS[name]
    assert read(folder, "score") == [(0, 0.5), (1, 0.75), (3, 0.25)]
    assert read(folder, "best") == [(0, 0.5), (1, 0.75), (2, 0.75), (3, 0.75)]
    assert read(folder, "task/jnli") == [(0, 0.5), (1, 0.75), (3, 0.25)]
    assert read(folder, "failed") == [(0, 0), (1, 0), (2, 1), (3, 0)]
    assert read(folder, "judge_usd") == [(n, 0.25) for n in range(4)]
    weights = [(step, round(weight, 6)) for step, weight in read(folder, "weight/layers.1")]
    assert weights == [(0, 0.01), (1, 0.01), (2, 0.01)], "of 1,164 weights none is a number of its own"
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in written if PASSWORD.encode() in path.read_bytes()]


def test_a_trial_that_a_killed_process_logged(name: str, tmp_path: Path) -> None:
    logged(name, tmp_path, TRIALS[:3])
    time.sleep(1.1)  # folders of W&B's offline runs are named by the second
    path = tmp_path / "loggers.json"
    memory = json.loads(path.read_text())
    assert memory[name]["logged"] == [0, 1, 2]
    memory[name]["logged"] = [0, 1]  # killed before it was noted
    path.write_text(json.dumps(memory))
    logged(name, tmp_path, TRIALS)
    expected = [(0, 0.0), (1, 0.0), (2, 1.0), (3, 0.0)]
    if name == "wandb":  # it cannot be asked: the same numbers at the same step
        expected.insert(3, (2, 1.0))
    assert READERS[name](tmp_path, "failed") == expected


@pytest.mark.parametrize("name", ["tensorboard"], indirect=True)
def test_tensorboard_has_the_table_the_weights_and_the_pictures(name: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "weights.png").write_bytes(PNG)
    logged(name, tmp_path, TRIALS, ends=True)
    events: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Histograms("weights")[0].step == 3
    assert events.Histograms("weights")[0].histogram_value.num == 1164
    assert events.Tensors("table/text_summary")[0].tensor_proto.string_val == [b"| a |\n|---|"]
    assert events.Tensors("failure/text_summary")[0].step == 2
    assert (events.Images("weights")[0].width, events.Images("weights")[0].height) == (1, 1)
    assert read_tensorboard(tmp_path, "candidate/best/score") == [(3, 1.0)]


@pytest.mark.parametrize("name", ["mlflow"], indirect=True)
def test_mlflow_has_the_table_the_weights_and_the_pictures(name: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    (tmp_path / "weights.png").write_bytes(PNG)
    logged(name, tmp_path, TRIALS, ends=True)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    run = json.loads((tmp_path / "loggers.json").read_text())["mlflow"]["run"]
    assert {file.path for file in client.list_artifacts(run)} == {
        *("failures", "settings.json", "table.md", "weights", "weights.png")
    }
    place = Path(client.get_run(run).info.artifact_uri.removeprefix("file://"))
    assert (place / "weights.png").read_bytes() == PNG
    assert json.loads((place / "weights" / "trial-0003.json").read_text()) == TRIALS[3].weights
    assert client.get_run(run).data.params["n_trials"] == "3"
    assert client.get_run(run).info.status == "FINISHED"
    # A run that was deleted there begins anew.
    client.delete_run(run)
    logged(name, tmp_path, TRIALS)
    assert json.loads((tmp_path / "loggers.json").read_text())["mlflow"]["run"] != run
    assert len(read_mlflow(tmp_path, "failed")) == 4


@pytest.mark.parametrize("name", ["wandb"], indirect=True)
def test_wandb_goes_on_in_the_same_run(name: str, tmp_path: Path) -> None:
    logged(name, tmp_path, TRIALS[:3])
    time.sleep(1.1)
    logged(name, tmp_path, TRIALS, ends=True)
    paths = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    runs = {record.run.run_id for path in paths for record in wandb_records(path) if record.HasField("run")}
    assert len(paths) == 2
    assert runs == {json.loads((tmp_path / "loggers.json").read_text())["wandb"]["run"]}
    updates = [item for record in wandb_records(paths[1]) for item in record.summary.update]
    summary = {"/".join(item.nested_key) or item.key: item.value_json for item in updates}
    assert json.loads(summary["verdict"]) == "a gain"
    items = [item for record in wandb_records(paths[1]) for item in record.history.item]
    assert any("histogram" in item.value_json for item in items if "weights" in (item.key, *item.nested_key))


def assert_off(opened: Loggers, folder: Path, err: str, reason: str) -> None:
    started = time.monotonic()
    opened.log(TRIALS)
    opened.finish(results(TRIALS), folder)
    opened.close()
    assert time.monotonic() - started < 20, "the run waited"
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert re.search(reason, lines[0])
    assert KEY not in err
    assert PASSWORD not in err


@pytest.mark.parametrize("name", ["wandb", "mlflow"], indirect=True)
def test_no_network_turns_a_logger_off(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    monkeypatch.setattr(loggers, "OPEN_SECONDS", 3.0)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 3.0)
    opened = open_loggers([name], settings=SETTINGS, folder=tmp_path)
    assert_off(opened, tmp_path, capfd.readouterr().err, f"warning: --loggers {name} is off from here on: ")


@pytest.mark.parametrize("name", ["wandb"], indirect=True)
def test_no_key_turns_wandb_off_and_nobody_is_asked(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    opened = open_loggers([name], settings=SETTINGS, folder=tmp_path)
    assert_off(opened, tmp_path, capfd.readouterr().err, "warning: --loggers wandb is off from here on: .*(?i:key|log)")


class Broken:
    """A logger that breaks at a trial, or hangs there."""

    def __init__(self, *_: object) -> None:
        pass

    def log_trial(self, row: TrialRow, *, best: float | None) -> None:
        if row.number == 1:
            raise SystemExit(f"http://me:{PASSWORD}@host and {KEY}")
        if row.number == 2:
            time.sleep(60)

    def finish(self, results: Results, folder: Path) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("trials", "reason"), [(TRIALS, "SystemExit: http://me:…@host and …"), (TRIALS[2:], "within 1")]
)
def test_one_that_breaks_or_hangs_is_off_and_its_thread_is_left_alone(
    trials: list[TrialRow],
    reason: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loggers, "LOGGERS", {"broken": ("test_loggers", "Broken", "json")})
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    opened = open_loggers(["broken"], settings={}, folder=tmp_path)
    opened.log(trials)
    opened.close()
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert f"warning: --loggers broken is off from here on: {reason}" in err or reason in err
    assert KEY not in err


def test_a_missing_package_is_said_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(LOGGERS) == LOGGER_NAMES
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in LOGGERS:
        with pytest.raises(ConfigError, match=re.escape(f'pip install "tvmerge[{name}]"')):
            check_loggers([name])
    with pytest.raises(ConfigError, match="known are wandb, mlflow, tensorboard"):
        check_loggers(["tensorbord"])


def test_loggers_are_a_setting_and_no_part_of_the_identity() -> None:
    def config(*names: str) -> JglueConfig:
        return JglueConfig(target_model="a", tuned_model="b", base_model="c", jglue_tasks="d", loggers=list(names))

    assert config("wandb", "mlflow").identity() == config().identity()
    for names in (("wandb", "wandb"), ("tensorbord",)):
        with pytest.raises(ConfigError, match="--loggers must be different ones of wandb, mlflow, tensorboard"):
            config(*names)


def test_passwords_are_hidden() -> None:
    assert hide("a https://u:p@h/x?y=u:p b") == "a https://u:…@h/x?y=u:p b"
    assert hide("sqlite:////tmp/a.db http://h:80/a@b") == "sqlite:////tmp/a.db http://h:80/a@b"
