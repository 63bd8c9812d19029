"""Running out of memory: batches are halved, scores stay the same, and it is said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TASKS, Trio, save_mistral, save_tokenizer
from test_harness import live, memory_of
from test_local_judge import client_of, folder, judge_of
from test_mt_bench import bench
from transformers import MambaConfig, MambaForCausalLM

from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.mt_bench import MtBenchEvaluator
from tvmerge.evaluators.tasks import load_tasks
from tvmerge.models.batching import TokenBudget, is_out_of_memory, run_in_batches
from tvmerge.models.chat import ChatModel
from tvmerge.models.chat_template import open_template

__all__ = ["folder"]  # a fixture

#: Scores a model with one batch for all, in a process whose address space ends where the batch begins.
SCORE = """
import json, resource, sys
from pathlib import Path

from tvmerge.checkpoint import Checkpoint
from tvmerge.evaluators.harness import HarnessModel
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.tasks import load_tasks
from tvmerge.hub import resolve
from tvmerge.models.chat import ChatModel, ChatRequest
from tvmerge.models.chat_template import open_template
from tvmerge.models.transformers import TransformersModel

folder, tasks = sys.argv[1:]
opened = Checkpoint(resolve(folder))
live = TransformersModel.from_folder(Path(folder), checkpoint=opened, device="cpu", dtype="float32")
template = open_template("none", live.tokenizer)
requests = [ChatRequest([{"role": "user", "content": "abcdefghij"[n % 10] * 60}], 0.0, n) for n in range(100)]

def evaluator(name):
    return LmEvalEvaluator(tasks=load_tasks([name], task_dir=Path(tasks)), questions={name: list(range(40))})

asked = {name: evaluator(name) for name in ("tiny_choice", "tiny_extract")}

def make(kind, size):
    if kind == "chat":
        return ChatModel(live, template=template, max_new_tokens=3, batch_size=size)
    return HarnessModel(live, batch_size=size)

def score(kind, model):
    if kind == "chat":
        return [[answer.text, answer.reason] for answer in model.answer(requests)]
    return [each.score for each in asked[kind].score(model, lambda n: None).scores]

for kind in ("tiny_choice", "tiny_extract", "chat"):
    expected, model = score(kind, make(kind, 1)), make(kind, 1000)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2_000_000, resource.RLIM_INFINITY))
    found = score(kind, model)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps([kind, found == expected, model.notes]))
"""

NOTE = "--batch_size {} does not fit in memory: batches are halved until they do"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads how large it is from Linux")
def test_a_process_without_more_memory_halves_its_batches(tmp_path: Path) -> None:
    # A model whose forward passes need far more memory than its weights.
    model = save_mistral(tmp_path / "wide", seed=5, vocab_size=20_000, hidden_size=64, intermediate_size=4096)
    done = subprocess.run(
        [sys.executable, "-c", SCORE, str(model), str(TASKS)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[kind, True, [NOTE.format(1000)]] for kind in ("tiny_choice", "tiny_extract", "chat")]


def test_only_errors_of_memory_are_taken_for_that() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    tried: list[int] = []

    def fails(batch: list[int]) -> None:
        tried.append(len(batch))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run_in_batches([1] * 8, TokenBudget(8), fails)
    assert tried == [8]


@pytest.mark.filterwarnings("ignore")
def test_what_is_left_to_lm_eval_is_halved_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **vocabulary)).save_pretrained(
        tmp_path
    )
    save_tokenizer(tmp_path)
    model, name = live(tmp_path), "tiny_extract"
    questions = LmEvalEvaluator(tasks=load_tasks([name], task_dir=TASKS), questions={name: range(20)})
    expected = questions.score(HarnessModel(model, batch_size=1), lambda _: None).scores
    harness = HarnessModel(model, batch_size=16)
    questions.prepare(harness)
    with memory_of(model.model, 40) as tried:
        assert questions.score(harness, lambda _: None).scores == expected
    assert max(tried) > 40
    assert harness.notes == [NOTE.format(16)]
    with memory_of(model.model, 1), pytest.raises(torch.OutOfMemoryError):
        questions.score(harness, lambda _: None)


def test_a_local_judge_says_so_too(trio: Trio, folder: Path) -> None:
    candidate = live(trio.target)
    client = client_of(folder, batch_size=8)
    chat = ChatModel(
        candidate,
        template=open_template("none", candidate.tokenizer),
        max_new_tokens=4,
        batch_size=4,
        more_notes=lambda: client.notes,
    )

    def ratings() -> list[float | None]:
        judge = judge_of(client)
        evaluator = MtBenchEvaluator(bench=bench(), questions=list(range(16)), judge=judge, max_unscored=0.9)
        try:
            return [score.score for score in evaluator.score(chat, lambda n: None, name="x").scores]
        finally:
            judge.close()

    expected = ratings()
    assert chat.notes == []
    assert client._model is not None
    with memory_of(client._model.model, 24) as tried:
        found = ratings()
    assert max(tried) > 24
    differ = sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
    assert differ <= 2, "in bfloat16 a near tie may fall otherwise"
    assert chat.notes == [f"the judge: {NOTE.format(8)}"]
