"""The parent of a worker, over real processes that die in every way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tvmerge.config import WorkerConfig
from tvmerge.errors import ConfigError
from tvmerge.supervisor import own_name

#: Supervises a program that is named on the command line, as the command line supervises workers.
PARENT = """
import os, signal, sys
from tvmerge.supervisor import supervise

for name in ("SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.default_int_handler)
os._exit(supervise([], name="w", program=(sys.executable, "-c", sys.argv[1])))
"""
#: Writes down its number and waits; interrupted, it tidies up.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from tvmerge.supervisor import follow_parent

folder = Path({folder!r})
signal.signal(signal.SIGTERM, signal.default_int_handler)
follow_parent()
with (folder / "began").open("a") as file:
    file.write(str(os.getpid()) + chr(10))
try:
    {does}
except KeyboardInterrupt:
    time.sleep(0.3)
    with (folder / "tidied").open("a") as file:
        file.write("once" + chr(10))
    os._exit(130)
"""


def start(folder: Path, does: str, *, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + PARENT, CHILD.format(folder=str(folder), does=does)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def began(folder: Path, n: int) -> list[int]:
    """Wait until so many children began; their numbers."""
    begun = time.monotonic()
    while time.monotonic() - begun < 120:
        if (folder / "began").exists():
            lines = (folder / "began").read_text().split("\n")[:-1]
            if len(lines) >= n:
                return [int(line) for line in lines]
        time.sleep(0.02)
    raise AssertionError("it never began")


def wait_until_gone(child: int) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < 60:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            return  # nobody waits for it here
        time.sleep(0.02)
    raise AssertionError("it was left behind")


def test_a_killed_worker_is_started_again_until_it_dies_too_often(tmp_path: Path) -> None:
    parent = start(tmp_path, "time.sleep(1000)")
    for n in (1, 2, 3):
        os.kill(began(tmp_path, n)[-1], signal.SIGKILL)
    _, errors = parent.communicate()
    assert parent.returncode == 128 + signal.SIGKILL
    assert errors.splitlines() == [
        *["worker w: died with status -9, starting it again"] * 2,
        "worker w: died 3 times in a row, the last with status -9",
    ]


@pytest.mark.parametrize(("status", "times"), [(0, 1), (2, 1), (130, 1), (1, 3), (75, 3)])
def test_what_ends_by_itself_is_not_started_again(tmp_path: Path, status: int, times: int) -> None:
    parent = start(tmp_path, f"os._exit({status})")
    parent.communicate()
    assert parent.returncode == status
    assert len(began(tmp_path, 1)) == times


def test_a_worker_whose_trials_fail_slowly_does_not_fail_them_all(tmp_path: Path) -> None:
    parent = start(tmp_path, "os._exit(1)", before="import tvmerge.supervisor as s; s.SOON = 0.0")
    parent.communicate()
    assert parent.returncode == 1
    assert len(began(tmp_path, 1)) == 3


def test_input_that_was_right_once_is_tried_again(tmp_path: Path) -> None:
    does = "os._exit({1: 1, 2: 2, 3: 0}[len((folder / 'began').read_text().splitlines())])"
    parent = start(tmp_path, does)
    parent.communicate()
    assert parent.returncode == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_parent_takes_its_child_along(tmp_path: Path, name: str) -> None:
    parent = start(tmp_path, "time.sleep(1000)")
    (child,) = began(tmp_path, 1)
    parent.send_signal(getattr(signal, name))
    parent.communicate()
    assert parent.returncode == 130
    wait_until_gone(child)
    assert (tmp_path / "tidied").read_text() == "once\n"


def test_ctrl_c_on_a_terminal_reaches_the_child_once(tmp_path: Path) -> None:
    parent = start(tmp_path, "time.sleep(1000)")
    began(tmp_path, 1)
    os.killpg(parent.pid, signal.SIGINT)
    parent.communicate()
    assert parent.returncode == 130
    assert (tmp_path / "tidied").read_text() == "once\n"


def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = start(tmp_path, "time.sleep(1000)")
    (child,) = began(tmp_path, 1)
    parent.kill()
    parent.communicate()
    wait_until_gone(child)
    assert (tmp_path / "tidied").read_text() == "once\n"


def test_two_workers_never_have_one_name() -> None:
    # In containers also their machine's name and the numbers of their processes may be the same.
    names = {own_name() for _ in range(100)}
    assert len(names) == 100
    for name in names:
        WorkerConfig(output_dir="run", name=name)
    for name in ("main", "", "a/b", "..", "a b", "x" * 101):
        with pytest.raises(ConfigError, match="--name must be"):
            WorkerConfig(output_dir="run", name=name)
