"""Whole runs through the command line: killed and resumed, finished twice, re-measured from what was saved."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from conftest import ROOT, TASKS, Trio, last_target, saved_lines
from optuna.storages import RDBStorage
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvmerge.checkpoint import Checkpoint
from tvmerge.cli import main
from tvmerge.evaluators import QuestionScore, mean_score
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.tasks import load_tasks
from tvmerge.hub import resolve
from tvmerge.models.transformers import TransformersModel

N_TRIALS = 12


def flags(trio: Trio, output: Path, *more: str) -> list[str]:
    command = [
        *("jglue", *trio.flags(), "--jglue_tasks", "tiny_choice,tiny_extract", "--task_dir", str(TASKS)),
        *("--jglue_limit", "12,6", "--n_trials", str(N_TRIALS), "--output_dir", str(output), *more),
    ]
    return last_target(command)


def trials(output: Path) -> list[tuple[int, dict[str, float], float | None, object]]:
    storage = RDBStorage(f"sqlite:///{output / 'study.db'}")
    study = optuna.load_study(study_name="tvmerge", storage=storage)
    found: list[tuple[int, dict[str, float], float | None, object]] = [
        (t.number, t.params, t.value, t.user_attrs["task_scores"]) for t in study.trials if t.value is not None
    ]
    storage.remove_session()
    storage.engine.dispose()
    return found


def best(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "best").iterdir())}


@pytest.fixture(scope="module")
def finished(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert main(flags(trio, output)) == 0
    return output


def test_a_run_leaves_what_it_promises(trio: Trio, finished: Path) -> None:
    left = {path.name for path in finished.iterdir() if path.suffix != ".png"} - {".lock"}
    assert left == {"best", "config.yaml", "report.html", "scores.jsonl", "study.db"}
    assert (finished / "score_by_trial.png").is_file()
    assert len(trials(finished)) == N_TRIALS
    recipe = yaml.safe_load((finished / "best" / "recipe.yaml").read_text())
    assert recipe["weights"].keys() == trials(finished)[0][1].keys()
    lines = [json.loads(line) for line in (finished / "scores.jsonl").read_text().splitlines()]
    for number, _, value, _ in trials(finished):
        scores = [
            QuestionScore(line["task"], line["question"], line["score"])
            for line in lines
            if (line["model"], line["trial"], line["split"]) == ("merge", number, "search")
        ]
        assert len(scores) == 18
        assert mean_score(scores) == value
    searched = {(line["task"], line["question"]) for line in lines if line["split"] == "search"}
    heldout = {(line["task"], line["question"]) for line in lines if line["split"] == "heldout"}
    assert not searched & heldout
    assert len(heldout) == 18 + 12


def test_the_saved_model_scores_what_the_study_says(finished: Path) -> None:
    folder = finished / "best"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    mine = saved_lines(finished)
    checkpoint = Checkpoint(resolve(str(folder)))
    evaluator = LmEvalEvaluator(
        tasks=load_tasks(["tiny_choice", "tiny_extract"], task_dir=TASKS),
        questions={
            task: [line["question"] for line in mine if line["task"] == task]
            for task in ("tiny_choice", "tiny_extract")
        },
    )
    live = TransformersModel.from_folder(folder, checkpoint=checkpoint, device="cpu")
    model = HarnessModel(live, batch_size=16)
    scores = evaluator.score(model, lambda _: None).scores
    assert [score.score for score in scores] == [line["score"] for line in mine]
    assert mean_score(scores) == recipe["score"]["search"]


def test_the_saved_model_loads_anywhere(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "best")
    tokenizer = AutoTokenizer.from_pretrained(finished / "best")
    ids = tokenizer("東京タワー", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "東京タワー"
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def test_the_same_command_again_does_nothing_twice(
    trio: Trio, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (finished / "best").iterdir()}
    study, scores = trials(finished), (finished / "scores.jsonl").read_bytes()
    capsys.readouterr()
    assert main(flags(trio, finished)) == 0
    assert "| **mean**" in capsys.readouterr().out
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (finished / "best").iterdir()}
    assert after == before
    assert trials(finished) == study
    assert (finished / "scores.jsonl").read_bytes() == scores


def test_the_written_configuration_runs_the_same(trio: Trio, finished: Path, tmp_path: Path) -> None:
    config = str(finished / "config.yaml")
    assert main(["jglue", "--config", config, "--output_dir", str(tmp_path / "again")]) == 0
    assert trials(tmp_path / "again") == trials(finished)
    assert best(tmp_path / "again") == best(finished)


def test_a_damaged_result_is_written_anew(trio: Trio, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "damaged"
    shutil.copytree(finished, output)
    (output / "best" / "tokenizer.json").unlink()
    assert main(flags(trio, output)) == 0
    assert best(output) == best(finished)


def test_a_console_that_knows_no_plus_minus_does_not_end_a_run(trio: Trio, finished: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "tvmerge", *flags(trio, finished)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert "recommended is" in result.stdout


def test_fewer_trials_than_are_done_run_none(trio: Trio, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "fewer"
    shutil.copytree(finished, output)
    assert main(flags(trio, output, "--n_trials", "5")) == 0
    assert trials(output) == trials(finished)
    assert yaml.safe_load((output / "config.yaml").read_text())["n_trials"] == N_TRIALS


def test_other_weights_in_the_same_folder_are_refused(
    trio: Trio, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "moved"
    shutil.copytree(finished, output)
    shutil.copytree(trio.target, tmp_path / "target")
    moved = flags(trio, output, "--target_model", str(tmp_path / "target"))
    assert main(moved) == 0, "the same weights at another place are the same model"
    shutil.copy(trio.tuned / "model.safetensors", tmp_path / "target")
    capsys.readouterr()
    assert main(moved) == 2
    assert "target_model was 'weights " in capsys.readouterr().err


def test_progress_on_a_terminal_shows_the_best_score_and_the_time_left(trio: Trio, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "tvmerge", *flags(trio, tmp_path / "out", "--n_trials", "4")]
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal closes when the process ends
        while chunk := os.read(master, 4096):
            shown += chunk
    os.close(master)
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"5 weights, 18 questions per trial, 30 held out; 0 of 4 trials done", text)
    assert re.search(r"trials: +\d+%.*[1-4]/4 \[\d+:\d+<\d+:\d+, .*best 0\.\d{3} \(trial \d\)", text)
    assert re.search(r"questions: +\d+%.*/18 ", text)
    assert re.search(r"heldout tuned: +\d+%.*/30 ", text)


def test_more_trials_go_on_from_the_finished_ones(trio: Trio, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "extended"
    assert main(flags(trio, output, "--n_trials", "8")) == 0
    assert main(flags(trio, output)) == 0
    assert trials(output) == trials(finished)
    assert best(output) == best(finished)


def test_another_configuration_in_the_same_folder_is_refused(
    trio: Trio, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "config.yaml").read_bytes()
    capsys.readouterr()
    assert main(flags(trio, finished, "--optuna_seed", "7", "--weight_max", "1.5")) == 2
    error = capsys.readouterr().err
    assert "optuna_seed was 42 and is 7, weight_max was 2.0 and is 1.5" in error
    assert error.count("\n") == 1
    assert (finished / "config.yaml").read_bytes() == before


#: Dies without a word at the n-th call of a function, in a run whose trials are all done.
DIE = """
import os, sys
from tvmerge import files, rebuild, study
from tvmerge.cli import main

module, name, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = {"files": files, "rebuild": rebuild, "ScoreLog": study.ScoreLog}[module]
real, calls = getattr(owner, name), []


def deadly(*args, **kwargs):
    calls.append(1)
    if len(calls) == n:
        os._exit(9)
    return real(*args, **kwargs)


setattr(owner, name, deadly)
sys.exit(main(sys.argv[4:]))
"""


@pytest.mark.parametrize(
    ("module", "name", "n"),
    [
        ("ScoreLog", "append", 2),  # between two models that are scored on the held-out questions
        ("rebuild", "copy_model_files", 1),  # weights written, the rest not
        ("files", "_flush", 4),  # in the middle of flushing
        ("files", "_flush", 9),  # best/ in its place, the old one not removed
        *(pytest.param("files", "_flush", n, marks=pytest.mark.full) for n in (1, 2, 3, 5, 6, 7, 8)),
        *(pytest.param("ScoreLog", "append", n, marks=pytest.mark.full) for n in (1, 3, 4)),
    ],
)
def test_a_run_that_dies_after_its_trials_ends_like_one_that_does_not(
    trio: Trio, finished: Path, tmp_path: Path, module: str, name: str, n: int
) -> None:
    output = tmp_path / "dying"
    shutil.copytree(finished, output)
    (output / "best" / "recipe.yaml").write_text("tvmerge: of an older version\n")
    lines = (output / "scores.jsonl").read_text().splitlines(keepends=True)
    (output / "scores.jsonl").write_text("".join(line for line in lines if '"merge"' in line and '"search"' in line))
    command = [sys.executable, "-c", DIE, module, name, str(n), *flags(trio, output)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 9
    assert main(flags(trio, output)) == 0
    assert best(output) == best(finished)
    assert (output / "scores.jsonl").read_text() == (finished / "scores.jsonl").read_text()
    assert not [path for path in output.iterdir() if path.name.endswith(".tmp")]


def test_what_kills_left_of_files_is_removed(trio: Trio, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    shutil.copytree(finished, output)
    die = (
        "import os, sys; from pathlib import Path; from tvmerge.files import write_bytes; "
        "os.fsync = lambda _: os._exit(9); write_bytes(Path(sys.argv[1]), b'half')"
    )
    for name in ("score_by_trial.png", "config.yaml", "best/README.md"):
        command = [sys.executable, "-c", die, str(output / name)]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert len(list(output.rglob("*.tmp"))) == 3
    # Of another command at work in this folder, and of somebody else's.
    others = {".rebuilt.k3x_9a0b.tmp", ".thesis.20241231.tmp", ".notes.12.tmp"}
    for name in others:
        (output / name).mkdir()
    assert main(flags(trio, output)) == 0
    assert {path.name for path in output.rglob("*.tmp")} == others


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(trio: Trio, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "interrupted"
    # So many trials that it cannot have ended before it is interrupted.
    command = [sys.executable, "-m", "tvmerge", *flags(trio, output, "--n_trials", "1000")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("trial 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 130
    assert "interrupted; the same command goes on where it stopped" in rest
    assert "Traceback" not in rest
    kept = trials(output)
    assert 3 <= len(kept) < 1000
    assert main(flags(trio, output, "--n_trials", str(max(len(kept) + 1, N_TRIALS)))) == 0
    assert trials(output)[: len(kept)] == kept
    assert trials(output)[:N_TRIALS] == trials(finished)


@pytest.mark.parametrize(("mode", "sampler"), [("all", "CMA-ES"), ("parameter", "TPE"), ("parameter", "RSM")])
def test_every_granularity_and_sampler_runs(trio: Trio, tmp_path: Path, mode: str, sampler: str) -> None:
    output = tmp_path / "out"
    assert main(flags(trio, output, "--optimize_mode", mode, "--optuna_sampler", sampler)) == 0
    assert len(trials(output)[0][1]) == {"all": 21, "parameter": 12}[mode]


def test_without_held_out_questions_the_report_says_so(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(trio, tmp_path / "out", "--holdout", "0", "--n_trials", "3")) == 0
    assert "the very questions that were searched on" in capsys.readouterr().out
