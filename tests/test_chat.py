"""Answers of a live model to chats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHARACTERS, save_mistral, save_tokenizer
from test_chat_template import MISTRAL
from test_generation import filled, varied
from transformers import AutoModelForSeq2SeqLM, MambaConfig, MistralConfig, PreTrainedModel, T5Config

from tvmerge.checkpoint import Checkpoint
from tvmerge.hub import resolve
from tvmerge.models import chat
from tvmerge.models.chat import ChatAnswer, ChatModel, ChatRequest, max_length
from tvmerge.models.chat_template import ChatTemplate, open_template
from tvmerge.models.generation import DOES_NOT_FIT, NOT_FINITE
from tvmerge.models.transformers import TransformersModel, load_tokenizer

QUESTIONS = ["abc", "de 東", "タワー", "j", "hgf edc ba", "aa", "京。", "ワー ab", "cafe", "bad", "jig", "fad 東京"]


@pytest.fixture
def live(tmp_path: Path) -> TransformersModel:
    folder = save_mistral(tmp_path / "mistral", seed=3)
    checkpoint = Checkpoint(resolve(str(folder)))
    model = TransformersModel.from_folder(folder, checkpoint=checkpoint, device="cpu", dtype="float32")
    varied(model.model)
    model.tokenizer.chat_template = MISTRAL
    return model


class _Live(TransformersModel):
    """One whose weights are never replaced."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        save_tokenizer(folder)
        self.model, self.tokenizer = model, load_tokenizer(folder)


def asks(temperature: float = 0.0) -> list[ChatRequest]:
    return [ChatRequest([{"role": "user", "content": text}], temperature, i) for i, text in enumerate(QUESTIONS)]


def chat_model(live: TransformersModel, template: str | None = None, **settings: Any) -> ChatModel:
    opened = open_template(template, live.tokenizer)
    return ChatModel(live, **{"template": opened, "max_new_tokens": 10, "batch_size": 4, **settings})


def by_transformers(live: TransformersModel, request: ChatRequest, n_new: int = 10) -> str:
    encoded = live.tokenizer.apply_chat_template(
        list(request.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = live.model.generate(**encoded, do_sample=False, max_new_tokens=n_new, pad_token_id=2)
    text = live.tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip()


def test_greedy_answers_are_those_of_transformers(live: TransformersModel) -> None:
    model = chat_model(live)
    assert not model.notes
    answers = model.answer(asks())
    assert [answer.text for answer in answers] == [by_transformers(live, request) for request in asks()]
    assert {answer.reason for answer in answers} == {None}
    assert model.answer(asks(9e-5)) == answers, "FastChat's rule"
    assert model.answer([]) == []


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_answers_do_not_depend_on_who_else_is_asked(live: TransformersModel, temperature: float) -> None:
    requests = asks(temperature)
    expected = chat_model(live, batch_size="auto").answer(requests)
    assert len({answer.text for answer in expected}) > 5
    for size in (1, 3, 32):
        model = chat_model(live, batch_size=size)
        assert model.answer(requests[::-1]) == expected[::-1]
        assert model.answer(requests) == expected
        assert [model.answer([request])[0] for request in requests] == expected


def test_seeds_tell_answers_apart(live: TransformersModel) -> None:
    requests = [ChatRequest(asks()[0].messages, 1.5, seed) for seed in range(12)]
    answers = chat_model(live).answer(requests)
    assert len({answer.text for answer in answers}) > 6
    before = torch.get_rng_state()
    torch.manual_seed(1)
    assert chat_model(live).answer(requests) == answers
    torch.set_rng_state(before)


def test_an_answer_is_told_as_soon_as_its_row_ends(live: TransformersModel) -> None:
    live.model.generation_config.eos_token_id = None
    live.tokenizer.eos_token = None
    told: list[tuple[int, ChatAnswer]] = []
    steps: list[int] = []
    live.model.register_forward_hook(lambda *_: steps.append(len(told)))
    live.model.config.max_position_embeddings = 30  # a longer question leaves less room
    answers = chat_model(live, batch_size=12).answer(asks(), lambda *each: told.append(each))
    assert sorted(told, key=lambda each: each[0]) == list(enumerate(answers))
    assert len(set(steps)) > 2
    assert {answer.n_tokens for answer in answers} > {10}


def test_answers_end_at_stop_strings_and_tokens_and_are_cut_there(live: TransformersModel) -> None:
    plain = chat_model(live, "none").answer(asks())
    texts = [answer.text or "" for answer in plain]
    last = max(CHARACTERS.strip(), key=lambda character: sum(character in text for text in texts))

    def with_(stop: tuple[str, ...], ids: frozenset[int]) -> list[ChatAnswer]:
        template = ChatTemplate("made up", True, stop, ids, True, open_template("none", live.tokenizer).write)
        return ChatModel(live, template=template, max_new_tokens=10, batch_size=4).answer(asks())

    cut = [text.split(last)[0].strip() for text in texts]
    assert cut != texts
    assert [answer.text for answer in with_((last,), frozenset())] == cut
    (token,) = live.tokenizer.encode(last, add_special_tokens=False)
    by_token = with_((), frozenset({token}))
    assert [answer.text for answer in by_token] == cut
    assert sum(answer.n_tokens for answer in by_token) < sum(answer.n_tokens for answer in plain)


def test_a_prompt_without_room_has_no_answer_and_others_get_what_there_is(live: TransformersModel) -> None:
    n_around = len(live.tokenizer.apply_chat_template([{"role": "user", "content": ""}], return_dict=False))
    room = 128 - n_around
    requests = [ChatRequest([{"role": "user", "content": "a" * n}], 0.0, 0) for n in (room, room - 1, room - 4, 5)]
    live.model.generation_config.eos_token_id = None
    live.tokenizer.eos_token = None
    live.tokenizer.chat_template = MISTRAL
    told: list[int] = []
    answers = chat_model(live).answer(requests, lambda index, _: told.append(index))
    assert answers[0] == ChatAnswer(None, "prompt of 128 tokens, the model takes 128", 0)
    assert told[0] == 0
    assert [answer.n_tokens for answer in answers] == [0, 1, 4, 10]


def test_what_does_not_fit_alone_has_no_answer(live: TransformersModel) -> None:
    requests = [*asks(0.7), ChatRequest([{"role": "user", "content": "a" * 60}], 0.7, 5)]
    expected = chat_model(live).answer(requests)
    model = chat_model(live, batch_size="auto", tokens=10_000)

    def small(_: object, args: object, inputs: dict[str, Any]) -> None:
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        if (mask if mask is not None else ids).numel() > 70:
            raise torch.OutOfMemoryError

    live.model.register_forward_pre_hook(small, with_kwargs=True)
    answers = model.answer(requests)
    assert answers[-1] == ChatAnswer(None, DOES_NOT_FIT, 0)
    assert answers[:-1] == expected[:-1]
    assert model.budget.tokens < 10_000


def test_weights_without_numbers_give_no_answers(live: TransformersModel) -> None:
    model = chat_model(live)
    with torch.no_grad():
        live.model.lm_head.weight[4] = math.nan
    assert {answer.reason for answer in model.answer(asks(0.7))} == {NOT_FINITE}


def test_prompts_are_remembered_and_not_for_ever(live: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_REMEMBERED_TOKENS", 100)
    model = chat_model(live)
    expected = model.answer(asks())
    assert 0 < model._n_remembered == sum(map(len, model._remembered.values())) <= 100
    assert model.answer(asks()) == expected
    first = next(reversed(model._remembered))
    monkeypatch.setattr(ChatTemplate, "encode", None)
    assert model._encode(first)


def mamba() -> PreTrainedModel:
    return filled(
        MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, bos_token_id=1, eos_token_id=2)
    )


def t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0, eos_token_id=2
    )
    return filled(config, AutoModelForSeq2SeqLM)


def steered() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = filled(config)
    model.generation_config.typical_p = 0.95
    return model


@pytest.mark.parametrize("build", [mamba, t5, steered])
def test_models_that_cannot_be_batched_are_asked_one_by_one(build: Any, tmp_path: Path) -> None:
    live = _Live(build(), tmp_path)
    model = chat_model(live, "none")
    assert model.notes
    assert "model.generate" in model.notes[0]
    before = torch.get_rng_state()
    told: list[int] = []
    greedy = model.answer(asks(), lambda index, _: told.append(index))
    assert told == list(range(len(QUESTIONS)))
    drawn = model.answer(asks(1.5))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn != greedy
    assert model.answer(asks(1.5)[::-1]) == drawn[::-1]
    prompt = torch.tensor([live.tokenizer.encode("abc")])
    output = live.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=10, pad_token_id=2
    )
    start = 1 if live.model.config.is_encoder_decoder else prompt.shape[1]
    assert greedy[0].text == live.tokenizer.decode(output[0, start:], skip_special_tokens=True).strip()


def test_failures_of_one_by_one_are_those_of_a_request(tmp_path: Path) -> None:
    live = _Live(steered(), tmp_path)
    model = chat_model(live, "none")
    expected = model.answer(asks(1.0))
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError

    hook = live.model.register_forward_pre_hook(fail)
    found = model.answer(asks(1.0))
    assert found == [ChatAnswer(None, DOES_NOT_FIT, 0), *expected[1:]]
    hook.remove()
    with torch.no_grad():
        live.model.lm_head.weight[4] = math.nan
    assert {answer.reason for answer in model.answer([*asks(1.0), *asks()])} == {NOT_FINITE}


def test_the_length_is_the_one_lm_eval_finds(live: TransformersModel) -> None:
    from lm_eval.models.utils import resolve_max_length

    assert max_length(live.model.config, live.tokenizer) == 128
    for config in (live.model.config, MambaConfig(), T5Config()):
        for length in (int(1e30), 77):
            live.tokenizer.model_max_length = length
            assert max_length(config, live.tokenizer) == resolve_max_length(config, live.tokenizer)
