"""The benchmarks still run: their figures are no test, that they can be taken is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from conftest import ROOT

SCRIPT = ROOT / "perf" / "merge.py"


@pytest.fixture(scope="module")
def perf() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("perf_merge", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def models(perf: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perf")
    perf.make_models(folder, perf.Shape(hidden=512, inner=512, layers=1, vocabulary=64))
    return folder


def test_times_are_taken(perf: ModuleType, models: Path) -> None:
    assert all(ms > 0 for ms in perf.time_apply(models, rounds=1).values())
    shape = perf.Shape(hidden=512, inner=512, layers=1, vocabulary=64)
    assert all(ms > 0 for ms in perf.time_write(models, shape, rounds=1, mergekit=None).values())
    assert yaml.safe_load((models / "mergekit.yaml").read_text())["merge_method"] == "task_arithmetic"


@pytest.mark.parametrize("what", ["memory", "mmap", "write"])
def test_memory_is_measured(perf: ModuleType, models: Path, what: str) -> None:
    perf.recipe(models)
    assert 0 <= perf.in_new_process(what, models) < 1e9


def test_help_says_what_can_be_measured() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--mergekit" in done.stdout
