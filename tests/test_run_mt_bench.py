"""Whole runs that a judge rates: a real server on this machine, FastChat's own tools, kills, faults and budgets."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import ROOT, Trio
from judge_server import KEY, JudgeServer, Request, rating_of
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from tvmerge.cli import main
from tvmerge.evaluators import QuestionScore, mean_score

N_TRIALS = 9
CHECK = "Reply with [[1]] and with nothing else."


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty questions, half of them of two turns, of two categories."""
    folder = tmp_path_factory.mktemp("benches") / "mine"
    folder.mkdir()
    entries = [
        {
            "question_id": 100 + n,
            "category": "math" if n % 2 else "writing",
            "turns": [f"{'abcdefghij'[n % 10]}東{'ab'[n // 10]}", "京タワー"][: 1 + n // 10],
            **({"reference": ["ab", "cd"][: 1 + n // 10]} if n % 2 else {}),
        }
        for n in range(20)
    ]
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (folder / "question.jsonl").write_text(text, encoding="utf-8")
    return folder


def flags(trio: Trio, bench: Path, output: Path, server: JudgeServer | None = None, *more: str) -> list[str]:
    judge = ["--judge_model", "openai:m", "--judge_base_url", f"{server.url}/v1"] if server else []
    return [
        *("mt_bench", *trio.flags(), "--bench_dir", str(bench), "--chat_template", "none", "--max_new_token", "6"),
        *("--n_trials", str(N_TRIALS), "--output_dir", str(output), "--cache_dir", str(output.parent / "cache")),
        *("--batch_size", "auto", "--judge_timeout", "5", "--judge_retries", "1", *judge, *more),
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trials(output: Path) -> list[FrozenTrial]:
    storage = RDBStorage(f"sqlite:///{output / 'study.db'}")
    found = optuna.load_study(study_name="tvmerge", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    return found


def scores_of(output: Path) -> dict[str, list[QuestionScore]]:
    """Model, as FastChat's files call it, → its scores in scores.jsonl."""
    found: dict[str, list[QuestionScore]] = {}
    for line in lines(output / "scores.jsonl"):
        name = line["model"] if line["trial"] is None else f"trial-{line['trial']:04d}"
        name += "-heldout" if line["split"] == "heldout" else ""
        score = QuestionScore(line["task"], line["question"], line["score"], line.get("turn", 1), line.get("choice", 0))
        found.setdefault(name, []).append(score)
    return found


def show_result(output: Path, judge: str = "m") -> dict[str, float]:
    """What FastChat's own command prints: model → mean over all turns."""
    path = output / "model_judgment" / f"{judge}_single.jsonl"
    command = [
        "-W",
        "ignore",
        "-m",
        "fastchat.llm_judge.show_result",
        "--bench-name",
        "mt_bench",
        "--input-file",
        str(path),
    ]
    shown = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
    average = shown.partition("########## Average ##########")[2]
    return {name: float(score) for name, score in re.findall(r"^([\w\-]+) +([\d.]+)$", average, flags=re.MULTILINE)}


def everything(output: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file())


def asked(server: JudgeServer) -> Mapping[str, int]:
    return {prompt: n for prompt, n in server.asked.items() if prompt != CHECK}


def test_a_run_is_judged_as_the_server_says_and_as_fastchat_reads_it(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(flags(trio, bench, output, server)) == 0
    captured = capsys.readouterr()
    assert set(asked(server).values()) == {1}, "no judgment is paid for twice"
    judgments = lines(output / "model_judgment" / "m_single.jsonl")
    assert all(line["score"] == rating_of(line["user_prompt"]) for line in judgments)
    assert {line["user_prompt"] for line in judgments} == set(asked(server))
    assert {tuple(line["judge"]) for line in judgments} == {
        ("m", f"single{math}-v1{turn}") for math in ("", "-math") for turn in ("", "-multi-turn")
    }
    scores = scores_of(output)
    ours = {name: mean_score(found) for name, found in scores.items()}
    assert show_result(output) == pytest.approx(ours, abs=1e-6)
    for trial in trials(output):
        assert trial.value == ours[f"trial-{trial.number:04d}"]
        assert trial.user_attrs["unscored"] == 0
        assert trial.user_attrs["judge_usage"]["tokens_out"] == 7 * trial.user_attrs["judge_usage"]["requests"]
    answers = lines(output / "model_answer" / "trial-0000.jsonl")
    asked_turns = {line["question_id"]: line["turns"] for line in lines(bench / "question.jsonl")}
    assert all(len(line["choices"][0]["turns"]) == len(asked_turns[line["question_id"]]) for line in answers)
    assert len(answers) == 14
    assert "| writing " in captured.out
    assert re.search(r"trial 9/9: score [\d.]+, best [\d.]+ \(trial \d\), judge [\d.]+ k tokens", captured.err)
    assert KEY.encode() not in everything(tmp_path)
    assert KEY not in captured.out + captured.err


def test_the_same_answers_are_never_judged_twice(trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path) -> None:
    assert main(flags(trio, bench, tmp_path / "first", server)) == 0
    before = dict(asked(server))
    assert main(flags(trio, bench, tmp_path / "second", server, "--parallel", "2", "--batch_size", "3")) == 0
    assert asked(server) == before
    assert (tmp_path / "first" / "scores.jsonl").read_bytes() == (tmp_path / "second" / "scores.jsonl").read_bytes()
    # Nor does a run that is finished ask anything but whether the judge is there.
    n_requests = len(server.requests)
    assert main(flags(trio, bench, tmp_path / "first", server)) == 0
    assert len(server.requests) == n_requests + 1


def test_what_a_kill_left_of_a_trial_does_not_count(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert main(flags(trio, bench, output, server, "--n_trials", "7")) == 0
    path = output / "model_judgment" / "m_single.jsonl"
    entry = lines(path)[0]
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write(json.dumps({**entry, "model": "trial-0008", "score": 1})[:50])
    assert main(flags(trio, bench, output, server, "--n_trials", "7")) == 0
    assert path.read_bytes() == whole, "a torn line alone"
    with path.open("a") as file:
        file.write(json.dumps({**entry, "model": "trial-0007", "score": 1}) + "\n")
        file.write(json.dumps({**entry, "model": "trial-0008", "score": 1})[:50])
    (output / "model_answer" / "trial-0007.jsonl").write_text("{}\n")
    assert main(flags(trio, bench, output, server, "--n_trials", "8")) == 0
    ours = {name: mean_score(found) for name, found in scores_of(output).items()}
    assert show_result(output) == pytest.approx(ours, abs=1e-6)
    assert lines(output / "model_answer" / "trial-0007.jsonl")[0]["model_id"] == "trial-0007"


def test_an_outage_of_the_judge_is_no_fault_of_a_trial(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "broken").mkdir()
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    assert main(flags(trio, bench, straight, server)) == 0
    before = len(server.requests)
    server.rule = lambda request, earlier: "cut" if len(server.requests) > before + 80 else "ok"
    assert main(flags(trio, bench, broken, server, "--judge_retries", "0")) == 1
    assert re.search(r"\d+ of 22 judgments failed, one with: .*; try again later", capsys.readouterr().err)
    assert not [trial for trial in trials(broken) if "failure" in trial.user_attrs]
    # It may also be short: then what was lost is asked for again, and the run does not stop.
    once: set[str] = set()

    def cut_once(request: Request, earlier: int) -> str:
        is_first = request.prompt not in once and request.prompt != CHECK
        once.add(request.prompt)
        return "cut" if is_first and len(once) < 30 else "ok"

    server.rule = cut_once
    assert main(flags(trio, bench, broken, server, "--judge_retries", "0")) == 0
    assert scores_of(broken) == scores_of(straight)
    assert everything(broken / "best") == everything(straight / "best")


def refuses(share: float, seed: int = 0) -> Any:
    """A rule by which a share of the prompts is refused, always the same ones."""

    def rule(request: Request, earlier: int) -> str:
        chosen = random.Random(f"{seed}/{request.prompt}").random() < share
        return "refusal" if chosen and request.prompt != CHECK else "ok"

    return rule


def test_unscored_answers_are_left_out_and_shown(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.rule = refuses(0.15)
    output = tmp_path / "run"
    assert main(flags(trio, bench, output, server, "--max_unscored", "0.9")) == 0
    unscored = [score for found in scores_of(output).values() for score in found if score.score is None]
    assert unscored
    judgments = lines(output / "model_judgment" / "m_single.jsonl")
    refused = [line for line in judgments if line["score"] == -1]
    assert len(refused) == len(unscored)
    assert all("I cannot rate this" in line["reason"] for line in refused)
    # -1 is how FastChat spells it; it enters no mean, ours or FastChat's.
    ours = {name: mean_score(found) for name, found in scores_of(output).items()}
    assert show_result(output) == pytest.approx(ours, abs=1e-6)
    captured = capsys.readouterr()
    assert re.search(r"trial \d/9: score .* k tokens, [\d.]+% unscored", captured.err)
    assert re.search(r"\| unscored +\|  +\| +[\d.]+%", captured.out)
    for trial in trials(output):
        found = scores_of(output)[f"trial-{trial.number:04d}"]
        assert trial.user_attrs["unscored"] == len({score.question for score in found if score.score is None}) / 14


def test_a_model_that_goes_away_is_not_scored_as_the_one_before(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(trio.tuned, tuned)

    def rule(request: Request, earlier: int) -> str:
        if len(server.requests) == 60:
            (tuned / "model.safetensors").rename(tuned / "elsewhere")
        return "ok"

    server.rule = rule
    output = tmp_path / "run"
    command = flags(trio, bench, output, server)
    command[command.index("--tuned_model") + 1] = str(tuned)
    assert main(command) == 2
    assert str(tuned) in capsys.readouterr().err
    finished = {trial.number for trial in trials(output) if trial.value is not None}
    assert 0 < len(finished) < N_TRIALS
    assert set(scores_of(output)) == {f"trial-{number:04d}" for number in finished}
    assert {path.stem for path in (output / "model_answer").iterdir()} == set(scores_of(output))
    (tuned / "elsewhere").rename(tuned / "model.safetensors")
    assert main(command) == 0
    assert set(asked(server).values()) == {1}


def test_a_trial_with_too_many_unscored_answers_fails(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after: list[str] = []

    def rule(request: Request, earlier: int) -> str:
        if request.prompt != CHECK:
            after.append(request.prompt)
        return "refusal" if 90 < len(after) < 110 else "ok"

    server.rule = rule
    output = tmp_path / "run"
    assert main(flags(trio, bench, output, server, "--holdout", "0", "--parallel", "1")) == 0
    failed = [trial for trial in trials(output) if trial.value is None]
    assert failed
    for trial in failed:
        assert (
            "questions lack a rating, more than --max_unscored 0.1 allows; most often: " in trial.user_attrs["failure"]
        )
        assert "I cannot rate this" in trial.user_attrs["failure"]
        assert f"trial-{trial.number:04d}" not in scores_of(output)
        assert not (output / "model_answer" / f"trial-{trial.number:04d}.jsonl").exists()
    assert "lack a rating" in capsys.readouterr().err


def test_a_judge_that_fails_on_the_target_stops_the_run_and_the_same_command_goes_on(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    server.rule = refuses(0.5)
    assert main(flags(trio, bench, output, server)) == 1
    assert "trial 0: RunError: " in capsys.readouterr().err
    # A refusal is not remembered, and what was judged is.
    before = dict(asked(server))
    n_requests = len(server.requests)
    server.rule = lambda request, earlier: "401" if len(server.requests) > n_requests + 60 else "ok"
    assert main(flags(trio, bench, output, server)) == 2
    assert KEY not in (error := capsys.readouterr().err)
    assert "OPENAI_API_KEY is refused" in error
    finished = [trial.number for trial in trials(output) if trial.value is not None]
    judged = refuses(0.5)
    for request in server.requests[:n_requests]:
        again = asked(server).get(request.prompt, 0) - before.get(request.prompt, 0)
        assert again == (judged(request, 0) == "refusal")
    server.rule = lambda request, earlier: "ok"
    assert main(flags(trio, bench, output, server)) == 0
    assert 0 < len(finished) < N_TRIALS
    assert all(trial.value is not None for trial in trials(output)), "the trial under way is no failure"


def test_the_run_stops_before_the_judge_costs_too_much(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    entries = [
        {"name": name, "system_prompt": "", "prompt_template": f"{fields} {name}"}
        for name, fields in (
            ("single-v1", "{question}{answer}"),
            ("single-math-v1", "{question}{answer}"),
            ("single-v1-multi-turn", "{answer_1}{answer_2}"),
            ("single-math-v1-multi-turn", "{answer_1}{answer_2}"),
        )
    ]
    short = tmp_path / "short.jsonl"  # what is set aside for a request is by the bytes of its prompt
    short.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    prices = ["--judge_price_in", "1000", "--judge_price_out", "1000", "--judge_max_tokens", "16"]
    prices += ["--judge_file", str(short)]
    ledger = output / "judge_usage.jsonl"
    for limit in (0.5, 1.0):
        assert main(flags(trio, bench, output, server, *prices, "--max_judge_cost", str(limit))) == 1
        error = capsys.readouterr().err
        assert "raise it, and the same command goes on" in error
        spent = sum(line["cost"] for line in lines(ledger))
        assert limit - 0.25 < spent <= limit
        assert not [trial for trial in trials(output) if "failure" in trial.user_attrs]
    assert main(flags(trio, bench, output, server, *prices, "--max_judge_cost", "100")) == 0
    assert "$" in capsys.readouterr().err
    assert set(asked(server).values()) == {1}
    total = sum(line["cost"] for line in lines(ledger))
    by_trial = sum(trial.user_attrs["judge_usage"]["cost"] for trial in trials(output))
    heldout = sum(line["cost"] for line in lines(ledger) if "heldout" in line["model"] or not line["model"])
    assert total == pytest.approx(by_trial + heldout)
    assert main(flags(trio, bench, tmp_path / "other", server, "--max_judge_cost", "1")) == 2
    assert "--judge_price_in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "fault", "message"),
    [
        (["--judge_model", "gpt-4o"], None, "OPENAI_API_KEY is not set"),
        (["--judge_model", "claude-haiku-4-5"], None, "ANTHROPIC_API_KEY is not set"),
        (["--judge_model", "openai:m", "--judge_base_url", "http://127.0.0.1:9/v1"], None, "127.0.0.1:9"),
        (["--judge_model", "openai:m", "--judge_base_url", "nonsense"], None, "base_url"),
        (["--judge_model", "openai:m"], "404", "does not exist"),
        (["--judge_model", "openai:m"], "401", "is refused"),
        (["--judge_model", "openai:m"], "html-200", "HTML page"),
        (["--judge_model", "openai:"], None, "names no model"),
        (["--judge_model", "transformers:nowhere"], None, "nowhere"),
        (["--judge_model", "rouge_l"], None, None),
    ],
)
def test_a_judge_that_cannot_be_asked_is_found_before_a_model_is_loaded(
    settings: list[str],
    fault: str | None,
    message: str | None,
    trio: Trio,
    bench: Path,
    server: JudgeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if fault is None:
        monkeypatch.delenv("OPENAI_API_KEY")
        monkeypatch.delenv("ANTHROPIC_API_KEY")
    else:
        server.rule = lambda request, earlier: fault
        settings = [*settings, "--judge_base_url", f"{server.url}/v1"]
    # With a target that is not there either: the judge is looked at first.
    target = tmp_path / "no model"
    command = flags(trio, bench, tmp_path / "run", None, *settings)
    command[command.index("--target_model") + 1] = str(target)
    started = time.monotonic()
    assert main(command) == 2
    assert time.monotonic() - started < 20
    error = capsys.readouterr().err
    assert (message or str(target)) in error
    assert error.count("\n") == 1
    assert KEY not in error
    assert not (tmp_path / "run").exists()


def test_a_question_that_the_model_cannot_answer_is_unscored_and_never_judged(
    trio: Trio, server: JudgeServer, tmp_path: Path
) -> None:
    entries = [{"question_id": n, "category": "c", "turns": ["ab" + "c" * n]} for n in range(12)]
    entries += [{"question_id": 100, "category": "c", "turns": ["a" * 200, "b"]}]
    entries += [{"question_id": 101, "category": "c", "turns": ["a", "b" * 200]}]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    output = tmp_path / "run"
    command = flags(trio, tmp_path, output, server, "--holdout", "0", "--max_unscored", "0.3")
    assert main(command) == 0
    answers = {line["question_id"] for line in lines(output / "model_answer" / "trial-0000.jsonl")}
    assert answers == set(range(12))
    judgments = [line for line in lines(output / "model_judgment" / "m_single.jsonl") if line["model"] == "trial-0000"]
    unscored = {(line["question_id"], line["turn"]): line["reason"] for line in judgments if line["score"] == -1}
    assert set(unscored) == {(100, 1), (100, 2), (101, 2)}
    assert all("the model takes 128" in reason for reason in unscored.values())
    assert not any("a" * 200 in prompt or "b" * 200 in prompt for prompt in asked(server))
    assert trials(output)[0].user_attrs["unscored"] == 2 / 14
    assert not any("ERROR" in prompt for prompt in asked(server)), "FastChat judges this word as an answer"


def test_choices_and_repeats(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.text = lambda request, earlier: f"[[{2 + earlier}]]"
    output = tmp_path / "run"
    more = ("--num_choices", "2", "--judge_repeats", "3", "--temperature", "1.5", "--parallel", "1")
    assert main(flags(trio, bench, output, server, *more)) == 0
    scores = scores_of(output)["trial-0000"]
    assert {(score.turn, score.choice) for score in scores} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    judged = [line for line in lines(output / "model_judgment" / "m_single.jsonl") if line["model"] == "trial-0000"]
    first = [line for line in judged if line["ratings"] == [2, 3, 4]]
    assert all(line["score"] == 3 for line in first)
    assert len(first) == len(judged)
    assert trials(output)[0].user_attrs["judge_spread"] == 2
    assert "repeats 2.00 apart" in capsys.readouterr().err
    answers = lines(output / "model_answer" / "trial-0000.jsonl")
    differ = [line for line in answers if line["choices"][0]["turns"] != line["choices"][1]["turns"]]
    assert len(differ) > len(answers) / 2
    assert {score.choice for score in scores} == {0, 1}
    assert show_result(output)["trial-0000"] == pytest.approx(trials(output)[0].value)


def test_another_judge_or_another_question_is_another_study(
    trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(flags(trio, bench, output, server, "--n_trials", "2")) == 0
    other = JudgeServer()
    other.start()
    try:  # the same judge may have moved
        assert main(flags(trio, bench, output, other, "--n_trials", "3")) == 0
    finally:
        other.stop()
    for change in (
        ["--judge_model", "openai:n"],
        ["--judge_file", "ja"],
        ["--question_seed", "1"],
        ["--temperature", "0"],
    ):
        assert main(flags(trio, bench, output, server, "--n_trials", "3", *change)) == 2
        assert "holds a study of another configuration" in capsys.readouterr().err


def test_interrupted_runs_go_on(trio: Trio, bench: Path, server: JudgeServer, tmp_path: Path) -> None:
    server.rule = lambda request, earlier: "hang" if len(server.requests) > 40 else "ok"
    output = tmp_path / "run"
    command = [sys.executable, "-m", "tvmerge", *flags(trio, bench, output, server, "--judge_timeout", "100")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(server.requests) <= 41:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "the same command goes on where it stopped" in errors
    assert "Traceback" not in errors
    server.rule = lambda request, earlier: "ok"
    assert main(flags(trio, bench, output, server)) == 0


def test_the_script_needs_no_key_and_no_network(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if "API_KEY" not in key}
    command = ["./run_mt_bench.sh", "--output_dir", str(tmp_path / "run"), "--n_trials", "8", "--question_limit", "40"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| extraction |" in result.stdout
    ours = {name: mean_score(found) for name, found in scores_of(tmp_path / "run").items()}
    assert show_result(tmp_path / "run", "rouge_l") == pytest.approx(ours, abs=1e-6)
    recipe = yaml.safe_load((tmp_path / "run" / "best" / "recipe.yaml").read_text())
    assert recipe["score"]["heldout_tasks"]["toy"] == recipe["score"]["heldout"]
