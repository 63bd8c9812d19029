"""Log-likelihoods of continuations, for requests that are laid out once and models that change.

Requests of one question share their context. Laid in one row as a trie (`packing`), the context is computed once, in
an ordinary forward pass: a mask lets each token see the tokens of its own sequence only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from tvmerge.models.batching import TokenBudget, run_in_batches
from tvmerge.models.packing import Row, pack

__all__ = ["PackedLikelihoods", "longest_row", "shares_prefixes"]

Int64s = npt.NDArray[np.int64]

#: What configurations call the number of tokens that a layer looks back.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "local_attention")


@dataclass(frozen=True)
class _AskedRow:
    """A row and the requests whose inputs lie in it."""

    row: Row
    requests: Int64s  # [R] indices of the requests
    sizes: Int64s  # [R] tokens of their continuations
    where: Int64s  # [sum of sizes] index in the row of the token before each token of the continuations
    targets: Int64s  # [sum of sizes] tokens of the continuations


@dataclass(frozen=True)
class _Batch:
    """What a forward pass over some rows needs, on the device. B rows, at most L tokens; M asked tokens, N places."""

    input_ids: Tensor  # [B, L] int64
    positions: Tensor | None  # [B, L] int64; None for rows that are plain sequences, which need no mask
    ends: Tensor | None  # [B, L] int64
    kept: Tensor  # [N] int64, indices into B x L of the places whose logits are asked for, sorted
    asked: Tensor  # [M] int64, which of the kept places predicts each token of the continuations
    targets: Tensor  # [M] int64
    requests: Int64s  # [R] on the host
    starts: Int64s  # [R] where the tokens of each request start among the M


class PackedLikelihoods:
    """Log-likelihood requests, laid out once, for any weights of one model.

    Args:
        requests: token ids of a context and of its continuation, neither empty.
        max_length: the most tokens that the model takes; what is longer is cut from the left.
        max_row: the most tokens of a row that several inputs share.
        share: False for a row for each distinct input, forwarded without a mask, which suits any causal model.

    Raises:
        ValueError: an empty context or continuation, or a continuation of more than `max_length` tokens.
    """

    def __init__(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        max_length: int,
        max_row: int,
        share: bool = True,
    ) -> None:
        for index, (context, continuation) in enumerate(requests):
            if not (context and 0 < len(continuation) <= max_length):
                raise ValueError(
                    f"request {index} has {len(context)} tokens of context and {len(continuation)} of continuation: "
                    f"it must have one of each, and at most {max_length} of continuation"
                )
        inputs = [[*context, *continuation][-(max_length + 1) : -1] for context, continuation in requests]
        packing = pack(inputs, max_row=max_row, share=share)
        members: list[list[int]] = [[] for _ in packing.rows]
        for index, row_index in enumerate(packing.row_of.tolist()):
            members[row_index].append(index)
        continuations = [continuation for _, continuation in requests]
        rows = [
            _ask(row, indices, [continuations[index] for index in indices], packing.last_of[indices])
            for row, indices in zip(packing.rows, members, strict=True)
        ]
        self.n_tokens = sum(len(row) for row in packing.rows)  # that one call of `score` forwards, without padding
        self._n_requests = len(requests)
        # A row of one sequence is what the model takes anyway, without a mask: faster, and right for any model.
        self._tries = [row for row in rows if not row.row.is_chain]
        self._chains = [row for row in rows if row.row.is_chain]
        self._batches: dict[tuple[torch.device, bool, tuple[int, ...]], _Batch] = {}
        self._narrows: bool | None = None

    def score(
        self,
        model: PreTrainedModel,
        *,
        budget: TokenBudget,
        done: Callable[[Sequence[int]], None] | None = None,
        softmax_dtype: torch.dtype | None = None,
    ) -> list[tuple[float, bool]]:
        """Score every request.

        Args:
            model: in evaluation mode; the same in every call, but for its weights.
            budget: tokens of a batch; made smaller where the device runs out of memory.
            done: called after each batch with the indices of the requests that are now complete.
            softmax_dtype: the dtype of the log-probabilities; None for that of the logits.

        Returns:
            For each request in their order the sum of the log-probabilities of its continuation, rounded to their
            dtype, and whether each of its tokens is the most likely one. NaN is never the most likely.

        Raises:
            ValueError: rows are longer than a window in which the model's layers see.
            RuntimeError, MemoryError: one row alone does not fit.
        """
        self._check_windows(model)
        if self._narrows is None:
            self._narrows = _narrows(model)
        forward = functools.partial(_forward, model, narrow=self._narrows)
        sums, greedy = np.zeros(self._n_requests), np.zeros(self._n_requests, bool)

        def run(rows: Sequence[_AskedRow], indices: list[int]) -> None:
            batch = self._batch(rows, indices, model.device)
            sums[batch.requests], greedy[batch.requests] = _sum(batch, forward(batch), softmax_dtype)
            if done is not None:
                done(batch.requests.tolist())

        with torch.no_grad():
            for rows in (self._tries, self._chains):
                run_in_batches([len(row.row) for row in rows], budget, functools.partial(run, rows))
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def _batch(self, rows: Sequence[_AskedRow], indices: list[int], device: torch.device) -> _Batch:
        key = (device, rows is self._tries, tuple(indices))
        if key not in self._batches:
            self._batches[key] = _lay_out([rows[index] for index in indices], device)
        return self._batches[key]

    def _check_windows(self, model: PreTrainedModel) -> None:
        longest = max((len(row.row) for row in self._tries), default=0)
        window = _window(model)
        if window is not None and longest > window:
            raise ValueError(
                f"a row has {longest} tokens, but layers of the model see {window} tokens back only, which the mask "
                "of a row does not know: give a max_row of at most longest_row(model)"
            )


def _ask(row: Row, requests: list[int], continuations: Sequence[Sequence[int]], lasts: Int64s) -> _AskedRow:
    """The requests of a row, whose inputs end with the tokens at the indices `lasts`."""
    where = [
        row.path(last)[-len(continuation) :] for continuation, last in zip(continuations, lasts.tolist(), strict=True)
    ]
    return _AskedRow(
        row=row,
        requests=np.array(requests, np.int64),
        sizes=np.array([len(continuation) for continuation in continuations], np.int64),
        where=np.concatenate(where),
        targets=np.array([token for continuation in continuations for token in continuation], np.int64),
    )


def _lay_out(rows: Sequence[_AskedRow], device: torch.device) -> _Batch:
    """Pad rows to one length and move them to a device."""
    length = max(len(row.row) for row in rows)
    ids, positions = np.zeros((2, len(rows), length), np.int64)
    # A padded token sees itself, as a row of the mask without any token would give no numbers.
    ends = np.tile(np.arange(1, length + 1), (len(rows), 1))
    for index, each in enumerate(rows):
        n = len(each.row)
        ids[index, :n], positions[index, :n], ends[index, :n] = each.row.tokens, each.row.positions, each.row.ends
    where = np.concatenate([index * length + row.where for index, row in enumerate(rows)])
    kept, asked = np.unique(where, return_inverse=True)
    sizes = np.concatenate([row.sizes for row in rows])
    plain = all(row.row.is_chain for row in rows)

    def move(array: Int64s) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return _Batch(
        input_ids=move(ids),
        positions=None if plain else move(positions),
        ends=None if plain else move(ends),
        kept=move(kept),
        asked=move(asked),
        targets=move(np.concatenate([row.targets for row in rows])),
        requests=np.concatenate([row.requests for row in rows]),
        starts=np.cumsum(sizes) - sizes,
    )


def _mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of a batch of rows.

    Args:
        ends: [B, L].
        dtype: that of the model, as both eager and fused attention add the mask to their scores.

    Returns:
        [B, 1, L, L]: 0 where the token of a row (third axis) sees another one (last axis), else the least number.
    """
    index = torch.arange(ends.shape[1], device=ends.device)
    seen = (index[None, :] <= index[:, None]) & (index[:, None] < ends[:, None, None, :])
    return torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=ends.device).masked_fill_(seen, 0)


def _forward(model: PreTrainedModel, batch: _Batch, *, narrow: bool) -> Tensor:
    """The logits [N, vocabulary] at the kept places of a batch."""
    arguments: dict[str, Tensor | bool] = {}
    if batch.ends is not None and batch.positions is not None:
        arguments = {"attention_mask": _mask(batch.ends, model.dtype), "position_ids": batch.positions}
    if "use_cache" in _parameters(type(model).forward):
        arguments["use_cache"] = False
    if narrow:
        with _head_at(model, batch.kept):
            logits: Tensor = model(batch.input_ids, **arguments).logits
        return logits.flatten(0, -2)
    logits = model(batch.input_ids, **arguments).logits
    # Tokens that a model puts before its input have logits too.
    return logits[:, -batch.input_ids.shape[1] :].flatten(0, -2)[batch.kept]


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


@contextmanager
def _head_at(model: PreTrainedModel, kept: Tensor) -> Iterator[None]:
    """Compute the head at some places only.

    `logits_to_keep` of transformers keeps the same columns of every row, here mostly ones that nobody asked for. The
    head is linear in each place, and all that models do after it (a cap, a scale) is so for each number.
    """

    def pick(_: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, -2)[kept][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _sum(
    batch: _Batch, logits: Tensor, dtype: torch.dtype | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Sum log-probabilities over each request's continuation.

    Args:
        batch: R requests.
        logits: [N, vocabulary].
        dtype: of the log-probabilities; None for that of the logits.

    Returns:
        [R] sums, rounded once to that dtype, and [R] whether each token is the most likely one.
    """
    log_probs = functional.log_softmax(logits, dim=-1, dtype=dtype)
    chosen = log_probs[batch.asked, batch.targets]
    # Of the rounded log-probabilities, as lm-eval has it: the first of equal ones counts. A CPU finds it in float32
    # several times as fast.
    compared = log_probs.float() if log_probs.device.type == "cpu" else log_probs
    hits = compared.argmax(dim=-1)[batch.asked] == batch.targets
    # To the host in one piece, and summed there, where the order of a sum is always the same.
    wide = torch.promote_types(chosen.dtype, torch.float32)
    both = torch.stack([chosen.to(wide), hits.to(wide)]).cpu().double().numpy()
    sums = torch.from_numpy(np.add.reduceat(both[0], batch.starts)).to(chosen.dtype).double().numpy()
    return sums, np.minimum.reduceat(both[1], batch.starts).astype(bool) & ~np.isnan(sums)


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether a model gives the same log-likelihoods for rows that share beginnings as for single inputs.

    Found by trying, on made-up tokens. Two wrong layouts are tried too: one with positions that count through the row,
    and one where a token sees all that lies before it. Only a model that tells these from the right one passes: one
    that ignores positions or masks, as with recurrent state or ALiBi, does not, nor does one whose weights (all zero,
    or near it) show nothing. That costs time only.

    Args:
        model: on its device, with the weights of any real model of its kind; its state stays as it is.
    """
    requests = _made_up(model.get_input_embeddings().weight.shape[0])
    packed = PackedLikelihoods(requests, max_length=32, max_row=64)
    single = PackedLikelihoods(requests, max_length=32, max_row=64, share=False)
    window = _window(model)
    if window is not None and window < max(len(row.row) for row in packed._tries):
        return False  # rows that fit in it would gain nothing
    try:
        with torch.no_grad(), _evaluating(model):
            narrow = _narrows(model)
            plain = _lay_out(single._chains, model.device)
            expected = _forward(model, plain, narrow=narrow)[plain.asked]
            right, *wrong = [
                _distance(_forward(model, layout, narrow=narrow)[layout.asked], expected)
                for layout in _layouts(_lay_out(packed._tries, model.device))
            ]
    except Exception:  # noqa: BLE001  # a model may raise anything at a mask that it does not know
        return False
    return right <= _tolerance(model.dtype) and 4 * right <= min(wrong)


def longest_row(model: PreTrainedModel) -> int:
    """The most tokens of a shared row with which the model is fast, and right in layers that see a window only."""
    # Of hidden size h, the linear layers of a token cost about 24 h² operations in each layer, and masked attention,
    # which computes what it then hides, 4 h for each token of the row: at 3 h tokens that is half as much. In small
    # models neither counts for much. A mask has the square of this many numbers.
    row = min(4096, max(512, 3 * int(model.config.get_text_config().hidden_size)))
    window = _window(model)
    return row if window is None else min(row, window)


def _window(model: PreTrainedModel) -> int | None:
    """How many tokens the layers see that see the fewest; None if all see all."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return min((window for window in windows if isinstance(window, int) and window > 0), default=None)


def _made_up(vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Random requests for two rows, of which one is shorter, in sorted order."""
    draw = np.random.default_rng(0).integers
    contexts = [draw(0, vocabulary, 16).tolist() for _ in range(2)]
    # Of nine tokens the last one is not forwarded.
    return sorted((context, draw(0, vocabulary, 9).tolist()) for context in (*contexts, *contexts, contexts[0]))


def _layouts(batch: _Batch) -> list[_Batch]:
    """The batch, and two that are wrong: positions count through the row, tokens see all that lies before them."""
    assert batch.positions is not None
    assert batch.ends is not None
    length = batch.positions.shape[1]
    counted = torch.arange(length, device=batch.positions.device).expand_as(batch.positions)
    return [batch, replace(batch, positions=counted), replace(batch, ends=torch.full_like(batch.ends, length))]


def _distance(logits: Tensor, expected: Tensor) -> float:
    """How far logits [M, vocabulary] are off, in the mean of M places, as a share of their spread over the vocabulary.

    A mean, as an expert that is chosen by a rounding error changes one place a lot.
    """
    if logits.shape != expected.shape:
        return float("nan")
    logits, expected = (each.float() - each.float().mean(-1, keepdim=True) for each in (logits, expected))
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


def _tolerance(dtype: torch.dtype) -> float:
    """What rounding in each of many layers may sum up to; 0.06 in bfloat16. A GPU may round float32 to 10 bits."""
    return max(2e-3, 8 * torch.finfo(dtype).eps)


def _narrows(model: PreTrainedModel) -> bool:
    """Whether the head can be computed at some places only, found by trying."""
    ids = torch.tensor(_made_up(model.get_input_embeddings().weight.shape[0])[0][0], device=model.device)[None]
    kept = torch.tensor([3, 7, 8], device=model.device)
    try:
        with torch.no_grad(), _evaluating(model):
            full = model(ids).logits
            with _head_at(model, kept):
                picked = model(ids).logits
    except Exception:  # noqa: BLE001  # there may be no head, or one that is called in its own way
        return False
    shapes = full.shape[1] == ids.shape[1] and picked.shape == (1, len(kept), full.shape[2])
    return shapes and _distance(picked[0], full[0, kept]) <= _tolerance(model.dtype)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and then each module's own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
