"""Find, prove and save a better merge of language models: target + Σ w·(tuned − base)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvmerge.checkpoint import Checkpoint
    from tvmerge.granularity import Grouping
    from tvmerge.merge import Merge
    from tvmerge.recipe import Recipe
    from tvmerge.task_vector import Difference, TaskVector

__all__ = ["Checkpoint", "Difference", "Grouping", "Merge", "Recipe", "TaskVector", "__version__"]

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint",
    "Difference": "task_vector",
    "Grouping": "granularity",
    "Merge": "merge",
    "Recipe": "recipe",
    "TaskVector": "task_vector",
}


def __getattr__(name: str) -> Any:
    # Loaded at first use: `import tvmerge` and `tvmerge --help` must not wait for torch.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"tvmerge.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tvmerge' has no attribute {name!r}")
