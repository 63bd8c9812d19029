"""The evaluator of conversations: what is drawn, when it is judged, what a failure does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from conftest import Trio
from judge_server import JudgeServer, Request, client_of, judge_of

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import RunError, StopError
from tvmerge.evaluators.bench import Bench, BenchQuestion
from tvmerge.evaluators.fastchat import FastChatFiles
from tvmerge.evaluators.mt_bench import Asking, MtBenchEvaluator
from tvmerge.hub import resolve
from tvmerge.judges import Case, Judge
from tvmerge.judges.rouge_l import RougeL
from tvmerge.models.chat import ChatModel
from tvmerge.models.chat_template import open_template
from tvmerge.models.transformers import TransformersModel

CATEGORIES = ("writing", "math", "stem", "何か")


@pytest.fixture(scope="module")
def live(trio: Trio) -> TransformersModel:
    return TransformersModel.from_folder(
        trio.target, checkpoint=Checkpoint(resolve(str(trio.target))), device="cpu", dtype="float32"
    )


def chat(live: TransformersModel, **changes: Any) -> ChatModel:
    settings = {"max_new_tokens": 8, "batch_size": 5, **changes}
    return ChatModel(live, template=open_template("none", live.tokenizer), **settings)


def bench(n: int = 16) -> Bench:
    questions = []
    for number in range(n):
        turns = ("abcdefghij"[number % 10] + "東京"[: 1 + number // 10], "タワー")
        length = 1 + number % 2
        questions.append(BenchQuestion(number, CATEGORIES[number % 4], turns[:length], ("a", "b")[:length]))
    return Bench("mine", tuple(questions))


class Listening:
    """A judge that remembers what it was given."""

    name = "listening"
    identity: Mapping[str, Any] = MappingProxyType({})

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self._judge = RougeL()

    def submit(self, case: Case) -> Any:
        self.cases.append(case)
        return self._judge.submit(case)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def answers(live: TransformersModel, questions: list[int], **changes: Any) -> dict[tuple[str, ...], tuple[str, ...]]:
    """What was asked → what was answered."""
    asking = Asking(**changes.pop("asking", {}))
    judge = Listening()
    evaluator = MtBenchEvaluator(bench=bench(), questions=questions, judge=judge, asking=asking)
    evaluator.score(chat(live, **changes), lambda n: None, name="x")
    return {case.questions: case.answers for case in judge.cases}


def test_a_draw_depends_on_its_question_turn_and_choice_alone(live: TransformersModel) -> None:
    everything = answers(live, list(range(16)))
    for batch_size, questions in ((1, list(range(16))), (16, list(range(16))), (3, [1, 4, 7, 11]), (2, [5])):
        some = answers(live, questions, batch_size=batch_size)
        assert some == {asked: everything[asked] for asked in some}
    assert answers(live, list(range(16)), asking={"seed": 1}) != everything
    # FastChat's temperature of math is 0: no seed changes an answer to it.
    other = answers(live, list(range(16)), asking={"seed": 1})
    math = [question.turns for question in bench().questions if question.category == "math"]
    assert all(other[turns] == everything[turns] for turns in math)
    greedy = answers(live, list(range(16)), asking={"temperature": 0.0})
    assert greedy == answers(live, list(range(16)), asking={"temperature": 0.0, "seed": 1})
    assert all(greedy[turns] == everything[turns] for turns in math)
    writing = [question.turns for question in bench().questions if question.category in ("writing", "何か")]
    assert any(greedy[turns] != everything[turns] for turns in writing)


def test_the_second_turn_goes_on_from_the_first(live: TransformersModel) -> None:
    found = answers(live, list(range(16)), asking={"temperature": 0.0})
    model, tokenizer = live.model, live.tokenizer
    for questions, said in found.items():
        if len(questions) == 2:
            ids = torch.tensor([tokenizer.encode(f"{questions[0]}{said[0]}\n{questions[1]}")])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == said[1]


def evaluator_of(judge: Judge, files: FastChatFiles | None = None) -> MtBenchEvaluator:
    return MtBenchEvaluator(bench=bench(), questions=list(range(16)), judge=judge, files=files)


def test_judging_begins_while_answers_are_being_generated(live: TransformersModel, server: JudgeServer) -> None:
    judged: list[float] = []
    generated: list[float] = []

    def rule(request: Request, earlier: int) -> str:
        judged.append(time.monotonic())
        return "ok"

    server.rule = rule
    model = chat(live, batch_size=2)

    def slow(*_: Any) -> None:
        time.sleep(0.02)
        generated.append(time.monotonic())

    hook = live.model.register_forward_hook(slow)
    try:
        with judge_of(client_of(server)) as judge:
            told: list[int] = []
            scored = evaluator_of(judge).score(model, told.append, name="x")
    finally:
        hook.remove()
    assert len(judged) == len(scored.scores) == sum(told) == 24
    # Of the second turns none is answered before all first ones are, and most judgments were asked for by then.
    assert sum(when < generated[-1] for when in judged) >= 16
    assert judged[0] < generated[len(generated) // 2]


def test_a_judge_that_goes_away_ends_the_generation_too(
    live: TransformersModel, server: JudgeServer, tmp_path: Path
) -> None:
    server.rule = lambda request, earlier: "quota"
    calls: list[int] = []

    def slow(*_: Any) -> None:
        time.sleep(0.05)
        calls.append(1)

    hook = live.model.register_forward_hook(slow)
    try:
        with judge_of(client_of(server, max_retries=0)) as judge, pytest.raises(StopError, match="add credit"):
            evaluator_of(judge, FastChatFiles(tmp_path, judge="m")).score(
                chat(live, batch_size=1), lambda n: None, name="x"
            )
    finally:
        hook.remove()
    assert len(calls) < 100, "24 answers of 8 tokens are 192 passes"
    assert not list(tmp_path.iterdir())


def test_a_model_without_numbers_is_unscored(live: TransformersModel, tmp_path: Path) -> None:
    model = chat(live)
    weight = live.model.lm_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(RunError, match=r"16 of 16 questions lack a rating.*no answer"):
            evaluator_of(RougeL(), FastChatFiles(tmp_path, judge="m")).score(model, lambda n: None, name="x")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert not list(tmp_path.iterdir())
