"""Routers: the formulas of mergekit-moe derived again, slowly, and the same numbers in every process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_moe import dense_of, experts_of, mixture, save
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import ConfigError
from tvmerge.models.transformers import load_tokenizer
from tvmerge.router import GATE_MODES, PROMPTED, ExpertPrompts, GateInputs, make_gates

PROMPTS = [
    ExpertPrompts(["東京タワー", "abc", "a"], ["j"]),
    ExpertPrompts(["fghij"]),
    ExpertPrompts(["。", "bbb。"], ["タワー", "hhhhhh"]),
]


def inputs_of(checkpoint: Checkpoint, prompts: Sequence[ExpertPrompts] = PROMPTS, **more: Any) -> GateInputs:
    return GateInputs(
        layers=checkpoint.config["num_hidden_layers"],
        hidden=checkpoint.config["hidden_size"],
        prompts=prompts,
        seed=more.pop("seed", 0),
        tokenizer=lambda: load_tokenizer(checkpoint.model.path),
        embeddings=lambda: checkpoint.array("model.embed_tokens.weight"),
        model=lambda: dense_of(checkpoint),
        **more,
    )


def padded(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[str, Tensor]:
    """As mergekit-moe tokenizes: padded on the left with the token that begins a text."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = tokenizer.bos_token_id
    texts = [f"{tokenizer.bos_token}{prompt}" for prompt in prompts]
    return dict(tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))


def unit(vector: Tensor) -> Tensor:
    scaled: Tensor = vector / vector.norm().clamp(min=1e-8)
    return scaled


def slow_cheap_embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """The sum of the embeddings of every token that is no padding, as a unit vector; one row per layer."""
    encoded = padded(tokenizer, prompts)
    table: Tensor = model.get_input_embeddings().weight.float()
    total = torch.zeros(table.shape[1])
    for row, mask in zip(encoded["input_ids"].tolist(), encoded["attention_mask"].tolist(), strict=True):
        for token, counts in zip(row, mask, strict=True):
            total = total + table[token] * counts
    return torch.stack([unit(total)] * len(model.model.layers))


def slow_hidden(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """What enters each layer at the last token, seen by hooks, all prompts in one padded batch; the mean of them."""
    entered: dict[int, Tensor] = {}
    hooks = []
    for n, layer in enumerate(model.model.layers):

        def keep(_: Any, arguments: tuple[Tensor, ...], n: int = n) -> None:
            entered[n] = arguments[0].detach()

        hooks.append(layer.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**padded(tokenizer, prompts))
    for hook in hooks:
        hook.remove()
    return torch.stack([entered[n][:, -1].mean(dim=0) for n in sorted(entered)])


def slow_router(vectors: Any, checkpoint: Checkpoint, prompts: Sequence[ExpertPrompts] = PROMPTS) -> Tensor:
    model, tokenizer = dense_of(checkpoint), load_tokenizer(checkpoint.model.path)
    experts = []
    for own in prompts:
        rows = vectors(model, tokenizer, own.positive)
        if own.negative:
            rows = rows - vectors(model, tokenizer, own.negative)
        experts.append(torch.stack([unit(row) for row in rows]))
    return torch.stack(experts, dim=1)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("mode", "slow"), [("cheap_embed", slow_cheap_embed), ("hidden", slow_hidden), ("hidden_last", slow_hidden)]
)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_routers_of_prompts_are_those_of_mergekit(
    mode: str, slow: Any, kind: str, batch_size: int, tmp_path: Path
) -> None:
    checkpoint = save(tmp_path / "m", kind, seed=0)
    gates = make_gates(mode, inputs_of(checkpoint, batch_size=batch_size))
    assert gates.shape == (3, 3, 16)
    assert gates.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(gates), slow_router(slow, checkpoint).detach(), rtol=1e-4, atol=1e-5)


def test_an_average_is_over_the_tokens_of_each_prompt(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "m", seed=0)
    gates = make_gates("hidden_avg", inputs_of(checkpoint))

    def each_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
        rows = []
        for prompt in prompts:  # alone there is no padding
            with torch.no_grad():
                states = model(**padded(tokenizer, [prompt]), output_hidden_states=True).hidden_states[:-1]
            rows.append(torch.stack([state[0].mean(dim=0) for state in states]))
        return torch.stack(rows).mean(dim=0)

    torch.testing.assert_close(torch.from_numpy(gates), slow_router(each_alone, checkpoint), rtol=1e-4, atol=1e-5)
    assert np.abs(gates - make_gates("hidden", inputs_of(checkpoint))).max() > 0.1


def test_the_token_that_begins_a_text_comes_once(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "m", seed=0)
    tokenizer = load_tokenizer(tmp_path / "m")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("a")["input_ids"] == [1, 3, 2]
    prompts = [ExpertPrompts(["a"]), ExpertPrompts(["b"])]
    for mode in ("cheap_embed", "hidden"):
        plain = inputs_of(checkpoint, prompts)
        assert np.array_equal(make_gates(mode, replace(plain, tokenizer=lambda: tokenizer)), make_gates(mode, plain))


def test_a_bfloat16_model_gives_nearly_the_same_router(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "m", seed=0, dtype=torch.bfloat16)
    slow = torch.nn.functional.normalize(slow_router(slow_hidden, checkpoint).float(), dim=-1)
    cosine = (torch.from_numpy(make_gates("hidden", inputs_of(checkpoint))) * slow).sum(dim=-1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("mode", sorted(PROMPTED))
def test_rows_have_length_one_and_the_first_layer_sees_embeddings(mode: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "m", seed=0)
    gates = make_gates(mode, inputs_of(checkpoint))
    np.testing.assert_allclose(np.linalg.norm(gates, axis=-1), 1, rtol=1e-5)
    one_token = [ExpertPrompts([prompt]) for prompt in "abc"]
    gates = make_gates(mode, inputs_of(checkpoint, one_token))
    if mode == "cheap_embed":
        assert (gates == gates[:1]).all()
    elif mode != "hidden_avg":
        table = checkpoint.array("model.embed_tokens.weight")
        ids = [load_tokenizer(checkpoint.model.path).convert_tokens_to_ids(each) for each in "abc"]
        expected = table[ids] / np.linalg.norm(table[ids], axis=1, keepdims=True)
        np.testing.assert_allclose(gates[0], expected, rtol=1e-5, atol=1e-6)


def test_positive_that_is_negative_too_gives_no_direction_and_is_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "m", seed=0)
    for mode in ("cheap_embed", "hidden"):
        for prompts, what in (
            ([ExpertPrompts(["a"], ["a"]), ExpertPrompts(["b"])], "expert 1 rows of zeros"),
            ([ExpertPrompts(["c"]), ExpertPrompts(["b"], ["b"])], "expert 2 rows of zeros"),
            ([ExpertPrompts(["c"]), ExpertPrompts(["b"]), ExpertPrompts(["c"])], "experts 1 and 3 the same rows"),
        ):
            with pytest.raises(ConfigError, match=f"gate_mode {mode}: the prompts give {what} in every layer"):
                make_gates(mode, inputs_of(checkpoint, prompts))


def test_uniform_is_zeros_and_ties_go_to_the_same_experts(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "m", seed=0)
    gates = make_gates("uniform", inputs_of(checkpoint))
    assert gates.shape == (3, 3, 16)
    assert not gates.any()
    for n in range(2, 9):
        for k in range(1, n):
            chosen = torch.topk(torch.full((300, n), 1 / n), k, dim=-1).indices
            assert (chosen == chosen[0]).all()
            assert len(set(chosen[0].tolist())) == k
    assert sorted(torch.topk(torch.full((4,), 0.25), 2).indices.tolist()) == [2, 3]  # as the docstring says


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_routers_are_the_same_in_every_process(mode: str, tmp_path: Path) -> None:
    def nothing() -> Any:
        raise AssertionError("opened for nothing")

    inputs = GateInputs(4, 256, [ExpertPrompts()] * 3, 7, nothing, nothing, nothing)
    state = torch.get_rng_state()
    gates = make_gates(mode, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    code = (
        "import sys\nfrom tvmerge.router import *\n"
        f"inputs = GateInputs(4, 256, [ExpertPrompts()] * 3, 7, None, None, None)\n"
        f"print(make_gates({mode!r}, inputs).tobytes().hex(), 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.split() == [gates.tobytes().hex(), "False"]
    other = make_gates(mode, replace(inputs, seed=8))
    assert not np.array_equal(other, gates)
    deviation = 1 if mode == "random" else (1 / 256**0.5) / 3**0.5
    assert gates.std() == pytest.approx(deviation, rel=0.05)
    assert abs(gates.mean()) < 0.1 * deviation
    if mode == "uniform_random":
        assert 0.99 / 16 < np.abs(gates).max() <= 1 / 16


def test_a_router_sends_the_prompts_of_an_expert_to_it(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "m", seed=0)
    prompts = [ExpertPrompts([each]) for each in "acej"]
    gates = torch.from_numpy(make_gates("hidden", inputs_of(checkpoint, prompts)))
    model, tokenizer = dense_of(checkpoint), load_tokenizer(checkpoint.model.path)
    for n, own in enumerate(prompts):
        entered = slow_hidden(model, tokenizer, own.positive)
        assert [(gates[layer] @ entered[layer]).argmax() for layer in range(3)] == [n] * 3


def test_a_router_is_rounded_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    experts = experts_of("llama", tmp_path, 3, dtype=torch.bfloat16)
    gates = make_gates("hidden", inputs_of(experts[0]))
    made = mixture(experts, gates).read("model.layers.2.block_sparse_moe.gate.weight")
    assert torch.equal(made, torch.from_numpy(gates[2]).bfloat16())


@pytest.mark.parametrize(
    ("mode", "prompts", "message"),
    [
        ("hiden", PROMPTS, f"unknown gate_mode 'hiden', known are {', '.join(GATE_MODES)}"),
        ("hidden", [*PROMPTS, ExpertPrompts()], "gate_mode hidden: expert 4 has no positive_prompts"),
        ("cheap_embed", [*PROMPTS, ExpertPrompts([" "])], "gate_mode cheap_embed: expert 4 has an empty prompt"),
        ("hidden_avg", [PROMPTS[0], PROMPTS[0]], "gate_mode hidden_avg: all experts have the same prompts"),
    ],
)
def test_prompts_that_cannot_work_are_refused(
    mode: str, prompts: Sequence[ExpertPrompts], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_gates(mode, inputs_of(save(tmp_path / "m", seed=0), prompts))


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    small = inputs_of(save(tmp_path / "m", seed=0, vocab_size=5))
    for mode in ("cheap_embed", "hidden"):
        with pytest.raises(
            ConfigError, match="the prompt '東京タワー' has the token 18, where the model has 5 embeddings"
        ):
            make_gates(mode, small)


def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    inputs = inputs_of(save(tmp_path / "m", seed=0))

    class Deaf:
        bos_token = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": []}

    for mode in ("cheap_embed", "hidden"):
        with pytest.raises(ConfigError, match="has no token in the tokenizer"):
            make_gates(mode, replace(inputs, tokenizer=lambda: Deaf()))
