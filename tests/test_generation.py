"""Greedy answers: those of transformers' own generate and of lm-eval, by a faster way."""

from __future__ import annotations

import functools
import io
import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import architectures
import pytest
import torch
from conftest import ROOT, save_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from test_stop_strings import first_end
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BloomConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)

from tvmerge.evaluators.tasks import load_tasks
from tvmerge.models import generation
from tvmerge.models.batching import TokenBudget
from tvmerge.models.generation import GenerationRequest, PreparedGeneration, can_generate_here

SIZES = architectures.SIZES


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One token for each character, for all tokens of the models."""
    folder = tmp_path_factory.mktemp("characters")
    save_tokenizer(folder, "abcdefghijklmnopqrstuvwxyz 東京タワー。問題答\n")
    return AutoTokenizer.from_pretrained(folder)


def random_requests(n: int, *, seed: int, longest: int = 24, stop: tuple[str, ...] = ()) -> list[GenerationRequest]:
    draw = random.Random(seed)
    return [
        GenerationRequest(
            prompt=[draw.randrange(3, 24) for _ in range(draw.randint(1, longest))],
            max_new_tokens=draw.randint(1, 14),
            stop=stop,
        )
        for _ in range(n)
    ]


def by_transformers(model: PreTrainedModel, request: GenerationRequest) -> list[int]:
    """The reference: each prompt alone."""
    prompt = torch.tensor([list(request.prompt)])
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    found: list[int] = answer[0, prompt.shape[1] :].tolist()
    return found


def answer_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[GenerationRequest], tokens: int = 400
) -> list[list[int] | None]:
    return PreparedGeneration(requests, tokenizer).run(model, budget=TokenBudget(tokens))


def with_end(model: PreTrainedModel, requests: Sequence[GenerationRequest]) -> None:
    """Make a token that the model likes the end of an answer, so that some answers end early and some do not."""
    model.generation_config.eos_token_id = None
    answers = [by_transformers(model, request) for request in requests]
    often: dict[int, int] = {}
    for answer in answers:
        for token in set(answer[1:]):
            often[token] = often.get(token, 0) + 1
    end = min(often, key=lambda token: (abs(often[token] - len(answers) // 2), token))
    model.generation_config.eos_token_id = [end, 2]  # and the tokenizer's


def window(name: str) -> PreTrainedModel:
    """A model whose layers, or some of them, look back no farther than 4 tokens."""
    config = architectures.ARCHITECTURES[name]()
    return filled(type(config)(**{**SIZES, "sliding_window": 4}))


def filled(config: Any, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    return varied(auto_class.from_config(config).eval())


def varied(model: PreTrainedModel) -> PreTrainedModel:
    """Fill a model so that its answers vary: many a random one says the same token over and over."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(mean=float(name.endswith("weight")), std=0.1)
    return model


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    **{
        name: functools.partial(architectures.build, name)
        for name in (*architectures.ARCHITECTURES, *architectures.CONVERTED)
    },
    "mistral, sliding": lambda: window("mistral"),
    "gemma2, sliding": lambda: window("gemma2"),
    "gemma3, sliding": lambda: window("gemma3"),
    "bloom": lambda: filled(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)),
    "opt": lambda: filled(
        OPTConfig(
            vocab_size=40,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_are_those_of_generate_for_each_prompt_alone(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = varied(BUILDERS[name]())
    assert can_generate_here(model)
    requests = random_requests(24, seed=1)
    with_end(model, requests)
    expected = [by_transformers(model, request) for request in requests]
    early = sum(len(answer) < request.max_new_tokens for answer, request in zip(expected, requests, strict=True))
    assert 0 < early < len(requests), "nothing would be seen of answers that end early"
    assert len({tuple(answer) for answer in expected}) > 6
    assert answer_all(model, tokenizer, requests) == expected
    assert answer_all(model, tokenizer, requests, tokens=1) == expected, "each prompt in a batch of its own"


def test_what_cannot_be_done_here_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    assert not can_generate_here(
        filled(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4))
    ), "keeps a state and no cache"
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    assert not can_generate_here(filled(config, AutoModelForSeq2SeqLM))
    steered = architectures.build("llama")
    steered.generation_config.no_repeat_ngram_size = 2
    assert not can_generate_here(steered)
    broken = architectures.build("llama")
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    assert not can_generate_here(broken)
    long = architectures.build("phi3")
    long.config.rope_parameters = {**long.config.rope_parameters, "rope_type": "longrope"}
    assert not can_generate_here(long)


@pytest.mark.parametrize("lost", ["attention_mask", "position_ids", "past_key_values"])
def test_a_model_that_does_not_heed_its_inputs_is_refused(lost: str) -> None:
    model = architectures.build("gpt2")
    forward = model.forward

    def deaf(**inputs: Any) -> Any:
        return forward(**{**inputs, lost: None} if inputs.get("past_key_values") is not None else inputs)

    model.forward = deaf
    assert not can_generate_here(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_models_of_few_digits_are_not_refused_for_them(name: str, dtype: torch.dtype) -> None:
    assert can_generate_here(architectures.build(name).to(dtype))


def test_a_repetition_penalty_of_the_model_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    model = varied(architectures.build("llama"))
    requests = random_requests(24, seed=2)
    liked = by_transformers(model, requests[0])[0]
    # Padding is token 0, which no prompt holds: counted as seen, it would be less likely than it is.
    with torch.no_grad():
        model.lm_head.weight[[0, liked]] = model.lm_head.weight[[liked, 0]]
    without = answer_all(model, tokenizer, requests)
    assert sum(answer is not None and 0 in answer for answer in without) > 2
    model.generation_config.repetition_penalty = 1.4
    assert can_generate_here(model)
    expected = [by_transformers(model, request) for request in requests]
    assert expected != without
    assert answer_all(model, tokenizer, requests) == expected


def test_rows_that_are_done_leave_the_batch_and_change_nothing(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = window("gemma3")
    requests = random_requests(24, seed=3)
    rows: list[int] = []
    forward = model.forward

    def counted(**inputs: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        return forward(**inputs)

    model.forward = counted
    answers = answer_all(model, tokenizer, requests, tokens=10_000)
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 3
    assert sum(rows) < 0.85 * 24 * len(rows)
    rows.clear()
    monkeypatch.setattr(generation, "_DONE_SHARE", 1.0)  # never
    assert answer_all(model, tokenizer, requests, tokens=10_000) == answers
    assert set(rows) == {24}


def test_every_batch_is_reported_once(tokenizer: PreTrainedTokenizerBase) -> None:
    model = architectures.build("llama")
    reported: list[int] = []
    prepared = PreparedGeneration(random_requests(20, seed=4), tokenizer)
    prepared.run(model, budget=TokenBudget(100), done=reported.extend)
    assert sorted(reported) == list(range(20))
    assert PreparedGeneration([], tokenizer).run(model, budget=TokenBudget(100)) == []


def test_running_out_of_memory_halves_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    model = architectures.build("llama")
    requests = random_requests(24, seed=5)
    expected = answer_all(model, tokenizer, requests)
    forward = model.forward
    refused = 0

    def small(**inputs: Any) -> Any:
        nonlocal refused
        # In the middle of an answer too: the mask is as wide as the cache.
        mask = inputs["attention_mask"]
        if mask is not None and mask.numel() > 90:
            refused += 1
            raise torch.OutOfMemoryError
        return forward(**inputs)

    model.forward = small
    budget = TokenBudget(1000)
    reported: list[int] = []
    assert PreparedGeneration(requests, tokenizer).run(model, budget=budget, done=reported.extend) == expected
    assert refused
    assert budget.tokens < 1000
    assert sorted(reported) == list(range(24))


def test_weights_that_are_no_numbers_give_no_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    model = architectures.build("llama")
    requests = random_requests(8, seed=6)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    answers = answer_all(model, tokenizer, requests)
    assert answers == [None] * 8
    assert PreparedGeneration(requests, tokenizer).texts(answers) == [None] * 8


def test_the_tokenizers_end_of_text_ends_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    model = architectures.build("llama")
    requests = random_requests(24, seed=10)
    model.generation_config.eos_token_id = 2
    expected = [by_transformers(model, request) for request in requests]
    assert any(len(answer) < request.max_new_tokens for answer, request in zip(expected, requests, strict=True))
    model.generation_config.eos_token_id = None
    assert answer_all(model, tokenizer, requests) == expected


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_one_row_that_fails_fails_alone(tokenizer: PreTrainedTokenizerBase, value: str) -> None:
    model = architectures.build("llama")
    requests = random_requests(12, seed=7)
    expected = answer_all(model, tokenizer, requests)
    forward = model.forward
    steps = 0

    def failing(**inputs: Any) -> Any:
        nonlocal steps
        steps += 1
        output = forward(**inputs)
        if steps == 2:
            output.logits[0, -1, 7] = float(value)
        # A token that is ruled out is no failure.
        output.logits[:, :, 0] = -float("inf")
        return output

    model.forward = failing
    answers = answer_all(model, tokenizer, requests, tokens=10_000)
    assert answers.count(None) == 1
    assert all(answer in (None, want) for answer, want in zip(answers, expected, strict=True))


def test_a_request_that_asks_for_nothing_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="request 1: 0 prompt tokens"):
        PreparedGeneration([GenerationRequest([3], 1, ()), GenerationRequest([], 1, ())], tokenizer)
    with pytest.raises(ValueError, match="0 new ones"):
        PreparedGeneration([GenerationRequest([3], 0, ())], tokenizer)


def test_nothing_outside_is_touched_or_printed(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    model = architectures.build("llama")
    side, settings_before = tokenizer.padding_side, model.generation_config.to_dict()
    random_before, parameters = torch.get_rng_state(), [each.clone() for each in model.parameters()]
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert can_generate_here(model)
        answer_all(model, tokenizer, random_requests(8, seed=8, stop=("a", "</s>")))
    assert printed.getvalue() == ""
    assert not caplog.records
    assert tokenizer.padding_side == side
    assert model.generation_config.to_dict() == settings_before
    assert torch.equal(torch.get_rng_state(), random_before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))


def test_generation_ends_at_stop_strings_and_its_text_is_cut_there(tokenizer: PreTrainedTokenizerBase) -> None:
    model = architectures.build("llama")
    stop = ("ab", "\n", "東", "dd", "</s>")
    requests = random_requests(40, seed=9, stop=stop)
    whole = [by_transformers(model, request) for request in requests]
    prepared = PreparedGeneration(requests, tokenizer)
    answers = prepared.run(model, budget=TokenBudget(500))
    assert answers == [ids[: first_end(tokenizer, ids, stop)] for ids in whole]
    assert 5 < sum(len(a or []) < len(b) for a, b in zip(answers, whole, strict=True)) < 40
    assert prepared.texts(answers) == [
        postprocess_generated_text(tokenizer.decode(ids, skip_special_tokens=True), list(stop), None) for ids in whole
    ]


# lm-eval itself, on the demo.


def demo_instances(n: int) -> list[Instance]:
    tasks = load_tasks(["toy_jsquad"], task_dir=ROOT / "demo" / "tasks")
    with redirect_stderr(io.StringIO()):
        tasks["toy_jsquad"].task.build_all_requests(samples=list(range(n)))
    return list(tasks["toy_jsquad"].task.instances)


def demo_requests(instances: Sequence[Instance], harness: HFLM) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            harness.tok_encode(instance.args[0]), instance.args[1]["max_gen_toks"], (*instance.args[1]["until"], "</s>")
        )
        for instance in instances
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["target", "base", "tuned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_those_of_lm_eval(name: str, dtype: torch.dtype) -> None:
    folder = ROOT / "demo" / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=50)
    assert can_generate_here(model)
    instances = demo_instances(200)
    expected = harness.generate_until(instances, disable_tqdm=True)
    assert len(set(expected)) > 4, "a model that says one thing shows nothing"
    requests = demo_requests(instances, harness)
    if dtype == torch.float32:
        prepared = PreparedGeneration(requests, harness.tokenizer)
        assert prepared.texts(prepared.run(model, budget=TokenBudget(2000))) == expected
    # In bfloat16 a batch's shape decides how sums are rounded, and so do near ties between tokens: lm-eval's batches.
    order = sorted(range(200), key=lambda index: (-len(requests[index].prompt), instances[index].args[0]))
    for start in range(0, 200, 50):
        batch = order[start : start + 50]
        prepared = PreparedGeneration([requests[index] for index in batch], harness.tokenizer)
        texts = prepared.texts(prepared.run(model, budget=TokenBudget(100_000)))
        assert texts == [expected[index] for index in batch]
