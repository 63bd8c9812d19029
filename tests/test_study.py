"""Studies: resumed at any point they end as if they had never stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.distributions import FloatDistribution

from tvmerge.errors import RunError, StudyError
from tvmerge.evaluators import QuestionScore, Scored
from tvmerge.storage import STUDY_NAME, deletion_is_said, shown_url
from tvmerge.study import MergeStudy
from tvmerge.trial_queue import StudyPlan

NAMES = ["layers.0", "layers.1"]


def ranges(low: float, high: float) -> dict[str, FloatDistribution]:
    return dict.fromkeys(NAMES, FloatDistribution(low, high))


def points(*weights: float) -> list[dict[str, float]]:
    return [dict.fromkeys(NAMES, weight) for weight in weights]


def open_study(
    folder: Path, *, heartbeat: float = 15.0, storage: str | None = None, name: str = STUDY_NAME, **changes: Any
) -> MergeStudy:
    settings: dict[str, Any] = {
        "identity": {"mode": "layer", "tasks": ["a"]},
        "ranges": ranges(0.0, 2.0),
        "sampler": "TPE",
        "seed": 42,
        "first": points(0.0, 1.0, 0.5),
        **changes,
    }
    return MergeStudy(output_dir=folder, plan=StudyPlan(**settings), storage=storage, name=name, heartbeat=heartbeat)


def score(weights: Mapping[str, float], number: int) -> Scored:
    value = 1 - (weights["layers.0"] - 0.4) ** 2 - (weights["layers.1"] - 1.2) ** 2
    return Scored([QuestionScore("a", question, value) for question in (3, 8)], {"seen": number})


def run(folder: Path, n_trials: int, **changes: Any) -> list[tuple[int, dict[str, float], float]]:
    study = open_study(folder, **changes)
    while study.n_finished < n_trials:
        study.run_trial(score)
    results = study.results()
    study.close()
    return [(result.number, dict(result.weights), result.score) for result in results]


class Killed(BaseException):
    """What a kill does to a process: nothing after it happens."""


@pytest.mark.parametrize("sampler", ["TPE", "CMA-ES", "RSM"])
def test_a_study_that_stops_anywhere_ends_like_one_that_does_not(sampler: str, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    expected = run(straight, 20, sampler=sampler)

    def die(weights: Mapping[str, float], number: int) -> Scored:
        raise Killed

    for n_trials in (1, 2, 6, 14, 19):
        run(stopped, n_trials, sampler=sampler)
        study = open_study(stopped, sampler=sampler)
        with pytest.raises(Killed):
            study.run_trial(die)
        study.scores.append(score(dict.fromkeys(NAMES, 9.0), 0).scores, model="merge", trial=n_trials, split="search")
        with study.scores.path.open("a") as file:
            file.write('{"model": "merge", "tri\n\0\0\0\n{"model"')
        study.close()
    assert run(stopped, 20, sampler=sampler) == expected
    assert (stopped / "scores.jsonl").read_bytes() == (straight / "scores.jsonl").read_bytes()


def test_baselines_come_first(tmp_path: Path) -> None:
    results = run(tmp_path, 4)
    assert [list(weights.values()) for _, weights, _ in results[:3]] == [[0, 0], [1, 1], [0.5, 0.5]]


def test_a_baseline_outside_of_the_range_is_still_scored(tmp_path: Path) -> None:
    results = run(tmp_path, 15, ranges=ranges(0.2, 0.8), first=points(0.0, 1.0))
    assert [list(weights.values()) for _, weights, _ in results[:2]] == [[0, 0], [1, 1]]
    assert all(0.2 <= weight <= 0.8 for _, weights, _ in results[2:] for weight in weights.values())


def test_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    run(tmp_path, 2)
    before = (tmp_path / "scores.jsonl").read_bytes()
    with pytest.raises(StudyError, match="tasks was \\['a'\\] and is \\['b'\\]"):
        open_study(tmp_path, identity={"mode": "layer", "tasks": ["b"], "questions": ["77ab"]})
    with pytest.raises(StudyError, match="configuration: the questions are others: name another --output_dir"):
        open_study(tmp_path, identity={"mode": "layer", "tasks": ["a"], "questions": ["77ab"]})
    assert (tmp_path / "scores.jsonl").read_bytes() == before
    assert len(run(tmp_path, 3)) == 3, "the folder still works with its own configuration"


def test_a_new_study_takes_no_scores_of_an_old_one(tmp_path: Path) -> None:
    run(tmp_path, 4)
    study = open_study(tmp_path)
    study.scores.append(score(dict.fromkeys(NAMES, 1.0), 0).scores, model="tuned", trial=None, split="heldout")
    study.close()
    (tmp_path / "study.db").unlink()
    study = open_study(tmp_path, identity={"mode": "another"})
    assert study.scores.lines() == []
    study.close()


def test_lost_scores_are_restored(tmp_path: Path) -> None:
    run(tmp_path, 4)
    log = tmp_path / "scores.jsonl"
    before = log.read_bytes()
    with log.open("a") as file:
        file.write("{}\n7\n")
    open_study(tmp_path).close()
    assert log.read_bytes() == before
    log.unlink()
    open_study(tmp_path).close()
    assert log.read_bytes() == before
    log.write_bytes(b"\n".join(before.splitlines()[:5]) + b"\n")
    open_study(tmp_path).close()
    assert log.read_bytes() == before


def test_a_study_that_is_deleted_meanwhile_ends_the_run_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = open_study(tmp_path, heartbeat=0.05)
    study.run_trial(score)
    optuna.delete_study(study_name="tvmerge", storage=f"sqlite:///{tmp_path / 'study.db'}")
    time.sleep(0.3)  # the heartbeat looks too
    with pytest.raises(RunError, match="study tvmerge was deleted meanwhile"), deletion_is_said("tvmerge"):
        study.run_trial(score)
    study.close()
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(KeyError, match="another"), deletion_is_said("tvmerge"):
        raise KeyError("another")
    assert len(run(tmp_path, 3)) == 3


def test_lines_that_are_no_scores_are_left_out(tmp_path: Path) -> None:
    run(tmp_path, 3)
    before = (tmp_path / "scores.jsonl").read_text()
    line = json.loads(before.splitlines()[0])
    wrong: dict[str, Any] = {"score": "1", "trial": "0", "question": None, "task": 5, "model": [], "split": {}}
    for key, value in wrong.items():
        (tmp_path / "scores.jsonl").write_text(before + json.dumps({**line, key: value}) + "\n")
        run(tmp_path, 3)
        assert (tmp_path / "scores.jsonl").read_text() == before
    (tmp_path / "scores.jsonl").write_text(before.replace('"score": ', '"score": NaN, "was": '))
    run(tmp_path, 3)
    assert (tmp_path / "scores.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["sp ace#日本", "50%20%", "what?", "{SCHEMA_VERSION}", "a&b=c"])
def test_a_folder_of_any_name_holds_its_own_study(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    run(tmp_path / name, 2)
    assert {path.name for path in tmp_path.iterdir()} == {name}
    assert (tmp_path / name / "study.db").stat().st_size > 0
    assert len(run(tmp_path / name, 3)) == 3


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    with pytest.raises(StudyError, match="another run is using this folder"):
        open_study(tmp_path)
    study.close()
    open_study(tmp_path).close()


def break_with(error: Exception) -> Callable[[Mapping[str, float], int], Scored]:
    def evaluate(weights: Mapping[str, float], number: int) -> Scored:
        raise error

    return evaluate


def test_a_failed_trial_is_recorded_with_its_weights_and_is_no_score(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.run_trial(score)
    study.run_trial(score)
    assert study.run_trial(break_with(ValueError("no\nsense"))) is None
    assert study.run_trial(lambda _, __: Scored([QuestionScore("a", 1, None)])) is None
    study.run_trial(score)
    assert [result.number for result in study.results()] == [0, 1, 4]
    failed = study.trials()[2]
    assert failed.state == optuna.trial.TrialState.FAIL
    assert failed.value is None
    assert failed.user_attrs["failure"] == "ValueError: no sense"
    assert failed.params == dict.fromkeys(NAMES, 0.5)
    assert study.trials()[3].user_attrs["failure"] == "RunError: no question could be scored, of a"
    assert study.n_finished == 5
    study.close()


def test_three_failures_in_a_row_stop_the_run(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.run_trial(score)
    study.run_trial(score)
    study.run_trial(break_with(ValueError("broken")))
    study.run_trial(break_with(ValueError("broken")))
    with pytest.raises(RunError, match="3 trials in a row failed, the last with ValueError: broken"):
        study.run_trial(break_with(ValueError("broken")))
    study.close()


@pytest.mark.parametrize(
    ("n_before", "error"),
    [(0, ValueError("a baseline")), (1, ValueError("a baseline")), (4, MemoryError()), (4, OSError(28, "disk full"))],
)
def test_a_trial_that_must_not_be_lost_is_run_again(tmp_path: Path, n_before: int, error: Exception) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "broken").mkdir()
    run(tmp_path / "broken", n_before)
    study = open_study(tmp_path / "broken")
    with pytest.raises(RunError, match=f"trial {n_before}: {type(error).__name__}"):
        study.run_trial(break_with(error))
    study.close()
    assert run(tmp_path / "broken", 12) == run(tmp_path / "straight", 12)


def test_a_kill_while_the_file_is_made_leaves_none(tmp_path: Path) -> None:
    def die(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if "UNIQUE INDEX" in statement:  # its table is written by now
            raise Killed

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", die)
    try:
        with pytest.raises(Killed):
            open_study(tmp_path)
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", die)
    assert not (tmp_path / "study.db").exists()
    (tmp_path / ".study.db.1.tmp").mkdir()  # a real kill tidies nothing
    run(tmp_path, 3)
    assert len(run(tmp_path, 4)) == 4
    assert not (tmp_path / ".study.db.1.tmp").exists()


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("this is no database, however long it may be" * 100)
    with pytest.raises(StudyError, match=r"study\.db: cannot be opened as a study") as caught:
        open_study(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "study.db").unlink()
    open_study(tmp_path).close()


def test_every_question_of_every_trial_is_kept(tmp_path: Path) -> None:
    run(tmp_path, 3)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(line["trial"], line["task"], line["question"]) for line in lines] == [
        (trial, "a", question) for trial in range(3) for question in (3, 8)
    ]
    assert {line["split"] for line in lines} == {"search"}


def test_of_equal_trials_the_first_is_the_best(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(4):
        study.run_trial(lambda _, __: Scored([QuestionScore("a", 0, 0.5)]))
    assert study.best().number == 0
    study.close()


def test_optuna_and_its_dashboard_read_the_study(tmp_path: Path) -> None:
    run(tmp_path, 4)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    study = optuna.load_study(study_name="tvmerge", storage=storage)
    assert study.best_trial.params.keys() == set(NAMES)
    assert study.trials[0].user_attrs["task_scores"] == {"a": pytest.approx(study.trials[0].value)}
    storage.remove_session()
    storage.engine.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:secret@host/runs?sslmode=require",
        "postgresql+psycopg://host/runs?user=me&password=secret&sslmode=require&sslpassword=secret",
    ],
)
def test_an_address_is_shown_without_any_password(url: str) -> None:
    shown = shown_url(url)
    assert "secret" not in shown
    assert "host/runs" in shown
    assert "sslmode=require" in shown


def test_in_a_database_no_study_of_others_is_taken(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    mine = open_study(folders[0], storage=url, name="s")
    claim = mine.claim(9)
    assert claim is not None
    with pytest.raises(StudyError, match=r"study s holds a study of another .*: name another --study_name"):
        open_study(folders[1], storage=url, name="s", identity={"other": 1})
    assert mine.run(claim, score) is not None
    mine.close()
    foreign = optuna.create_study(study_name="foreign", storage=url, direction="maximize")
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    with pytest.raises(StudyError, match="study foreign: has trials that no run of tvmerge made"):
        open_study(folders[1], storage=url, name="foreign")
    assert not foreign.user_attrs
