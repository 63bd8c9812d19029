"""Drawn tokens: the right distribution, and the same ones however a batch is made up."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import architectures
import pytest
import torch
from test_generation import BUILDERS, random_requests, tokenizer, varied
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tvmerge.models.batching import TokenBudget
from tvmerge.models.generation import (
    DOES_NOT_FIT,
    NOT_FINITE,
    Answer,
    GenerationRequest,
    Generator,
    can_generate_here,
)
from tvmerge.models.sampling import Draw, Filters, Sampling, draw_tokens, uniform

__all__ = ["tokenizer"]  # a fixture


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    tokens: int = 400,
    max_rows: int | None = None,
) -> list[Answer]:
    found: dict[int, Answer] = {}

    def done(index: int, answer: Answer) -> None:
        assert index not in found
        found[index] = answer

    generator = Generator(tokenizer, alone=True)
    generator.run(model, requests, budget=TokenBudget(tokens), done=done, max_rows=max_rows)
    return [found[index] for index in range(len(requests))]


def mixed_requests(n: int, *, seed: int) -> list[GenerationRequest]:
    """A third of them greedy, the others of several temperatures."""
    return [
        request if i % 3 == 0 else dataclasses.replace(request, sampling=Sampling((0.3, 0.7, 1.5, 4.0)[i % 4], i))
        for i, request in enumerate(random_requests(n, seed=seed))
    ]


def chi_square(counts: Sequence[int], shares: Sequence[float]) -> float:
    """In units of its standard deviation from its mean: Pearson's statistic of cells that are not too small."""
    n = sum(counts)
    cells = [(c, n * p) for c, p in zip(counts, shares, strict=True) if n * p >= 5]
    rest = n - sum(c for c, _ in cells), n - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic, freedom = sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


# Numbers.


def test_numbers_are_uniform_and_those_of_every_process() -> None:
    numbers = [uniform(seed, step) for seed in range(100) for step in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    counts = Counter(int(20 * number) for number in numbers)
    assert abs(chi_square([counts[i] for i in range(20)], [1 / 20] * 20)) < 4
    pairs = Counter((int(5 * a), int(5 * b)) for a, b in itertools.pairwise(numbers))
    assert abs(chi_square([pairs[i, j] for i in range(5) for j in range(5)], [1 / 25] * 25)) < 4
    code = "from tvmerge.models.sampling import uniform; print(uniform(7, 3), uniform(-1, 2**70))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [repr(uniform(7, 3)), repr(uniform(-1, 2**70))]
    assert uniform(7, 3) == 0.6666092004987639, "written down on another day"


def test_a_temperature_of_zero_is_refused() -> None:
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="greater than 0"):
            Sampling(temperature, 0)


# Distributions.


def test_draws_are_the_inverse_of_the_distribution_function() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for number, token in ((0.0, 0), (0.499, 0), (0.501, 1), (0.749, 1), (0.751, 2), (0.876, 3), (1 - 2**-53, 3)):
        assert draw_tokens(logits, [Draw(1.0, number)], Filters()).tolist() == [[token]]
    ruled_out = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for number, token in ((0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-53, 3)):
        assert draw_tokens(ruled_out, [Draw(0.1, number)], Filters()).tolist() == [[token]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_first_tokens_come_as_often_as_softmax_says(temperature: float, tokenizer: PreTrainedTokenizerBase) -> None:
    model = varied(architectures.build("llama"))
    model.generation_config.eos_token_id = None
    prompt = [5, 9, 7]
    requests = [GenerationRequest(prompt, 1, (), sampling=Sampling(temperature, seed)) for seed in range(4000)]
    counts = Counter(answer.ids[0] for answer in answers(model, tokenizer, requests, tokens=4000))
    with torch.no_grad():
        shares = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).tolist()
    assert len(counts) > 3
    assert abs(chi_square([counts[token] for token in range(len(shares))], shares)) < 4


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 5},
        {"top_k": 999},
        {"top_p": 0.8},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.9},
        {"top_k": 12, "top_p": 0.95, "min_p": 0.05},
    ],
)
def test_what_may_be_drawn_is_what_transformers_would_draw(settings: dict[str, float]) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 40, dtype=torch.float64)
    logits[:10, ::3] = -math.inf
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    for name, value in settings.items():
        warpers.append(kinds[name](value))
    expected = warpers(torch.zeros(50, 1, dtype=torch.long), logits)
    filters = Filters.of(GenerationConfig(**settings))
    torch.testing.assert_close(filters.apply(logits / 0.7), expected, rtol=0, atol=0)


def test_of_tokens_that_tie_the_same_ones_stay() -> None:
    row = torch.zeros(1, 4096, dtype=torch.float64)
    alone = Filters(top_p=0.5).apply(row)
    assert torch.equal(Filters(top_p=0.5).apply(row.expand(7, -1)), alone.expand(7, -1))
    assert 2047 <= int(alone.isfinite().sum()) <= 2049
    assert int(Filters(top_k=3).apply(row).isfinite().sum()) == 4096, "as in transformers"


def test_a_models_own_settings_count_and_no_hidden_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    assert Filters.of(GenerationConfig()) == Filters()
    model = varied(architectures.build("llama"))
    request = GenerationRequest([5, 9, 7], 1, (), sampling=Sampling(4.0, 0))
    requests = [dataclasses.replace(request, sampling=Sampling(4.0, seed)) for seed in range(500)]
    model.generation_config.top_k = 2
    with torch.no_grad():
        likeliest = set(model(torch.tensor([[5, 9, 7]])).logits[0, -1].topk(2).indices.tolist())
    assert {answer.ids[0] for answer in answers(model, tokenizer, requests)} == likeliest
    model.generation_config.top_k = None
    assert len({answer.ids[0] for answer in answers(model, tokenizer, requests)}) > 8
    assert can_generate_here(model, drawn=True)
    for name, value in (("typical_p", 0.5), ("epsilon_cutoff", 0.1), ("eta_cutoff", 0.1), ("top_h", 0.4)):
        setattr(model.generation_config, name, value)
        assert can_generate_here(model)
        assert not can_generate_here(model, drawn=True)
        setattr(model.generation_config, name, None)


# Batches.


@pytest.mark.parametrize("name", BUILDERS)
def test_an_answer_is_the_same_in_any_batch(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = varied(BUILDERS[name]())
    model.generation_config.repetition_penalty = 1.1
    model.generation_config.top_p = 0.95
    requests = mixed_requests(24, seed=11)
    expected = [answers(model, tokenizer, [request])[0] for request in requests]
    assert len({tuple(answer.ids) for answer in expected}) > 12
    for tokens, max_rows in ((1, None), (60, None), (150, None), (10**6, 5), (10**6, None)):
        assert answers(model, tokenizer, requests, tokens=tokens, max_rows=max_rows) == expected
    order = random.Random(0).sample(range(24), 24)
    shuffled = answers(model, tokenizer, [requests[index] for index in order], tokens=10**6, max_rows=4)
    assert shuffled == [expected[index] for index in order]


@pytest.mark.parametrize(("name", "joins"), [("llama", True), ("gemma3, sliding", True), ("qwen3_5", False)])
def test_waiting_requests_take_the_place_of_rows_that_end(
    name: str, joins: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = varied(BUILDERS[name]())
    model.generation_config.eos_token_id = None
    requests = [GenerationRequest([3 + i % 9], 40 if i == 0 else 2, ()) for i in range(40)]
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    ends: list[int] = []
    generator = Generator(tokenizer)
    generator.run(model, requests, budget=TokenBudget(10**6), done=lambda index, _: ends.append(index), max_rows=4)
    assert max(rows) == 4
    # The long one goes on while thirteen threes of the others come and go.
    assert (ends[-1] == 0) is joins
    assert sorted(ends) == list(range(40))


def test_running_out_of_memory_changes_no_answer_and_fails_only_what_does_not_fit_alone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = varied(architectures.build("llama"))
    requests = mixed_requests(24, seed=12)
    requests[7] = GenerationRequest([5] * 44, 6, (), sampling=Sampling(1.0, 1))
    expected = answers(model, tokenizer, requests)

    def small(_: object, args: object, inputs: dict[str, torch.Tensor | None]) -> None:
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        assert ids is not None
        if (ids.numel() if mask is None else mask.numel()) > 43:
            raise torch.OutOfMemoryError

    hook = model.register_forward_pre_hook(small, with_kwargs=True)
    expected[7] = Answer([], DOES_NOT_FIT)
    assert answers(model, tokenizer, requests, tokens=1000) == expected
    with pytest.raises(torch.OutOfMemoryError):
        Generator(tokenizer).run(model, requests, budget=TokenBudget(1000), done=lambda *_: None)
    hook.remove()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_numbers_has_no_answer_and_says_why(value: float, tokenizer: PreTrainedTokenizerBase) -> None:
    model = varied(architectures.build("llama"))
    requests = [
        dataclasses.replace(request, max_new_tokens=5, sampling=sampling)
        for request, sampling in zip(random_requests(6, seed=13), [None, Sampling(1.0, 1)] * 3, strict=True)
    ]
    model.generation_config.eos_token_id = None
    expected = answers(model, tokenizer, requests)

    steps = itertools.count()

    def fail(_: object, args: object, output: Any) -> None:
        if next(steps) == 2:
            output.logits[:2, -1, 7] = value

    model.register_forward_hook(fail)
    found = answers(model, tokenizer, requests, tokens=10_000)
    assert [answer.reason for answer in found].count(NOT_FINITE) == 2
    assert all(a == b for a, b in zip(found, expected, strict=True) if a.reason is None)


def test_tokens_of_a_request_end_it(tokenizer: PreTrainedTokenizerBase) -> None:
    model = varied(architectures.build("llama"))
    model.generation_config.eos_token_id = None
    request = GenerationRequest([5, 9, 7], 12, ())
    (whole,) = answers(model, tokenizer, [request])
    (cut,) = answers(model, tokenizer, [dataclasses.replace(request, stop_ids=frozenset({whole.ids[3]}))])
    assert cut.ids == whole.ids[: whole.ids.index(whole.ids[3]) + 1]
