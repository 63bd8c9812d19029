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

SCRIPTS = [
    ROOT / "perf" / name for name in ("merge.py", "jglue.py", "generation.py", "mixture.py", "search.py", "study.py")
]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"perf_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def perf() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS[0].parent))
    yield load(SCRIPTS[0])
    sys.path.remove(str(SCRIPTS[0].parent))


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


def test_the_overhead_of_a_trial_is_measured() -> None:
    found = load(SCRIPTS[1]).overhead(n_questions=5, rounds=1)
    assert all(value > 0 for value in found.values())
    assert found["trial"] > found["forward"]


def test_what_shared_prompts_save_is_measured_and_no_answer_differs(tmp_path: Path) -> None:
    jglue = load(SCRIPTS[1])
    tasks = jglue.load_tasks(["made_up_True"], task_dir=jglue.made_up_task(tmp_path, n_questions=6, same=True))
    model = jglue.live(jglue.wide_model(tmp_path / "wide", hidden=64, layers=2, vocabulary=400))
    found = jglue.sharing(model, tasks, n_questions=6, rounds=1)
    assert all(found[name] > 0 for name in ("tvmerge", "lm-eval", "limit"))
    assert found["furthest"] < 1e-3
    assert found["differ"] == 0
    assert jglue.n_distinct([[1, 2, 3], [1, 2, 4, 5], [1, 2], [7], [7]]) == 3 + 2 + 1


@pytest.mark.usefixtures("perf")
def test_answers_in_batches_are_measured_and_none_differs() -> None:
    generation = load(SCRIPTS[2])
    model = generation.live(generation.MODELS / "tuned", "float32")
    prompts = [*generation.questions(8), *generation.continuations(4)]
    assert len(set(prompts)) == 12
    found = generation.compare(model, prompts, max_new_tokens=16, rounds=1)
    assert found.alone > found.batched > found.forward > 0
    assert found.differ == 0


@pytest.mark.usefixtures("perf")
def test_a_trial_of_a_mixture_is_measured(models: Path) -> None:
    mixture = load(SCRIPTS[3])
    assert all(ms > 0 for ms in mixture.time_trial(models, rounds=1).values())
    assert all(ms > 0 for ms in mixture.construction(layers=2, n_experts=2, rounds=1).values())


@pytest.mark.usefixtures("perf")
def test_searches_are_measured_on_every_landscape(capsys: pytest.CaptureFixture[str]) -> None:
    perf_search = load(SCRIPTS[4])
    for name, shape in perf_search.LANDSCAPES.items():
        landscape = perf_search.Landscape(shape, seed=0)
        uniform = max(landscape.truth(landscape.best * 0 + weight) for weight in (0.4, 0.7, 1.0, 1.3))
        assert landscape.truth(landscape.best) > uniform + 0.01, name
        assert perf_search.Landscape(shape, seed=0).trial(landscape.best) == landscape.trial(landscape.best)
    found = perf_search.compare("A", list(perf_search.SEARCHES), seeds=2, marks=[9, 12])
    assert all(0.3 < each.recommended < 0.8 for at_marks in found.values() for runs in at_marks for each in runs)
    perf_search.print_landscape("A", found, marks=[9, 12])
    assert "| RSM | 0." in capsys.readouterr().out
    assert all(ms > 0 for ms in perf_search.draw_times(35, 20, rounds=1).values())


def test_what_a_study_costs_is_measured() -> None:
    found = load(SCRIPTS[5]).measure(3, n_trials=9, rounds=2, sampler="RSM")
    assert all(ms > 0 for ms in found.values())
    assert found["trial"] > found["weights"]


@pytest.mark.parametrize(
    ("script", "flag"),
    list(zip(SCRIPTS, ("--mergekit", "--n_questions", "--n_prompts", "--rounds", "--seeds", "--storage"), strict=True)),
)
def test_help_says_what_can_be_measured(script: Path, flag: str) -> None:
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert flag in done.stdout
