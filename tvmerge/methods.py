"""Merge methods: pure tensor functions, one per published method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

__all__ = ["METHODS", "task_arithmetic"]

Method = Callable[[Tensor, Sequence[Tensor], Sequence[float]], Tensor]


def task_arithmetic(target: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """θ = θ_target + Σ w_i · (θ_tuned,i − θ_base,i).

    Args:
        target: a tensor of the target model, any shape, any floating dtype.
        deltas: the task vectors' tensors of the same name, of the same shape, float32.
        weights: one weight for each of them.

    Returns:
        float32, of the same shape; the caller rounds it, once.

    Source:
        Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv:2212.04089, section 2.
    """
    merged = target.float()
    for delta, weight in zip(deltas, weights, strict=True):
        merged = merged.add(delta, alpha=weight)
    return merged


#: Name → method. A method is a function of one tensor of the target, the deltas of the same name, and their weights.
METHODS: Mapping[str, Method] = {"task_arithmetic": task_arithmetic}
