"""Merge methods: functions of tensors, one per published method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tvmerge.delta import Delta, add_deltas
from tvmerge.state_dict import Array

__all__ = ["METHODS", "task_arithmetic"]

Method = Callable[[Array, Sequence[Delta], Sequence[float], Array], None]


def task_arithmetic(target: Array, deltas: Sequence[Delta], weights: Sequence[float], out: Array) -> None:
    """θ = θ_target + Σ w_i · (θ_tuned,i − θ_base,i).

    Args:
        target: a tensor of the target model, any shape, any floating dtype.
        deltas: the task vectors' tensors of the same name, of the same shape.
        weights: one weight for each of them, each a float32 number.
        out: filled with the sum, which is accumulated in float64 and rounded once; any floating dtype.

    Source:
        Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv:2212.04089, section 2.
    """
    add_deltas(target, deltas, weights, out=out)


#: Name → method. A method is a function of one tensor of the target, the deltas of the same name, and their weights.
METHODS: Mapping[str, Method] = {"task_arithmetic": task_arithmetic}
