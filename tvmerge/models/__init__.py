"""Live models: one file per backend."""

from __future__ import annotations

from typing import Protocol

from tvmerge.state_dict import StateDict

__all__ = ["LanguageModel"]


class LanguageModel(Protocol):
    """A model in memory whose weights are replaced in place, trial after trial."""

    def load(self, state_dict: StateDict) -> None:
        """Fill the model with a state dict's tensors, in place."""
