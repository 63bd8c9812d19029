"""Task vectors: tuned − base, as a lazy state dict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvmerge.state_dict import StateDict, TensorSpec, deliver

__all__ = ["TaskVector"]


class TaskVector:
    """The difference of two state dicts of the same names and shapes; every tensor is float32.

    Args:
        tuned: the model that was tuned from `base`.
        base: the model it was tuned from.

    Source:
        Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv:2212.04089, section 2.
    """

    def __init__(self, *, tuned: StateDict, base: StateDict) -> None:
        self.tuned = tuned
        self.base = base

    @property
    def names(self) -> Sequence[str]:
        """Tensor names, sorted."""
        return self.base.names

    def spec(self, name: str) -> TensorSpec:
        """The base's shape, in float32."""
        return TensorSpec(shape=self.base.spec(name).shape, dtype=torch.float32)

    def read(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """The difference, taken in float32."""
        return deliver(self.tuned.read(name).float() - self.base.read(name).float(), out)
