"""The benchmarks still run: their figures are no test, that they can be taken is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from conftest import ROOT

#: And a flag of each.
SCRIPTS = {
    "merge": "--mergekit",
    "jglue": "--n_questions",
    "generation": "--n_prompts",
    "mixture": "--rounds",
    "search": "--seeds",
    "search_embedded": "--granularity",
    "mergekit": "--only",
    "pruning": "--trials",
    "study": "--trials",
}
PERF = ROOT / "perf"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"perf_{name}", PERF / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def perf() -> Iterator[ModuleType]:
    sys.path.insert(0, str(PERF))
    yield load("merge")
    sys.path.remove(str(PERF))


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
    found = load("jglue").overhead(n_questions=5, rounds=1)
    assert all(value > 0 for value in found.values())
    assert found["trial"] > found["forward"]


def test_what_shared_prompts_save_is_measured_and_no_answer_differs(tmp_path: Path) -> None:
    jglue = load("jglue")
    tasks = jglue.load_tasks(["made_up_True"], task_dir=jglue.made_up_task(tmp_path, n_questions=6, same=True))
    model = jglue.live(jglue.wide_model(tmp_path / "wide", hidden=64, layers=2, vocabulary=400))
    found = jglue.sharing(model, tasks, n_questions=6, rounds=1)
    assert all(found[name] > 0 for name in ("tvmerge", "lm-eval", "limit"))
    assert found["furthest"] < 1e-3
    assert found["differ"] == 0
    assert jglue.n_distinct([[1, 2, 3], [1, 2, 4, 5], [1, 2], [7], [7]]) == 3 + 2 + 1


@pytest.mark.usefixtures("perf")
def test_answers_in_batches_are_measured_and_none_differs() -> None:
    generation = load("generation")
    model = generation.live(generation.MODELS / "tuned", "float32")
    prompts = [*generation.questions(8), *generation.continuations(4)]
    assert len(set(prompts)) == 12
    found = generation.compare(model, prompts, max_new_tokens=16, rounds=1)
    assert found.alone > found.batched > found.forward > 0
    assert found.differ == 0


@pytest.mark.usefixtures("perf")
def test_a_trial_of_a_mixture_is_measured(models: Path) -> None:
    mixture = load("mixture")
    assert all(ms > 0 for ms in mixture.time_trial(models, rounds=1).values())
    assert all(ms > 0 for ms in mixture.construction(layers=2, n_experts=2, rounds=1).values())


@pytest.mark.usefixtures("perf")
def test_searches_are_measured_on_every_landscape(capsys: pytest.CaptureFixture[str]) -> None:
    perf_search = load("search")
    for name, shape in perf_search.LANDSCAPES.items():
        landscape = perf_search.Landscape(shape, seed=0)
        uniform = max(landscape.truth(landscape.best * 0 + weight) for weight in (0.4, 0.7, 1.0, 1.3))
        assert landscape.truth(landscape.best) > uniform + 0.01, name
        assert perf_search.Landscape(shape, seed=0).trial(landscape.best) == landscape.trial(landscape.best)
    found = perf_search.compare("A", list(perf_search.SEARCHES), seeds=2, marks=[9, 12])
    assert all(0.3 < each.recommended < 0.8 for at_marks in found.values() for runs in at_marks for each in runs)
    perf_search.print_landscape("A", found, marks=[9, 12])
    assert "| RSM | 0." in capsys.readouterr().out
    assert perf_search.draw_times("RSM", 35, 20, rounds=1) > 0


@pytest.mark.usefixtures("perf")
def test_searches_are_measured_on_the_demo_with_fresh_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded = load("search_embedded")
    tasks = embedded.draw_tasks(tmp_path / "tasks", seed=0, n_questions=20)
    asked = embedded.Asked(tasks, n_true=10, n_search=5)
    models = embedded.Models(asked, granularity="uniform")
    assert models.truth(np.array([0.6])) == models.score(np.array([0.6]), asked.truth())
    assert models.best_uniform >= models.truth(np.array([0.6]))
    questions = [asked.search(seed) for seed in range(2)]
    assert asked.truth().n_questions == 40
    assert questions[0].n_questions == 20
    assert len({each.fingerprint for each in (*questions, asked.truth())}) == 3
    found = embedded.search(embedded.Embedded(models, questions[0]), embedded.SEARCHES["RSM"], seed=0, marks=[8, 9])
    assert all(0 < each.observed <= 1 and each.uniform == models.best_uniform for each in found)
    embedded.print_found("RSM", [[each] for each in found], marks=[8, 9])
    assert "| RSM, recommended | 0." in capsys.readouterr().out


@pytest.mark.usefixtures("perf")
@pytest.mark.parametrize("pruner", ["none", "halving", "wilcoxon"])
def test_early_stopping_is_measured(pruner: str) -> None:
    pruning = load("pruning")
    landscape = pruning.Landscape(pruning.LANDSCAPES["A"], seed=0)
    (found,) = pruning.search_pruned(landscape, sampler="CMA-ES", pruner=pruner, seed=0, marks=[16])
    assert 0.3 < found.recommended < 0.8
    assert (found.n_stopped > 0) is (pruner != "none")
    assert found.n_trials * found.share >= 16
    assert (found.share == 1) is (pruner == "none")


@pytest.mark.usefixtures("perf")
def test_what_a_study_costs_is_measured() -> None:
    found = load("study").measure(3, n_trials=9, rounds=2, sampler="RSM")
    assert all(ms > 0 for ms in found.values())
    assert found["trial"] > found["weights"]


@pytest.mark.parametrize(("script", "flag"), SCRIPTS.items())
def test_help_says_what_can_be_measured(script: str, flag: str) -> None:
    assert {path.stem for path in PERF.glob("*.py")} == {*SCRIPTS, "models"}, "each is run here"
    done = subprocess.run(
        [sys.executable, str(PERF / f"{script}.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert flag in done.stdout


def test_every_merge_that_is_compared_with_mergekit_can_be_exported(perf: ModuleType, tmp_path: Path) -> None:
    script = load("mergekit")
    exported = set()
    for n, case in enumerate(script.cases(tmp_path)):
        if case.models != script.DEMO and case.settings:
            continue
        case.write(tmp_path / f"{n}.yaml")
        file = script.export_recipe(tmp_path / f"{n}.yaml", tool="mergekit", output=tmp_path / f"{n}")
        exported.add(yaml.safe_load(file.read_text(encoding="utf-8"))["merge_method"])
    assert exported == {"linear"}
    base, tuned = (script.Checkpoint(script.resolve(str(script.DEMO / name))) for name in ("base", "tuned"))
    assert script.compare(base, base) == (1.0, 0, 0.0)
    share, furthest, _ = script.compare(base, tuned)
    assert share < 1
    assert furthest > 0
