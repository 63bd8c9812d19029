"""Routers: the rows by which a mixture of experts sends a token to its experts, made without training.

A router is an array `(layers, experts, hidden)`, float32. At a layer a token of hidden state h, normalised, gives
expert e the score h · row e; the best `experts_per_token` are used, weighted by the softmax of their scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tvmerge.errors import ConfigError
from tvmerge.state_dict import Array

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["GATE_MODES", "PROMPTED", "ExpertPrompts", "GateInputs", "drawn_gates", "make_gates", "router_digest"]

#: Lengths below this count as this in a division, as in mergekit.
TINY = 1e-8


@dataclass(frozen=True)
class ExpertPrompts:
    """What an expert is to be used for, and what not."""

    positive: Sequence[str] = ()
    negative: Sequence[str] = ()


@dataclass(frozen=True)
class GateInputs:
    """What routers are made from; what takes a while is opened by the modes that need it."""

    layers: int
    hidden: int
    prompts: Sequence[ExpertPrompts]  # one for each expert, empty ones where the mode needs none
    seed: int  # of the random modes
    tokenizer: Callable[[], PreTrainedTokenizerBase]  # of the model that gives the embeddings
    embeddings: Callable[[], Array]  # (vocabulary, hidden), any floating dtype
    model: Callable[[], PreTrainedModel]  # with its weights, in evaluation mode
    batch_size: int = 8  # prompts that go through the model at a time

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the router."""
        return self.layers, len(self.prompts), self.hidden


def make_gates(mode: str, inputs: GateInputs) -> Array:
    """A router.

    Args:
        mode: a key of GATE_MODES.
        inputs: what it is made from.

    Returns:
        `(layers, experts, hidden)`, float32.

    Raises:
        ConfigError: an unknown mode, or prompts that are missing, empty, or the same for experts as far as the router
            can tell.
    """
    if mode not in GATE_MODES:
        raise ConfigError(f"unknown gate_mode {mode!r}, known are {', '.join(GATE_MODES)}")
    if mode in PROMPTED:
        _check_prompts(mode, inputs.prompts)
    gates = GATE_MODES[mode](inputs)
    assert gates.shape == inputs.shape, "each mode gives each expert of each layer a row"
    if mode in PROMPTED:
        _check_rows(mode, gates)
    return gates.astype(np.float32)


def _check_rows(mode: str, gates: Array) -> None:
    """Refuse a router that cannot tell experts apart. In a single layer two rows may well be the same."""
    for n in range(gates.shape[1]):
        twins = [m + 1 for m in range(n) if np.array_equal(gates[:, m], gates[:, n])]
        if twins or not gates[:, n].any():
            what = f"experts {twins[0]} and {n + 1} the same rows" if twins else f"expert {n + 1} rows of zeros"
            raise ConfigError(
                f"gate_mode {mode}: the prompts give {what} in every layer, so that the router cannot tell them apart: "
                "write prompts of other words, which the tokenizer knows"
            )


def drawn_gates(mode: str, shape: tuple[int, int, int], *, seed: int) -> Array:
    """A router that needs no model: of a mode that is not PROMPTED.

    Args:
        mode: its name.
        shape: `(layers, experts, hidden)`.
        seed: of the random modes.
    """

    def none() -> Any:
        raise AssertionError(f"gate_mode {mode} needs no model")

    layers, experts, hidden = shape
    prompts = [ExpertPrompts()] * experts
    inputs = GateInputs(layers, hidden, prompts, seed, tokenizer=none, embeddings=none, model=none)
    return make_gates(mode, inputs)


def router_digest(router: Array) -> str:
    """Which router it is: a digest of shape and values."""
    content = f"{router.shape}".encode() + router.astype("<f4").tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _check_prompts(mode: str, prompts: Sequence[ExpertPrompts]) -> None:
    for n, own in enumerate(prompts, start=1):
        if not own.positive:
            raise ConfigError(f"gate_mode {mode}: expert {n} has no positive_prompts, name what it is to be used for")
        if not all(text.strip() for text in (*own.positive, *own.negative)):
            raise ConfigError(f"gate_mode {mode}: expert {n} has an empty prompt, write one or leave it out")
    if len({(tuple(own.positive), tuple(own.negative)) for own in prompts}) == 1:
        raise ConfigError(f"gate_mode {mode}: all experts have the same prompts, name what each is to be used for")


def uniform(inputs: GateInputs) -> Array:
    """Zeros: every expert gets the same score, and the ones that are picked the same weight.

    With as many experts per token as there are experts, the mixture gives the mean of their outputs. With fewer the
    scores tie, and which experts are picked is up to torch.topk: the same ones for every token, on a CPU for instance
    numbers 2 and 3 of four. The others are then never used.
    """
    return np.zeros(inputs.shape, np.float32)


def random(inputs: GateInputs) -> Array:
    """Independent standard normal values, a function of the seed and the shape alone.

    Source:
        mergekit-moe's `gate_mode: random`, which draws them from an unseeded generator.
    """
    values: Array = np.random.Generator(np.random.PCG64(inputs.seed)).standard_normal(inputs.shape, np.float32)
    return values


def uniform_random(inputs: GateInputs) -> Array:
    """Independent values, uniform between ±1/√hidden, as torch.nn.Linear begins; a function of seed and shape alone.

    Source:
        mergekit-moe's `gate_mode: uniform_random`, which draws them from an unseeded generator.
    """
    values: Array = np.random.Generator(np.random.PCG64(inputs.seed)).random(inputs.shape, np.float32)
    return np.float32(inputs.hidden**-0.5) * (2 * values - 1)


def cheap_embed(inputs: GateInputs) -> Array:
    """From the prompts' token embeddings alone, the same row in every layer.

    With s(P) the sum of the embeddings of all tokens of all prompts P, and n(x) = x / max(|x|, 1e-8), an expert's row
    is n(s(positive)), or n(n(s(positive)) − n(s(negative))) if it has negative prompts.

    Source:
        mergekit-moe's `gate_mode: cheap_embed`.
    """
    tokenizer, embeddings = inputs.tokenizer(), inputs.embeddings()

    def direction(prompts: Sequence[str]) -> Array:
        ids = [token for tokens in _tokenize(tokenizer, prompts, len(embeddings)) for token in tokens]
        return _normalised(embeddings[ids].astype(np.float64).sum(axis=0))

    rows = [direction(own.positive) - (direction(own.negative) if own.negative else 0) for own in inputs.prompts]
    return np.broadcast_to(_normalised(np.stack(rows)), inputs.shape).astype(np.float32)


def hidden(inputs: GateInputs) -> Array:
    """From what enters each layer of the dense model at the last token of each prompt.

    With m(P) the mean over prompts P of the hidden state that enters a layer at the prompt's last token, and n(x) =
    x / max(|x|, 1e-8), an expert's row is n(m(positive) − m(negative)), the latter being 0 without negative prompts.

    Source:
        mergekit-moe's `gate_mode: hidden`, there also called `hidden_last`, and computed in bfloat16 whatever the
        weights are in. Here the model computes in the dtype of its weights.
    """
    return _from_hidden(inputs, lambda states, mask: states[:, :, -1])


def hidden_avg(inputs: GateInputs) -> Array:
    """As `hidden`, of the mean over all tokens of each prompt.

    Source:
        mergekit-moe's `gate_mode: hidden_avg`, which averages the padding of shorter prompts in. Here it is left out;
        where all positive, and all negative, prompts of an expert have one length, both give the same.
    """

    def average(states: Tensor, mask: Tensor) -> Tensor:
        return (states * mask[None, :, :, None]).sum(dim=2) / mask.sum(dim=1)[None, :, None]

    return _from_hidden(inputs, average)


def _from_hidden(inputs: GateInputs, pool: Callable[[Tensor, Tensor], Tensor]) -> Array:
    """A router from hidden states.

    Args:
        inputs: what it is made from.
        pool: (layers, prompts, tokens, hidden) in float64 and their mask (prompts, tokens), padded on the left →
            (layers, prompts, hidden).
    """
    import torch

    tokenizer, model = inputs.tokenizer(), inputs.model()

    def mean(prompts: Sequence[str]) -> Array:
        tokens = _tokenize(tokenizer, prompts, model.get_input_embeddings().num_embeddings)
        batches = [tokens[i : i + inputs.batch_size] for i in range(0, len(tokens), inputs.batch_size)]
        pooled = torch.cat([pool(*_hidden_states(model, batch)) for batch in batches], dim=1)
        means: Array = pooled.mean(dim=1).numpy()
        return means

    rows = [mean(own.positive) - (mean(own.negative) if own.negative else 0) for own in inputs.prompts]
    return _normalised(np.stack(rows, axis=1))


def _hidden_states(model: PreTrainedModel, batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """What enters each layer, (layers, prompts, tokens, hidden) in float64, and the mask of what is no padding."""
    import torch

    longest = max(map(len, batch))
    ids = torch.tensor([[0] * (longest - len(tokens)) + list(tokens) for tokens in batch])
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in batch])
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # as if each prompt were alone
    with torch.no_grad():
        # Without the head, whose logits are not needed. The last state is what leaves the last layer.
        made = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False
        )
    # On the CPU, as not every device knows float64.
    return torch.stack([state.cpu().double() for state in made.hidden_states[:-1]]), mask.cpu()


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], n_embeddings: int) -> list[list[int]]:
    """The tokens of each prompt, with the token that begins a text in front and no others added, as mergekit does.

    Raises:
        ConfigError: a prompt has no token, or one that the model does not know.
    """
    texts = [(tokenizer.bos_token or "") + prompt for prompt in prompts]
    tokens: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for prompt, own in zip(prompts, tokens, strict=True):
        if not own:
            raise ConfigError(f"the prompt {prompt[:40]!r} has no token in the tokenizer of the model: write another")
        if max(own) >= n_embeddings:
            raise ConfigError(
                f"the prompt {prompt[:40]!r} has the token {max(own)}, where the model has {n_embeddings} embeddings: "
                "use a model with a tokenizer of its own"
            )
    return tokens


def _normalised(rows: Array) -> Array:
    """Each row divided by its length, in float64."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    normalised: Array = rows / np.maximum(lengths, TINY)
    return normalised


#: Name in mergekit-moe's YAML → how a router is made. `uniform` is ours.
GATE_MODES: Mapping[str, Callable[[GateInputs], Array]] = {
    "hidden": hidden,
    "hidden_last": hidden,
    "hidden_avg": hidden_avg,
    "cheap_embed": cheap_embed,
    "random": random,
    "uniform_random": uniform_random,
    "uniform": uniform,
}
#: The modes that need prompts.
PROMPTED = frozenset({"hidden", "hidden_last", "hidden_avg", "cheap_embed"})
