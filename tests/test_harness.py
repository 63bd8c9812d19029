"""The harness: batches that are too large are halved once, models that share nothing are scored all the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from conftest import TASKS, Trio, save_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import RunError
from tvmerge.evaluators import QuestionScore
from tvmerge.evaluators.harness import HarnessModel, check_numbers
from tvmerge.evaluators.lm_eval import LmEvalEvaluator
from tvmerge.evaluators.tasks import load_tasks
from tvmerge.hub import resolve
from tvmerge.models.transformers import TransformersModel

NAMES = ("tiny_choice", "tiny_extract", "tiny_perplexity")


def live(folder: Path) -> TransformersModel:
    return TransformersModel.from_folder(folder, checkpoint=Checkpoint(resolve(str(folder))), device="cpu")


def evaluator() -> LmEvalEvaluator:
    return LmEvalEvaluator(tasks=load_tasks(NAMES, task_dir=TASKS), questions=dict.fromkeys(NAMES, range(30)))


def values(scores: Sequence[QuestionScore]) -> list[float]:
    return [score.score for score in scores if score.score is not None]


@contextmanager
def memory_of(model: torch.nn.Module, n_tokens: int) -> Iterator[list[int]]:
    """Run out of memory in every forward pass of more tokens; gives the sizes of those that were tried."""
    tried: list[int] = []

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        tried.append(ids.numel())
        if ids.numel() > n_tokens:
            raise torch.OutOfMemoryError

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


def test_a_batch_size_is_found_once(trio: Trio) -> None:
    model, questions = live(trio.target), evaluator()
    harness = HarnessModel(model, batch_size="auto")
    expected = values(questions.score(harness, lambda _: None).scores)
    with memory_of(model.model, 100) as tried:
        assert values(questions.score(harness, lambda _: None).scores) == pytest.approx(expected, rel=0.05)
        assert max(tried) > 100
        tried.clear()
        questions.score(harness, lambda _: None)
        assert max(tried) <= 100, "what did not fit was tried again"
        again = HarnessModel(model, batch_size="auto", tokens=harness.budget.tokens)
        tried.clear()
        evaluator().score(again, lambda _: None)
        assert max(tried) <= 100, "what another process had found was not used"


def test_a_batch_of_a_given_size_is_no_larger_than_its_requests_at_full_length(trio: Trio) -> None:
    model = live(trio.target)
    for size in (1, 4):
        harness, questions = HarnessModel(model, batch_size=size), evaluator()
        questions.score(harness, lambda _: None)
        with memory_of(model.model, 10_000) as tried:
            questions.score(harness, lambda _: None)
        # The longest request: six characters, four new tokens.
        assert max(tried) <= size * 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_models_that_share_nothing_are_scored_all_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = (
        MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **vocabulary))
        if kind == "mamba"
        else T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=2, **vocabulary)
        )
    )
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    names = ("tiny_choice", "tiny_extract")
    questions = LmEvalEvaluator(tasks=load_tasks(names, task_dir=TASKS), questions=dict.fromkeys(names, range(9)))
    harness = HarnessModel(live(tmp_path), batch_size=4)
    progress: list[int] = []
    scores = questions.score(harness, progress.append).scores
    assert sum(progress) == len(scores) == 18
    assert all(score.score in (0.0, 1.0) for score in scores)
    assert scores == questions.score(harness, lambda _: None).scores


def test_a_model_that_gives_no_numbers_to_many_questions_has_no_score(trio: Trio) -> None:
    model, questions = live(trio.target), evaluator()
    harness = HarnessModel(model, batch_size=4)
    with torch.no_grad():
        model.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match=r"90 of 90 questions got no number from the model: its values are too large"):
        questions.score(harness, lambda _: None)


def test_a_tenth_of_the_questions_may_lack_a_number() -> None:
    requests = [Instance("loglikelihood", {}, ("a", "b"), 0, metadata=("task", n // 2, 1)) for n in range(40)]
    for n_lost, is_refused in ((2, False), (3, True)):
        answers = [(float("nan") if n < 2 * n_lost else -1.0, False) for n in range(40)]
        with pytest.raises(RunError, match="3 of 20") if is_refused else nullcontext():
            check_numbers({"task": [(requests, answers)]}, n_questions=20)


@pytest.mark.filterwarnings("ignore")
def test_answers_that_are_drawn_are_those_of_lm_eval(trio: Trio, tmp_path: Path) -> None:
    for path in TASKS.glob("tiny_*.*"):
        text = path.read_text().replace("do_sample: false", "do_sample: true\n  temperature: 1.0")
        (tmp_path / path.name).write_text(text.replace("max_gen_toks: 4", "max_gen_toks: 1"))
    model, name = live(trio.target), "tiny_extract"
    questions = LmEvalEvaluator(tasks=load_tasks([name], task_dir=tmp_path), questions={name: range(40)})
    scores = questions.score(HarnessModel(model, batch_size=8), lambda _: None).scores
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=8),
        tasks=[name],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    expected = [sample["exact_match"] for sample in theirs["samples"][name]]
    assert [score.score for score in scores] == expected
    assert 0 < sum(expected) < 40
    assert scores == questions.score(HarnessModel(model, batch_size=8), lambda _: None).scores
