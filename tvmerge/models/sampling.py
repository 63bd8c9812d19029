"""Drawn tokens: what is drawn is a function of the logits, a seed and a step, and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

__all__ = ["Draw", "Filters", "Sampling", "draw_tokens", "uniform"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are drawn."""

    temperature: float  # the logits are divided by it; greater than 0, and the model's own setting does not count
    seed: int  # of the request: two requests of one seed draw with the same numbers

    def __post_init__(self) -> None:
        """Refuse what nothing can be divided by."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {self.temperature}; None samples nothing")

    def draw(self, step: int) -> Draw:
        """What draws the token of a step, counted from 0."""
        return Draw(self.temperature, uniform(self.seed, step))


@dataclass(frozen=True)
class Draw:
    """What draws one token."""

    temperature: float
    uniform: float  # in [0, 1)


@dataclass(frozen=True)
class Filters:
    """What a checkpoint's own generation_config.json says of the tokens that may be drawn; None: nothing.

    transformers gives a top_k of 50 to a model that sets none. That is no property of the checkpoint, a later release
    may have another one, and FastChat's and vLLM's answers have none: what is not set is not applied.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @classmethod
    def of(cls, config: GenerationConfig) -> Filters:
        """Those of a model."""
        return cls(config.top_k or None, config.top_p, getattr(config, "min_p", None))

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """Rule out unlikely tokens, in the order of transformers; the likeliest one always stays.

        Args:
            scores: logits over temperature, (rows, vocabulary), float64.

        Returns:
            The scores, minus infinity where a token is ruled out.
        """
        if self.top_k is not None:  # Fan et al. 2018, arXiv:1805.04833, section 5.4; what ties with the last one stays
            last = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < last, -torch.inf)
        if self.top_p is not None and self.top_p < 1:  # Holtzman et al. 2020, arXiv:1904.09751, section 3.1
            # Stable: of tokens that tie, which ones go must not depend on the rows beside.
            ordered, order = scores.sort(dim=-1, stable=True)
            ruled_out = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            ruled_out[:, -1] = False
            scores = scores.masked_fill(torch.zeros_like(ruled_out).scatter_(1, order, ruled_out), -torch.inf)
        if self.min_p is not None:  # Nguyen et al. 2024, arXiv:2407.01082, section 3
            likely = scores.softmax(-1)
            scores = scores.masked_fill(likely < self.min_p * likely.amax(-1, keepdim=True), -torch.inf)
        return scores


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1), the same in every process, on every machine and in any order of asking.

    A hash as counter-based generator (Salmon et al. 2011, doi:10.1145/2063384.2063405, section 3): there is no state
    that the rows of a batch could share.
    """
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53  # 53 bits are what a float64 holds


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw], filters: Filters) -> torch.Tensor:
    """Draw one token for each row: the inverse of the distribution function, tokens in the vocabulary's order.

    Args:
        logits: (rows, vocabulary), any float dtype; without NaN, and with one finite number a row at least.
        draws: one for each row.
        filters: which tokens may be drawn.

    Returns:
        Token ids, (rows, 1), int64.
    """
    # In float64 a sum's last digit, which may depend on the shape of a batch, decides one draw in 10^14.
    temperatures = torch.tensor([[draw.temperature] for draw in draws], dtype=torch.float64, device=logits.device)
    numbers = torch.tensor([[draw.uniform] for draw in draws], dtype=torch.float64, device=logits.device)
    shares = filters.apply(logits.double() / temperatures).softmax(-1).cumsum(-1)
    total = shares[:, -1:].contiguous()
    tokens = torch.searchsorted(shares, numbers * total, right=True)
    # A product that is rounded up to the total would be behind the last token that may be drawn.
    return torch.minimum(tokens, torch.searchsorted(shares, total))
