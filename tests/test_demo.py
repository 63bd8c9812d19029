"""The embedded models and tasks are what their README says."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import make
import pytest
import torch
import world
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvmerge.config.mixture import Mixture
from tvmerge.evaluators.tasks import load_tasks

DEMO = ROOT / "demo"
MODELS = ["base", "target", "tuned", "expert"]
TASKS = ["toy_jcommonsenseqa", "toy_jnli", "toy_marc_ja", "toy_jsquad"]


def records(task: str) -> list[dict[str, object]]:
    lines = (DEMO / "tasks" / "data" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_script_writes_the_questions_that_are_committed(tmp_path: Path) -> None:
    make.write_questions(tmp_path, 0)
    for task in TASKS:
        assert (tmp_path / f"{task}.jsonl").read_bytes() == (DEMO / "tasks" / "data" / f"{task}.jsonl").read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_models_are_small_bfloat16_and_load_with_the_same_tokenizer(name: str) -> None:
    folder = DEMO / "models" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() < 800_000
    assert (folder / "tokenizer.json").read_bytes() == (DEMO / "models" / "base" / "tokenizer.json").read_bytes()


def test_the_expert_has_the_norms_and_the_head_of_the_target_and_everything_else_of_its_own() -> None:
    target, expert = (load_file(DEMO / "models" / name / "model.safetensors") for name in ("target", "expert"))
    same = {name for name in target if torch.equal(target[name], expert[name])}
    assert same == {name for name in target if "norm" in name or "lm_head" in name}


def test_the_mixture_asks_no_question_to_make_its_router() -> None:
    prompts = {world.prompt_and_answer(task, record)[0] for task in TASKS for record in records(task)}
    mixture = Mixture.load(DEMO / "moe.yaml")
    assert [expert.source_model for expert in mixture.experts] == ["demo/models/target", "demo/models/expert"]
    for expert in mixture.experts:
        assert not prompts & set(expert.prompts.positive)


def test_the_tokenizer_returns_every_question_as_it_was() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "base")
    for task in TASKS:
        for record in records(task):
            prompt = world.prompt_and_answer(task, record)[0]
            assert tokenizer.decode(tokenizer.encode(prompt, add_special_tokens=False)) == prompt


@pytest.mark.parametrize("task", TASKS)
def test_questions_differ_and_their_labels_are_balanced(task: str) -> None:
    prompts = [world.prompt_and_answer(task, record)[0] for record in records(task)]
    assert len(set(prompts)) == len(prompts) == 500
    labels = Counter(record.get("label") for record in records(task))
    assert max(labels.values()) - min(labels.values()) <= len(labels)


@pytest.mark.parametrize("task", TASKS)
def test_models_are_never_trained_on_a_question(task: str) -> None:
    prompts = {world.prompt_and_answer(task, record)[0] for record in records(task)}
    reader = make.Reader(prompts)
    generator = random.Random(5)
    for _ in range(3000):
        for draw in (reader.plain, reader.dialect, reader.dialect_fact, lambda g: reader.lesson(g, [task])):
            assert draw(generator)[0] not in prompts


def test_the_tasks_show_the_models_the_prompts_they_learned() -> None:
    for name, task in load_tasks(TASKS, task_dir=DEMO / "tasks").items():
        assert [task.task.doc_to_text(question) for question in task.questions] == [
            world.prompt_and_answer(name, record)[0] for record in records(name)
        ]


@pytest.mark.full
def test_best_beats_both_parents_and_every_uniform_weight_with_five_search_seeds() -> None:
    command = [sys.executable, "demo/verify.py", "--seeds", "5"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    means = {row[0]: float(row[5]) for row in rows}
    found = [mean for label, mean in means.items() if "seed" in label]
    assert len(found) == 5
    assert min(found) > max(mean for label, mean in means.items() if "seed" not in label) + 0.04
