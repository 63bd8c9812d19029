"""Packed log-likelihoods: those of one request at a time, for models of every kind."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import architectures
import pytest
import torch
from conftest import CHARACTERS, save_tokenizer
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    MptConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RwkvConfig,
)

from tvmerge.models.batching import TokenBudget
from tvmerge.models.likelihood import PackedLikelihoods, longest_row, shares_prefixes

Request = tuple[list[int], list[int]]

VOCABULARY = 40
DTYPES = (torch.bfloat16, torch.float32)
_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}
#: Causal models that look at a row as one sequence: ALiBi, recurrent states, convolutions.
NOT_SHARING: dict[str, Callable[[], Any]] = {
    "bloom": lambda: BloomConfig(**_SMALL, n_layer=2, n_head=2),
    "falcon": lambda: FalconConfig(**_SMALL, **_HEADS, alibi=True),
    "mpt": lambda: MptConfig(vocab_size=VOCABULARY, d_model=16, n_heads=2, n_layers=2, max_seq_len=64),
    "mamba": lambda: MambaConfig(**_SMALL, num_hidden_layers=2, state_size=4),
    "rwkv": lambda: RwkvConfig(**_SMALL, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=32),
    "lfm2": lambda: Lfm2Config(
        **_SMALL, **_HEADS, num_key_value_heads=1, intermediate_size=32, layer_types=["conv", "full_attention"]
    ),
}
SHARING = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "gpt2", "qwen3_moe", "gemma3_vision"]


def build(config: Any, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def windowed(window: int) -> PreTrainedModel:
    sizes = {**_SMALL, **_HEADS, "num_key_value_heads": 1, "intermediate_size": 24}
    return build(MistralConfig(**sizes, max_position_embeddings=128, sliding_window=window))


def make_requests(n_questions: int = 6, *, seed: int = 0, longest: int = 30) -> list[Request]:
    """Questions with five choices each, some of one token, some that begin alike; a block that all share."""
    draw = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(n)]

    block = tokens(8)
    requests = []
    for _ in range(n_questions):
        context = block[: draw.choice([0, 8])] + tokens(draw.randint(1, longest - 12))
        stem = tokens(2)
        requests += [(context, tokens(1)), (context, tokens(1)), (context, tokens(3)), (context, stem + tokens(1))]
        requests.append((context, stem + tokens(2)))
    requests += [requests[0], ([5], [6]), ([5], [6, 7, 8]), ([5], [6, 9])]
    draw.shuffle(requests)
    return requests


def choices(n_questions: int, *, seed: int) -> list[Request]:
    """Questions with five choices each, in the order of the questions."""
    draw = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(n)]

    contexts = [tokens(draw.randint(10, 30)) for _ in range(n_questions)]
    return [(context, tokens(draw.randint(1, 4))) for context in contexts for _ in range(5)]


def one_by_one(model: PreTrainedModel, requests: Sequence[Request], *, max_length: int) -> list[tuple[float, bool]]:
    """Each request in a forward pass of its own, of nothing else."""
    answers = []
    for context, continuation in requests:
        whole = (context + continuation)[-(max_length + 1) :]
        with torch.no_grad():
            logits = model(torch.tensor([whole[:-1]])).logits[0, -len(continuation) :].double()
        log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
        chosen = [float(log_probs[place, token]) for place, token in enumerate(continuation)]
        greedy = all(int(logits[place].argmax()) == token for place, token in enumerate(continuation))
        answers.append((math.fsum(chosen), greedy))
    return answers


def assert_same(scores: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]


def with_greedy(model: PreTrainedModel, requests: Sequence[Request]) -> list[Request]:
    """The requests, and for each context one whose continuation is the most likely one."""
    added = []
    for context, _ in requests[::3]:
        whole = list(context)
        for _ in range(2):
            with torch.no_grad():
                whole.append(int(model(torch.tensor([whole])).logits[0, -1].argmax()))
        added.append((context, whole[len(context) :]))
    return [*requests, *added]


@pytest.mark.parametrize("attention", ["default", "eager"])
@pytest.mark.parametrize("name", SHARING)
def test_shared_contexts_change_no_score(name: str, attention: str) -> None:
    model = architectures.build(name)
    if attention != "default":
        model.set_attn_implementation(attention)
    assert shares_prefixes(model)
    requests = with_greedy(model, make_requests())
    packed = PackedLikelihoods(requests, max_length=40, max_row=longest_row(model))
    assert packed.n_tokens < PackedLikelihoods(requests, max_length=40, max_row=1, share=False).n_tokens / 2
    scores = packed.score(model, budget=TokenBudget(200))
    assert_same(scores, one_by_one(model, requests, max_length=40))
    assert {greedy for _, greedy in scores} == {True, False}


@pytest.mark.parametrize("name", NOT_SHARING)
def test_models_that_cannot_share_are_found_and_scored_without(name: str) -> None:
    model = build(NOT_SHARING[name]())
    assert not shares_prefixes(model)
    requests = with_greedy(model, make_requests())
    packed = PackedLikelihoods(requests, max_length=40, max_row=512, share=False)
    assert_same(packed.score(model, budget=TokenBudget(200)), one_by_one(model, requests, max_length=40))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, CHARACTERS)
    return AutoTokenizer.from_pretrained(folder)


def harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], *, batch_size: int = 16
) -> list[tuple[float, bool]]:
    wrapper = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=40)
    asked = [(("", ""), context, continuation) for context, continuation in requests]
    return list(wrapper._loglikelihood_tokens(asked, disable_tqdm=True))


@pytest.mark.parametrize("share", [True, False])
def test_the_answers_are_those_of_lm_eval(tokenizer: PreTrainedTokenizerBase, share: bool) -> None:
    model = architectures.build("qwen2")
    requests = with_greedy(model, make_requests(20, longest=60))  # some are cut from the left
    packed = PackedLikelihoods(requests, max_length=40, max_row=100, share=share)
    assert_same(packed.score(model, budget=TokenBudget(640)), harness(model, tokenizer, requests))


def n_differing(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]], n_choices: int) -> int:
    """How many questions have another best choice, or a choice with another flag."""
    differing = 0
    for start in range(0, len(ours), n_choices):
        a, b = ours[start : start + n_choices], theirs[start : start + n_choices]
        best = [[score for score, _ in each].index(max(score for score, _ in each)) for each in (a, b)]
        differing += best[0] != best[1] or [flag for _, flag in a] != [flag for _, flag in b]
    return differing


@pytest.mark.full
def test_bfloat16_is_as_far_from_float32_as_that_of_lm_eval(tokenizer: PreTrainedTokenizerBase) -> None:
    differing, squares = {"ours": 0, "theirs": 0}, {"ours": 0.0, "theirs": 0.0}
    for seed in range(10):
        model = architectures.build("llama", seed=seed).to(torch.bfloat16)
        requests = choices(100, seed=seed)
        packed = PackedLikelihoods(requests, max_length=40, max_row=512)
        answers = {"ours": packed.score(model, budget=TokenBudget(640)), "theirs": harness(model, tokenizer, requests)}
        exact = harness(model.float(), tokenizer, requests)
        for name, scores in answers.items():
            differing[name] += n_differing(scores, exact, 5)
            squares[name] += sum((a - b) ** 2 for (a, _), (b, _) in zip(scores, exact, strict=True))
    assert squares["ours"] <= 1.2 * squares["theirs"], squares
    # Of 1000 questions, of which each lies near a tie by chance.
    assert differing["ours"] <= differing["theirs"] + 5, differing


def test_one_token_continuations_of_a_context_cost_nothing_more() -> None:
    model = architectures.build("llama")
    requests = [([4, 5, 6, 7], [token]) for token in range(VOCABULARY)]
    packed = PackedLikelihoods(requests, max_length=40, max_row=512)
    assert packed.n_tokens == 4
    scores = packed.score(model, budget=TokenBudget(40))
    assert sum(math.exp(score) for score, _ in scores) == pytest.approx(1, rel=1e-5)
    assert [greedy for _, greedy in scores].index(True) == max(range(VOCABULARY), key=lambda token: scores[token][0])
    assert sum(greedy for _, greedy in scores) == 1


def test_long_inputs_are_cut_from_the_left() -> None:
    model = architectures.build("gpt2")
    cut, whole = ([9] * 50 + [4, 5, 6], [7, 8]), ([4, 5, 6], [7, 8])
    scores = PackedLikelihoods([cut, whole], max_length=4, max_row=512).score(model, budget=TokenBudget(40))
    assert scores[0] == scores[1]
    continuation = PackedLikelihoods([([9, 4], [5, 6, 7, 8])], max_length=4, max_row=512)
    assert continuation.n_tokens == 4  # the least context that can be is one token


def test_the_size_of_batches_and_rows_changes_no_score() -> None:
    model = architectures.build("llama")
    requests = make_requests(12)
    expected = one_by_one(model, requests, max_length=40)
    for max_row in (1, 20, 60, 512):
        packed = PackedLikelihoods(requests, max_length=40, max_row=max_row)
        for tokens in (1, 100, 10_000):
            assert_same(packed.score(model, budget=TokenBudget(tokens)), expected)


def test_every_request_is_reported_done_once() -> None:
    model = architectures.build("llama")
    requests = make_requests()
    done: list[list[int]] = []
    packed = PackedLikelihoods(requests, max_length=40, max_row=512)
    packed.score(model, budget=TokenBudget(60), done=lambda indices: done.append(list(indices)))
    assert len(done) > 2
    assert sorted(index for indices in done for index in indices) == list(range(len(requests)))


def test_running_out_of_memory_changes_no_score() -> None:
    model = architectures.build("llama")
    requests = make_requests(12)
    packed = PackedLikelihoods(requests, max_length=40, max_row=512)
    expected = packed.score(model, budget=TokenBudget(10_000))
    sizes: list[int] = []

    def refuse(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sizes.append(inputs[0].numel())
        if sizes[-1] > 120:
            raise torch.OutOfMemoryError

    handle = model.register_forward_pre_hook(refuse)
    budget = TokenBudget(10_000)
    done: list[int] = []
    assert_same(packed.score(model, budget=budget, done=done.extend), expected)
    handle.remove()
    assert max(sizes) > 120
    assert budget.tokens <= 120
    assert sorted(done) == list(range(len(requests)))


def test_other_weights_give_other_scores() -> None:
    requests = make_requests()
    packed = PackedLikelihoods(requests, max_length=40, max_row=512)
    for seed in range(2):
        model = architectures.build("llama", seed=seed)
        assert_same(packed.score(model, budget=TokenBudget(200)), one_by_one(model, requests, max_length=40))


@pytest.mark.parametrize("window", [8, 64])
def test_layers_that_see_a_window_are_right(window: int) -> None:
    model = windowed(window)
    assert longest_row(model) == window
    assert shares_prefixes(model) == (window == 64)
    requests = make_requests(longest=100)
    expected = one_by_one(model, requests, max_length=100)
    packed = PackedLikelihoods(requests, max_length=100, max_row=longest_row(model))
    assert_same(packed.score(model, budget=TokenBudget(300)), expected)
    with pytest.raises(ValueError, match=f"layers of the model see {window} tokens back only"):
        PackedLikelihoods(requests, max_length=100, max_row=512).score(model, budget=TokenBudget(300))


def test_trying_leaves_the_model_and_the_generator_alone() -> None:
    model = architectures.build("gpt2").train()  # with dropout
    modules = dict(model.named_modules())
    modules["transformer.h.0"].eval()
    modes = {name: module.training for name, module in modules.items()}
    state = torch.get_rng_state()
    assert shares_prefixes(model)
    assert {name: module.training for name, module in modules.items()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_show_nothing_share_nothing() -> None:
    model = architectures.build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not shares_prefixes(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert not shares_prefixes(model)


def test_an_error_that_hides_in_small_weights_is_found() -> None:
    model = build(NOT_SHARING["mpt"]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    # Less than any tolerance for rounding, and as large as if positions were wrong: they are not looked at.
    assert not shares_prefixes(model)


def test_a_mask_that_hides_too_little_is_found() -> None:
    model = architectures.build("gemma2")

    def leak(_: torch.nn.Module, inputs: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "attention_mask" in arguments:
            arguments["attention_mask"] = arguments["attention_mask"].clamp(min=-5)
        return inputs, arguments

    assert shares_prefixes(model)
    model.register_forward_pre_hook(leak, with_kwargs=True)
    assert not shares_prefixes(model)


def test_no_number_wins_nothing() -> None:
    model = architectures.build("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    packed = PackedLikelihoods([([4], [0]), ([4], [1, 2])], max_length=40, max_row=512)
    scores = packed.score(model, budget=TokenBudget(40))
    assert all(math.isnan(score) and not greedy for score, greedy in scores)


def test_a_head_that_cannot_be_narrowed_gives_the_same() -> None:
    model = architectures.build("llama")
    requests = make_requests()
    expected = PackedLikelihoods(requests, max_length=40, max_row=512).score(model, budget=TokenBudget(200))
    head = model.get_output_embeddings()
    model.get_output_embeddings = lambda: None
    packed = PackedLikelihoods(requests, max_length=40, max_row=512)
    assert_same(packed.score(model, budget=TokenBudget(200)), expected)
    model.get_output_embeddings = lambda: head
    shapes: list[tuple[int, ...]] = []
    handle = head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    narrow = PackedLikelihoods(requests[:3], max_length=40, max_row=512)
    narrow.score(model, budget=TokenBudget(200))
    handle.remove()
    assert max(shape[1] for shape in shapes[2:]) <= sum(len(continuation) for _, continuation in requests[:3])


def test_the_dtype_of_the_softmax_can_be_chosen() -> None:
    model = architectures.build("llama").to(torch.bfloat16)
    packed = PackedLikelihoods([([4, 5], [6, 7])], max_length=40, max_row=512)
    with torch.no_grad():
        logits = model(torch.tensor([[4, 5, 6]])).logits[0, 1:]
    coarse, fine = (torch.log_softmax(logits.to(dtype), dim=-1)[[0, 1], [6, 7]].sum() for dtype in DTYPES)
    assert float(coarse) != float(fine)
    assert packed.score(model, budget=TokenBudget(40))[0][0] == float(coarse)
    scores = packed.score(model, budget=TokenBudget(40), softmax_dtype=torch.float32)
    assert scores[0][0] == pytest.approx(float(fine))


@pytest.mark.parametrize("request_", [([], [1]), ([1], []), ([1], [2, 3, 4])])
def test_requests_that_cannot_be_scored_are_refused(request_: Request) -> None:
    with pytest.raises(ValueError, match="request 1 has"):
        PackedLikelihoods([([1], [2]), request_], max_length=2, max_row=512)


def test_no_requests_have_no_scores() -> None:
    packed = PackedLikelihoods([], max_length=40, max_row=512)
    assert packed.score(architectures.build("llama"), budget=TokenBudget(40)) == []
