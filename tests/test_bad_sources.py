"""Sources that hold what is no number, that change under a run, and disks that are full: one line, nothing left."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Trio, save_mistral
from safetensors.torch import load_file, save_file
from test_lora import save_adapter
from test_run import best, flags, trials

from tvmerge.cli import main

TENSOR = "model.layers.1.mlp.up_proj.weight"
FEW = ("--n_trials", "6")


def damaged(source: Path, folder: Path, value: float, name: str = TENSOR) -> Path:
    """A copy of a model or an adapter with one bad number in it."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    (found,) = (key for key in tensors if key.endswith(name))
    tensors[found][-1, -1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def recipe_of(folder: Path, *, tuned: Path, trio: Trio, target: Path | None = None, **changes: object) -> Path:
    """A recipe that moves all tensors by the whole task vector."""
    entry = {"label": "tuned", "tuned": {"model": str(tuned)}, "base": {"model": str(trio.base)}}
    content = {"target": {"model": str(target or trio.target)}, "task_vectors": [entry], "granularity": "uniform"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "weights": {"uniform": 1.0}, **changes}))
    return path


def apply(recipe: Path, output: Path) -> list[str]:
    return ["apply", str(recipe), "--output_dir", str(output)]


def assert_one_line(captured: str, pattern: str) -> None:
    assert captured.count("\n") == 1, captured
    assert re.search(pattern, captured), captured


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("role", ["target", "base", "tuned", "adapter"])
def test_what_is_no_number_is_refused_by_its_model_and_tensor(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, value: float
) -> None:
    flag, name = f"--{role}_model", TENSOR
    if role == "adapter":
        flag, name = "--tuned_model", "layers.0.self_attn.q_proj.lora_B.weight"
        bad = damaged(save_adapter(trio.base, tmp_path / "good"), tmp_path / "bad", value, name)
    else:
        bad = damaged(getattr(trio, role), tmp_path / "bad", value)
    sources = {"target": trio.target, "base": trio.base, "tuned": trio.tuned}
    sources[flag[2:].removesuffix("_model")] = bad
    given = [word for key, folder in sources.items() for word in (f"--{key}_model", str(folder))]
    rest = flags(trio, tmp_path / "out")
    before = listing(tmp_path)
    assert main(["jglue", *given, *rest[rest.index("--jglue_tasks") :]]) == 2
    assert_one_line(capsys.readouterr().err, f"model {bad}: .*{re.escape(name)} holds NaN or infinity")
    assert listing(tmp_path) == before
    recipe = recipe_of(tmp_path, trio=trio, tuned=sources["tuned"], target=sources["target"])
    content = yaml.safe_load(recipe.read_text())
    content["task_vectors"][0]["base"]["model"] = str(sources["base"])
    recipe.write_text(yaml.safe_dump(content))
    before = listing(tmp_path)
    assert main(apply(recipe, tmp_path / "rebuilt")) == 2
    assert_one_line(capsys.readouterr().err, f"model {bad}: .*{re.escape(name)} holds NaN or infinity")
    assert listing(tmp_path) == before


def test_a_model_that_was_mended_runs_in_the_same_folder(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = damaged(trio.tuned, tmp_path / "mine", float("nan"))
    given = flags(trio, tmp_path / "out", *FEW)
    given[given.index(str(trio.tuned))] = str(tuned)
    assert main(given) == 2
    shutil.copy(trio.tuned / "model.safetensors", tuned)
    assert main(given) == 0
    assert "holds NaN" in capsys.readouterr().err


@pytest.mark.parametrize("weight", [30_000.0, -30_000.0])
def test_values_too_large_for_the_dtype_end_an_apply(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], weight: float
) -> None:
    for name, dtype in (("cast", "float16"), ("fits", "bfloat16")):
        (tmp_path / name).mkdir()
        recipe = recipe_of(tmp_path / name, trio=trio, tuned=trio.tuned, weights={"uniform": 10 * weight}, dtype=dtype)
        status = main(apply(recipe, tmp_path / name / "out"))
        captured = capsys.readouterr()
        assert (name, status) == (name, 1 if name == "cast" else 0)
        if status:
            assert_one_line(captured.err, r"\.weight: merged values are too large for its dtype")
            assert captured.out == ""
            assert listing(tmp_path / name) == {"recipe.yaml"}


def test_values_too_large_for_float16_models_end_an_apply(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {}
    for role in ("target", "base", "tuned"):
        folders[role] = shutil.copytree(getattr(trio, role), tmp_path / role)
        tensors = load_file(folders[role] / "model.safetensors")
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
        save_file(tensors, folders[role] / "model.safetensors", metadata={"format": "pt"})
    entry = {"label": "tuned", "tuned": {"model": str(folders["tuned"])}, "base": {"model": str(folders["base"])}}
    recipe = recipe_of(tmp_path, trio=trio, tuned=trio.tuned, target=folders["target"], task_vectors=[entry])
    recipe.write_text(recipe.read_text().replace("uniform: 1.0", "uniform: 1.0e+6"))
    before = listing(tmp_path)
    assert main(apply(recipe, tmp_path / "out")) == 1
    assert_one_line(capsys.readouterr().err, r"\.weight: merged values are too large")
    assert listing(tmp_path) == before


def test_a_trial_whose_values_are_too_large_for_the_dtype_fails_and_is_never_the_best(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = ("--dtype", "float16", "--weight_max", "100000000", "--n_trials", "4")
    there = ("--optimize_mode", "uniform", "--optuna_sampler", "random", "--search", "flat")  # RSM would not go
    assert main(flags(trio, tmp_path / "out", *there, *large)) == 0
    said = capsys.readouterr().err
    for number in (2, 3):
        assert re.search(
            rf"trial {number}: RunError: \S+ has values that float16 cannot hold: use --dtype bfloat16 or float32", said
        )
    assert [number for number, *_ in trials(tmp_path / "out")] == [0, 1]


def test_an_adapter_for_another_base_is_refused(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same_shapes = save_adapter(trio.tuned, tmp_path / "same")
    wide = save_adapter(save_mistral(tmp_path / "wide", seed=0, hidden_size=32), tmp_path / "on wide")
    for adapter, reason in ((same_shapes, f"was trained on {trio.tuned}, not on {trio.base}"), (wide, "was trained")):
        given = flags(trio, tmp_path / "out")
        given[given.index(str(trio.tuned))] = str(adapter)
        for command in (given, ["plan", *given[1 : given.index("--jglue_tasks")]]):
            assert main(command) == 2
            assert_one_line(capsys.readouterr().err, re.escape(reason))
    assert not (tmp_path / "out").exists()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@pytest.mark.parametrize("change", ["mtime", *(pytest.param(c, marks=pytest.mark.full) for c in ("size", "gone"))])
def test_a_source_that_changes_ends_the_run_and_put_back_it_goes_on(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    tuned, output = shutil.copytree(trio.tuned, tmp_path / "mine"), tmp_path / "out"
    given = flags(trio, output, "--n_trials", "40")
    given[given.index(str(trio.tuned))] = str(tuned)
    command = [sys.executable, "-m", "tvmerge", *given]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    scores = output / "scores.jsonl"
    wait_for(lambda: process.poll() is not None or (scores.exists() and len(scores.read_text().splitlines()) > 36))
    file = tuned / "model.safetensors"
    state = file.stat()
    if change == "mtime":
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif change == "size":
        with file.open("ab") as grown:
            grown.write(b"\0")
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    else:
        file.rename(tmp_path / "away")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    reasons = [line for line in err.splitlines() if "error" in line]
    assert len(reasons) == 1
    assert re.fullmatch(rf"tvmerge jglue: error: {file}: was changed since this run opened it.*", reasons[0])
    assert "Traceback" not in err
    assert out == ""
    kept = trials(output)
    assert 2 <= len(kept) < 40
    assert not (output / "best").exists()
    if change == "gone":
        (tmp_path / "away").rename(file)
    else:
        os.truncate(file, state.st_size)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    capsys.readouterr()
    assert main(given) == 0
    assert "failed" not in capsys.readouterr().err
    assert trials(output)[: len(kept)] == kept
    undisturbed = tmp_path / "undisturbed"
    given[given.index(str(output))] = str(undisturbed)
    assert main(given) == 0
    assert trials(output) == trials(undisturbed)
    assert best(output) == best(undisturbed)


#: Runs a command where no file may grow past a size, as on a disk that is full.
FULL = """
import resource, signal, sys
from tvmerge.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def run_where_files_end_at(limit: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FULL, str(limit), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_full_disk_leaves_nothing_of_an_apply(trio: Trio, tmp_path: Path, share: float) -> None:
    recipe = recipe_of(tmp_path, trio=trio, tuned=trio.tuned)
    whole = (trio.target / "model.safetensors").stat().st_size
    done = run_where_files_end_at(int(share * whole), apply(recipe, tmp_path / "out"))
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, r"tvmerge apply: error: .*(too large|space)")
    assert listing(tmp_path) == {"recipe.yaml"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    size = ["-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", *size], capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk, and not everywhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_that_is_full_leaves_nothing_of_an_apply(trio: Trio, small_disk: Path, tmp_path: Path) -> None:
    fill = small_disk / "mine"
    fill.write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    recipe = recipe_of(tmp_path, trio=trio, tuned=trio.tuned)
    command = [sys.executable, "-m", "tvmerge", *apply(recipe, small_disk / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert_one_line(done.stderr, "cannot be written, nothing was kept: No space left on device")
    assert [path.name for path in small_disk.iterdir()] == ["mine"]
    fill.unlink()
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Models that are larger than the study of a few trials."""
    root = tmp_path_factory.mktemp("large")
    size: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 256}
    base = save_mistral(root / "base", seed=0, **size)
    target, tuned = (save_mistral(root / n, seed=i, drift_from=base, **size) for i, n in ((1, "target"), (2, "tuned")))
    return Trio(target=target, base=base, tuned=tuned)


def test_a_full_disk_keeps_the_study_which_then_saves_its_best(large: Trio, tmp_path: Path) -> None:
    output, given = tmp_path / "out", flags(large, tmp_path / "out", "--n_trials", "3")
    whole = (large.target / "model.safetensors").stat().st_size
    full = run_where_files_end_at(whole - 1, given)
    assert full.returncode == 1
    assert re.fullmatch(
        f"tvmerge jglue: error: {output}: cannot be written, nothing was kept: .*", full.stderr.splitlines()[-1]
    )
    assert "Traceback" not in full.stderr
    assert listing(output) - {".lock"} == {"study.db", "scores.jsonl", "config.yaml"}
    kept = trials(output)
    assert len(kept) == 3
    # Not even the scores can be read back and written: the study is as it was.
    scores = (output / "scores.jsonl").read_bytes()
    fuller = run_where_files_end_at(len(scores) - 1, given)
    assert fuller.returncode == 1
    assert_one_line(fuller.stderr, "tvmerge jglue: error: ")
    assert (trials(output), (output / "scores.jsonl").read_bytes()) == (kept, scores)
    assert listing(output) - {".lock"} == {"study.db", "scores.jsonl", "config.yaml"}
    assert main(given) == 0
    undisturbed = tmp_path / "undisturbed"
    assert main(flags(large, undisturbed, "--n_trials", "3")) == 0
    assert trials(output) == trials(undisturbed) == kept
    assert best(output) == best(undisturbed)
