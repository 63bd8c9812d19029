"""Rows of a batch that is being generated: their cache, their padding, and how they leave and join."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tvmerge.models.sampling import Draw, Filters, draw_tokens

__all__ = ["NO_TOKEN", "Rows"]

#: Stands for a token where the greatest logit is no finite number.
NO_TOKEN = -1
#: Columns that masks and caches are made wider than they must be, so that most steps take a slice of them.
_SPARE_COLUMNS = 64


class Rows:
    """A batch that is being generated, on the model's device. Padding is on the left, so that all rows end together.

    Args:
        model: in evaluation mode; `can_generate_here` has said yes to it, or is about to.
        prompts: token ids of each row.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        #: Of the next token, (rows, vocabulary).
        self.logits: torch.Tensor
        config = model.config.get_text_config(decoder=True)
        self._cache = DynamicCache(config=config)
        self._cache.layers = [_RoomyLayer() if type(each) is DynamicLayer else each for each in self._cache.layers]
        # Of a cache of another kind it is not known here how it is padded; chunks are counted from a text's beginning.
        self.joins = getattr(config, "attention_chunk_size", None) is None and all(
            type(layer) in (_RoomyLayer, DynamicSlidingWindowLayer) for layer in self._cache.layers
        )
        # Of the class: what wraps a model's forward need not keep its signature.
        accepted = _parameters(type(model).forward)
        self._takes_positions = "position_ids" in accepted
        # The head is wide: without this, the logits of a whole prompt would be most of the memory.
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._lengths = [len(prompt) for prompt in prompts]
        self._width = max(self._lengths)
        # Any token will do for padding: nothing looks at it.
        ids = torch.tensor([[0] * (self._width - len(prompt)) + list(prompt) for prompt in prompts])
        ids = ids.to(model.device)
        self._pad()
        starts = self._starts()
        self._positions = (torch.arange(self._width, device=model.device) - starts).clamp(min=0)
        self._filters = Filters.of(model.generation_config)
        self._penalty = float(model.generation_config.repetition_penalty or 1.0)
        self._seen = self._mark_seen(ids, starts) if self._penalty != 1.0 else None
        self._forward(ids)

    def next_tokens(self, draws: Sequence[Draw | None] = ()) -> list[int]:
        """The next token of each row, `NO_TOKEN` where there is none.

        Args:
            draws: one for each row, None for its greedy token; none at all: all are greedy.
        """
        scores = self.logits
        if self._seen is not None:
            scores = _penalise(scores.float(), self._seen, self._penalty)
        tokens = scores.argmax(dim=-1, keepdim=True)
        # A NaN counts as the greatest. A token that is ruled out may well be at minus infinity.
        finite = scores.gather(-1, tokens).isfinite()
        if any(draw is not None for draw in draws):
            asked = [(row, draw) for row, draw in enumerate(draws) if draw is not None]
            index = torch.tensor([row for row, _ in asked], device=scores.device)
            # Zeros: what is drawn of no numbers is not looked at.
            some = torch.where(finite[index], scores[index], 0.0)
            tokens[index] = draw_tokens(some, [draw for _, draw in asked], self._filters)
        self._tokens = tokens.to(self._model.device)
        if self._seen is not None:
            self._seen.scatter_(1, tokens, True)
        found: list[int] = torch.where(finite, tokens, NO_TOKEN).squeeze(1).tolist()
        return found

    def step(self) -> None:
        """Take up the tokens that `next_tokens` found."""
        self._width += 1
        self._lengths = [length + 1 for length in self._lengths]
        self._positions = self._positions[:, -1:] + 1
        if self._mask is not None and self._mask.shape[1] < self._width:
            self._pad()
        self._forward(self._tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows go; before a `step`."""
        index = torch.tensor(rows, device=self._model.device)
        self._lengths = [self._lengths[row] for row in rows]
        if self.joins:
            self._crop(max(self._lengths))
        self._cache.reorder_cache(index)
        self._tokens, self._positions = self._tokens[index], self._positions[index]
        if self._seen is not None:
            self._seen = self._seen[index.to(self._seen.device)]
        self._pad()

    def join(self, other: Rows) -> None:
        """Put other rows behind these, both after a `step` or with prompts only; the others are used up."""
        width = max(self._width, other._width)
        for ours, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            if theirs.is_initialized:
                _join_layers(ours, theirs, width)
        self._width = width
        self._lengths += other._lengths
        self._positions = torch.cat([self._positions[:, -1:], other._positions[:, -1:]])
        self.logits = torch.cat([self.logits, other.logits])
        if self._seen is not None and other._seen is not None:
            self._seen = torch.cat([self._seen, other._seen])
        self._pad()

    def _crop(self, width: int) -> None:
        """Drop columns on the left that are padding in all rows."""
        spare, self._width = self._width - width, width
        for layer in self._cache.layers if spare else ():
            if layer.is_initialized:
                n_held = min(width, layer.keys.shape[-2])  # a sliding window holds fewer
                layer.keys, layer.values = layer.keys[:, :, -n_held:], layer.values[:, :, -n_held:]
                if layer.is_sliding:
                    layer.cumulative_length -= spare

    def _starts(self) -> torch.Tensor:
        """Columns of padding of each row: (rows, 1), int64."""
        return torch.tensor([[self._width - length] for length in self._lengths], device=self._model.device)

    def _pad(self) -> None:
        """Make the mask."""
        self._mask: torch.Tensor | None = None
        if min(self._lengths) < self._width:
            places = torch.arange(self._width + _SPARE_COLUMNS, device=self._model.device)
            self._mask = (places >= self._starts()).long()

    def _forward(self, ids: torch.Tensor) -> None:
        positions = {"position_ids": self._positions} if self._takes_positions else {}
        output = self._model(
            input_ids=ids,
            # Without padding, attention has faster ways that take no mask.
            attention_mask=None if self._mask is None else self._mask[:, : self._width],
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
            **positions,
            **self._extra,
        )
        self.logits = output.logits[:, -1]

    def _mark_seen(self, ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Which tokens each row holds, its padding left out: (rows, vocabulary), boolean."""
        n_tokens = int(self._model.get_output_embeddings().weight.shape[0])
        # Padding is put where no token is.
        places = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(places >= starts, ids, n_tokens)
        seen = torch.zeros(len(ids), n_tokens + 1, dtype=torch.bool, device=ids.device)
        return seen.scatter_(1, ids, True)[:, :-1]


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed for us
    """A cache of keys and values that is not copied at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._given: torch.Tensor | None = None  # the keys as the last update left them

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put states behind those that are held: (rows, heads, tokens, size) each, in the model's dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        # Rows that left, joined or were cropped have made other tensors of what was held.
        if self._buffers is None or self._given is not self.keys or self._buffers[0].shape[-2] < end:
            self._buffers = _roomy(self.keys, end), _roomy(self.values, end)
        keys, values = self._buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        self._given = self.keys
        return self.keys, self.values


def _roomy(states: torch.Tensor, width: int) -> torch.Tensor:
    """States at the beginning of a tensor that has room for more columns."""
    rows, heads, held, size = states.shape
    buffer = states.new_empty(rows, heads, width + _SPARE_COLUMNS, size)
    buffer[:, :, :held] = states
    return buffer


def _join_layers(ours: Any, theirs: Any, width: int) -> None:
    """Put the rows of a layer's cache behind those of another one.

    Args:
        ours: a layer of the kinds that `Rows.joins` names; is changed.
        theirs: the same layer's, of the other rows.
        width: columns that both are to stand for.
    """
    n_held = max(ours.keys.shape[-2], theirs.keys.shape[-2])  # of a sliding window, both hold no more than it

    def wide(states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(states, (0, 0, n_held - states.shape[-2], 0))

    ours.keys = torch.cat([wide(ours.keys), wide(theirs.keys)])
    ours.values = torch.cat([wide(ours.values), wide(theirs.values)])
    if ours.is_sliding:
        ours.cumulative_length = width


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _penalise(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make seen tokens less likely: Keskar et al. 2019, arXiv:1909.05858, section 4.1, as transformers does it.

    Args:
        scores: logits, (rows, vocabulary), float32.
        seen: which tokens a row holds, (rows, vocabulary), boolean.
        penalty: 1 for none.
    """
    less = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, less, scores)
