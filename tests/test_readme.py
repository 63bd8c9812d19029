"""The README stays true: every command in it is run, as a newcomer would, in a fresh copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
JAPANESE = (ROOT / "README.ja.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip()]


def table(text: str) -> list[str]:
    shown = re.search(r"<!-- table -->\n(.*?)\n<!-- /table -->", text, flags=re.DOTALL)
    assert shown is not None
    return shown[1].splitlines()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is tracked or would be, in an empty folder; with a fresh virtual environment that sees our packages."""
    folder = tmp_path_factory.mktemp("clone") / "tvmerge"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    venv.create(folder / ".venv", with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / ".venv")}))
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def environment() -> dict[str, str]:
    """Ours less what says that an environment is active: that of a newcomer."""
    ours = {"VIRTUAL_ENV", "PYTHONPATH"}
    inherited = {key: value for key, value in os.environ.items() if key not in ours and not key.startswith("CONDA")}
    mine = str(Path(sys.executable).parent)
    folders = [folder for folder in os.environ["PATH"].split(":") if folder != mine or not is_virtual(mine)]
    return {**inherited, "PATH": ":".join([*folders, mine])}


def is_virtual(folder: str) -> bool:
    return (Path(folder).parent / "pyvenv.cfg").exists()


def run(command: str, clone: Path) -> str:
    shell = ["bash", "-c", command]
    result = subprocess.run(shell, cwd=clone, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def demo_output(clone: Path) -> str:
    """What `./run_jglue.sh` prints."""
    return run("./run_jglue.sh", clone)


def test_the_two_commands_come_first() -> None:
    for text in (README, JAPANESE):
        assert commands(text)[:3] == ["./run_jglue.sh", "./run_tests.sh", "./run_mt_bench.sh"]
        assert text.index("```bash") < 300
        assert text.count("\n") < 250


def test_both_languages_show_the_same_commands_and_figures() -> None:
    assert blocks(README, "bash") == blocks(JAPANESE, "bash")
    assert blocks(README, "python") == blocks(JAPANESE, "python")
    assert table(README) == table(JAPANESE)


def test_continuous_integration_runs_the_second_command() -> None:
    assert "run_tests.sh" in (ROOT / ".ci" / "run").read_text()
    assert "pytest" in (ROOT / "run_tests.sh").read_text()


def test_the_first_command_finds_a_merge_that_is_better_than_all_others(clone: Path, demo_output: str) -> None:
    heads, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in demo_output.splitlines() if line[:1] == "|"
    ]
    mean = dict(zip(heads, next(row for row in rows if "mean" in row[0]), strict=True))
    best = float(mean.pop("recommended"))
    others = {label: float(score) for label, score in mean.items() if label not in {"task", "questions"}}
    references = {"target", "tuned", "uniform 1", "best uniform"}
    assert {label.partition(" (")[0] for label in others} - {"best trial"} == references
    for label, score in others.items():
        if not label.startswith("best trial"):
            assert best > score, demo_output
            assert f"recommended is clearly better than {label}" in demo_output
    assert (clone / "output" / "best" / "model.safetensors").exists()


def test_the_readme_shows_what_the_first_command_prints(demo_output: str) -> None:
    # Bit for bit on the processor it was made on; elsewhere kernels differ, and with them a question here or there.
    shown = re.search(r"<!-- table -->\n(.*?)\n<!-- /table -->", README, flags=re.DOTALL)
    assert shown is not None
    printed = [line for line in demo_output.splitlines() if line[:1] == "|"]
    lines = shown[1].strip().splitlines()
    assert len(lines) == len(printed)
    for line, other in zip(lines[2:], printed[2:], strict=True):
        ours, theirs = ([cell.strip() for cell in text.strip("|").split("|")] for text in (line, other))
        assert ours[:2] == theirs[:2]
        assert [float(cell) for cell in ours[2:5]] == pytest.approx([float(cell) for cell in theirs[2:5]], abs=0.03)


def test_the_third_command_finds_answers_that_a_judge_likes_better(clone: Path) -> None:
    printed = run("./run_mt_bench.sh", clone)
    assert "recommended is clearly better than best uniform" in printed, printed
    # And so does the command of the file on benches, on what it left.
    benches = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (shown,) = commands(benches)
    assert "trial-0000-heldout" in run(f"source .venv/bin/activate && {shown}", clone)


@pytest.mark.parametrize("script", ["run_jglue.sh", "run_mt_bench.sh"])
def test_the_scripts_take_two_experts_where_their_comments_are_taken_away(clone: Path, script: str) -> None:
    text = (clone / script).read_text(encoding="utf-8")
    block = re.search(r"^# Experts: .*\n((?:# .*\n)+)", text, flags=re.MULTILINE)
    assert block is not None
    changed = clone / f"experts_{script}"
    changed.write_text(text.replace(block[1], re.sub("^# ", "", block[1], flags=re.MULTILINE)), encoding="utf-8")
    changed.chmod(0o755)
    output = clone / f"output_{script}"
    printed = run(f"./{changed.name} --n_trials 8 --output_dir {output.name}", clone)
    (heads,) = (line for line in printed.splitlines() if line.startswith("| task "))
    assert [cell.strip() for cell in heads.split("|")[3:7]] == ["target 1", "target 2", "tuned", "MoE at 0"]
    assert heads.split("|")[-2].strip() in ("recommended", "best trial")
    assert (output / "best" / "experts" / "expert2" / "recipe.yaml").exists()
    assert "gate_mode: hidden" in (output / "config.yaml").read_text()
    # A flag wins over the variables, here by taking away what makes a mixture.
    refused = subprocess.run(
        ["bash", "-c", f"./{changed.name} --target_model demo/models/target"],
        cwd=clone,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "is for a mixture of experts: name 2 to 8 models" in refused.stderr


@pytest.mark.usefixtures("demo_output")
def test_every_other_command_works(clone: Path) -> None:
    first, *others = commands(README)[3:]
    assert first == "source .venv/bin/activate"
    for command in others:
        if command.startswith("python -m tvmerge dashboard"):
            check_dashboard(command, clone)
        else:
            run(f"{first} && {command}", clone)
    for block in blocks(README, "python"):
        (clone / "example.py").write_text(block)
        run(f"{first} && python example.py", clone)
    best, rebuilt = (clone / "output" / name for name in ("best", "rebuilt"))
    names = {path.name for path in best.iterdir()} - {"README.md", "weights.png"}
    assert names == {path.name for path in rebuilt.iterdir()}
    assert all((best / name).read_bytes() == (rebuilt / name).read_bytes() for name in names)


def check_dashboard(command: str, clone: Path) -> None:
    process = subprocess.Popen(
        f"source .venv/bin/activate && exec {command} --port 18089",
        shell=True,
        executable="/bin/bash",
        cwd=clone,
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            try:
                with urllib.request.urlopen("http://127.0.0.1:18089/api/studies", timeout=5) as answer:
                    assert '"tvmerge"' in answer.read().decode()
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the dashboard did not answer")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
