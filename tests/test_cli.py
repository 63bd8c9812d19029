"""The command line: one line for everything that cannot work, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CHARACTERS, ROOT, TASKS, Trio, last_target, save_mistral, save_tokenizer
from safetensors.torch import load_file, save_file

from tvmerge.cli import COMMANDS, main


def flags(trio: Trio, output: Path, *more: str) -> list[str]:
    tasks = ["--jglue_tasks", "tiny_choice,tiny_extract", "--task_dir", str(TASKS)]
    return last_target(["jglue", *trio.flags(), *tasks, "--n_trials", "2", "--output_dir", str(output), *more])


def assert_refused(arguments: list[str], message: str, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    existed = output.exists()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("tvmerge")
    assert message in lines[0]
    assert output.exists() == existed, "something was written"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target_model", "no/such/folder"], "model no/such/folder: no such folder"),
        (["--target_model", ""], "--target_model is empty"),
        (["--jglue_tasks", "tiny_choice,tiny_choise"], "unknown tasks: tiny_choise"),
        (["--jglue_tasks", "tiny_choice,tiny_choice"], "--jglue_tasks must name different tasks"),
        (["--jglue_tasks", ""], "--jglue_tasks must name"),
        (
            ["--task_metric", "tiny_choice=f2"],
            "has no metric 'f2', its metrics are acc, its filters none",
        ),
        (
            ["--task_metric", "tiny_choise=acc"],
            "tiny_choise: no such task is asked, they are tiny_choice",
        ),
        (["--task_metric", "acc"], "--task_metric acc: must be task=metric"),
        (["--task_weight", "tiny_choice=heavy"], "--task_weight tiny_choice=heavy: must be a number"),
        (["--task_weight", "tiny_choice=1", "tiny_choice=2"], "--task_weight names the task tiny_choice twice"),
        (["--task_weight", "tiny_choice=0", "tiny_extract=0"], "--task_weight leaves no task a weight"),
        (["--task_weight", "tiny_choice=1e308"], "must be a number, 1,000,000 at most"),
        (["--system_instruction", "a\udcf6"], "--system_instruction is not text in the encoding of this terminal"),
        (["--num_fewshot", "-1"], "--num_fewshot must be at least 0"),
        (["--num_fewshot", "1,2,3"], "--num_fewshot must be one number or one for each of the 2 tasks, got 3"),
        (["--jglue_data", "nowhere"], "--jglue_data nowhere: no such folder"),
        (["--apply_chat_template"], "the target's tokenizer has no chat template"),
        (["--batch_size", "many"], "--batch_size must be a whole number or auto, got 'many'"),
        (["--task_dir", "nowhere"], "--task_dir nowhere: no such folder"),
        (["--optimize_mode", "layers"], "unknown granularity 'layers', known are uniform, block:k, all"),
        (["--optuna_sampler", "tpe"], "--optuna_sampler tpe is unknown: choose TPE"),
        (["--storage", "sqlite://"], "is no file, in which a study stays"),
        (["--storage", "sqlite:///no/such/folder/a.db"], "there is no such folder to make a study in"),
        (["--heartbeat", "1e9"], "--heartbeat must be 86,400 seconds at most"),
        (["--study_name", "a"], "give --storage too"),
        (["--study_name", "", "--storage", "sqlite:///a.db"], "give --storage too"),
        (["--weight_min", "1", "--weight_max", "1"], "--weight_min must be less than --weight_max, got 1.0 and 1.0"),
        (["--weight_max", ".inf"], "--weight_max must be a number that float32 can hold"),
        (["--weight_min", "abc"], "--weight_min abc: is not a number (see tvmerge jglue --help)"),
        (["--n_trials", "2.5"], "--n_trials 2.5: is not a whole number"),
        (["--vocabulary", "smae"], "--vocabulary smae: is not one of same, intersect, union"),
        (["--optimise_mode", "layer"], "is optimize_mode meant?"),
        (["--jglue_limit", "5,6,7"], "--jglue_limit must be one number or one for each of the 2 tasks, got 3"),
        (["--jglue_limit", "5,x"], "--jglue_limit must be whole numbers"),
        (["--jglue_limit", "0"], "--jglue_limit must be at least 1"),
        (["--n_trials", "1"], "--n_trials must be at least 2"),
        (["--optuna_seed", "-1"], "--optuna_seed must be at least 0"),
        (["--holdout", "1"], "--holdout must be a share"),
        (["--holdout", "0.99"], "too few to hold out"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--device", "cuda:99"], "--device cuda:99: cannot be used here"),
        (["--device", "abacus"], "--device abacus: cannot be used here"),
        (["--device", "meta"], "--device meta: cannot be used here"),
        (["--question_seed", str(10**30)], "--question_seed must be less than 2^63"),
        (["--task_dir", "~nobody.here/x"], "--task_dir ~nobody.here/x"),
        (["--config", __file__.replace("test_cli.py", "../demo/models/base/model.safetensors")], "utf-8"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--config", "no.yaml"], "no.yaml"),
    ],
)
def test_a_bad_flag_is_refused(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    output = tmp_path / "out"
    assert_refused(flags(trio, output, *more), message, output, capsys)


def _other_depth(folder: Path) -> None:
    save_mistral(folder, seed=0, num_hidden_layers=3)


def _other_vocabulary_size(folder: Path) -> None:
    save_mistral(folder, seed=0, vocab_size=len(CHARACTERS) + 5)


def _other_tokens(folder: Path) -> None:
    save_tokenizer(folder, characters=CHARACTERS[::-1])


def _missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _lost_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _other_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))


def test_a_target_without_a_tokenizer_is_refused(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(trio.target, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert_refused(flags(trio, output, "--target_model", str(folder)), "transformers cannot load it", output, capsys)


@pytest.mark.parametrize("role", ["target", "base", "tuned"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_depth, "layers.2"),
        (_other_vocabulary_size, "vocabularies of"),
        (_other_tokens, "the vocabularies of"),
        (_missing_weights, "holds neither model.safetensors nor"),
        (_truncated_weights, "not a whole safetensors file"),
        (_pickled_weights, "pickled weights only"),
        (_lost_tensor, "model.norm.weight"),
        (_other_configuration, "config.json asks for"),
    ],
)
def test_a_bad_model_is_refused(
    trio: Trio,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    role: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(getattr(trio, role), folder)
    damage(folder)
    capsys.readouterr()
    assert_refused(flags(trio, output, f"--{role}_model", str(folder)), message, output, capsys)


def test_a_bad_output_folder_is_refused(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for output in (file, file / "below"):
        assert_refused(flags(trio, output), f"{file} is a file", output, capsys)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert_refused(flags(trio, tmp_path / "link" / "x"), "is a link to nowhere", tmp_path / "nowhere", capsys)
    assert_refused(flags(trio, Path("~nobody.here/x")), "~nobody.here/x", tmp_path / "out", capsys)
    assert_refused(flags(trio, tmp_path / ("x" * 300)), "File name too long", tmp_path / "out", capsys)
    if Path("/proc").is_dir():  # where even root can make nothing
        assert_refused(flags(trio, Path("/proc/out")), "name another folder", Path("/proc/out"), capsys)
    foreign = tmp_path / "foreign"
    (foreign / "best").mkdir(parents=True)
    assert_refused(flags(trio, foreign), "holds a 'best' that no study made", foreign, capsys)
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="no permission stops root")
def test_a_folder_without_permission_is_refused(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert_refused(flags(trio, tmp_path / "out"), f"no permission to write in {tmp_path}", tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["merge"], "merge"),
        (["jglue"], "target_model"),
        (["apply"], "arguments are required: --output_dir, recipe (see tvmerge apply --help)"),
        (["apply", "none.yaml", "--output_dir", "out"], "none.yaml: no such recipe"),
        (["apply", "none.yaml", "--output_dir", ""], "--output_dir is empty"),
    ],
)
def test_an_incomplete_command_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert_refused(arguments, message, tmp_path / "out", capsys)


def printed_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    config: dict[str, object] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_flags_win_over_the_file_and_the_file_over_defaults(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                **{f"{role}_model": str(getattr(trio, role)) for role in ("target", "base", "tuned")},
                "jglue_tasks": ["a", "b"],
                "jglue_limit": [5, 6],
                "n_trials": 7,
                "weight_max": 1.5,
            }
        )
    )
    config = printed_config(["jglue", "--config", str(file), "--n_trials", "9", "--jglue_limit", "3"], capsys)
    assert printed_config(["jglue", "--n_trials", "9", f"--config={file}", "--jglue_limit=3"], capsys) == config
    assert printed_config(["jglue", "--n_trials", "9", "--jglue_limit=3", "--config", str(file)], capsys) == config
    assert (config["n_trials"], config["weight_max"], config["weight_min"]) == (9, 1.5, 0.0)
    assert config["jglue_tasks"] == ["a", "b"]
    assert config["jglue_limit"] == 3
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config))
    assert printed_config(["jglue", "--config", str(again)], capsys) == config


def test_a_configuration_with_an_unknown_key_is_refused(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("n_trails: 7\n")
    message = f"--config {file}: Subcommand 'jglue' does not accept option 'n_trails': is n_trials meant?"
    assert_refused(flags(trio, tmp_path / "out", "--config", str(file)), message, tmp_path / "out", capsys)
    assert_refused(flags(trio, tmp_path / "out", f"--config={file}"), message, tmp_path / "out", capsys)
    for setting in ("optuna_sampler", "pruner", "heartbeat"):
        file.write_text(f"{setting}: null\n")
        given = flags(trio, tmp_path / "out", "--config", str(file))
        assert_refused(given, f"{setting} is null", tmp_path / "out", capsys)
    file.write_text("holdout: seven\n")
    message = f"--config {file}: --holdout seven: is not a number"
    assert_refused(flags(trio, tmp_path / "out", "--config", str(file)), message, tmp_path / "out", capsys)
    good = tmp_path / "good.yaml"
    good.write_text("n_trials: 7\n")
    given = flags(trio, tmp_path / "out", f"--config={good}", "--config", str(file))
    assert_refused(given, f"--config {good}, {file}: --holdout seven", tmp_path / "out", capsys)
    file.write_text("n_trials: [7\n")
    message = f"--config {file}: Problems parsing config"
    assert_refused(flags(trio, tmp_path / "out", "--config", str(file)), message, tmp_path / "out", capsys)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    if command:
        described = COMMANDS[command][0].__doc__ or ""
        for line in described.partition("Args:\n")[2].strip().splitlines():
            assert " ".join(line.partition(": ")[2].split()) in text


def test_help_takes_less_than_a_second() -> None:
    # Of a processor: another test may have the other one.
    code = (
        "import os, subprocess, sys; subprocess.run([sys.executable, '-m', 'tvmerge', '--help'], check=True, stdout=-3)"
    )
    code += "; used = os.times(); print(used.children_user + used.children_system)"
    run = [sys.executable, "-c", code]
    seconds = [float(subprocess.run(run, check=True, capture_output=True, cwd=ROOT).stdout) for _ in range(3)]
    assert min(seconds) < 1


def test_import_is_light() -> None:
    heavy = "'torch', 'transformers', 'lm_eval', 'optuna', 'datasets', 'openai', 'anthropic', 'fastchat', 'numba'"
    code = f"import sys, tvmerge, tvmerge.cli; print([name for name in ({heavy}) if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_applying_a_recipe_imports_only_what_it_needs() -> None:
    heavy = ("torch", "transformers", "lm_eval", "optuna")
    code = f"import sys, tvmerge.recipe; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_a_terminated_apply_leaves_nothing(trio: Trio, tmp_path: Path) -> None:
    models = {role: {"model": str(getattr(trio, role))} for role in ("target", "tuned", "base")}
    vector = {"label": "tuned", "tuned": models["tuned"], "base": models["base"]}
    recipe = {
        "target": models["target"],
        "task_vectors": [vector],
        "granularity": "uniform",
        "weights": {"uniform": 1.0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = (
        "import os, signal, sys, tvmerge.writer as writer, tvmerge.cli as cli\n"
        "writer._reserve = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv[1:] = ['apply', 'recipe.yaml', '--output_dir', 'out']\n"
        "cli.entry()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "tvmerge apply: interrupted; nothing was written"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
