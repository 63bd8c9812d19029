"""Weights & Biases: a run of its own, online or in output_dir/wandb."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from tvmerge.loggers import MAX_SCALARS, OPEN_SECONDS, Memory, candidate_scalars, pictures, trial_scalars
from tvmerge.results import Results, TrialRow

__all__ = ["WandbLogger"]


class WandbLogger:
    """A run of W&B; WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and WANDB_DIR are respected.

    Args:
        settings: of the run.
        folder: of the run.
        memory: what was logged before.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, memory: Memory) -> None:
        options = wandb.Settings(
            console="off",  # what is printed is the run's own
            disable_code=True,
            disable_git=True,
            init_timeout=OPEN_SECONDS / 2,
            silent=True,
            x_disable_meta=True,  # the command line may hold a password
        )
        wandb.setup(options)  # silent before it looks for a key: it would ask for one, and wait
        known = memory.values.get("run")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "tvmerge",
            name=os.environ.get("WANDB_NAME") or folder.resolve().name,
            id=known or os.environ.get("WANDB_RUN_ID"),
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(folder),
            config=dict(settings),
            allow_val_change=True,
            settings=options,
        )
        if known is None:
            memory.save(run=self._run.id)
        # Steps of W&B may not go back, as trials of several workers do.
        self._run.define_metric("trial")
        self._run.define_metric("*", step_metric="trial")

    def log_trial(self, row: TrialRow, *, best: float | None) -> None:
        """Log a trial; weights that are too many for numbers of their own as a histogram."""
        entry: dict[str, Any] = {"trial": row.number, **trial_scalars(row, best=best)}
        if len(row.weights) > MAX_SCALARS:
            entry["weights"] = wandb.Histogram(list(row.weights.values()))
        self._run.log(entry)
        if row.failure is not None:
            self._run.summary[f"failure/{row.number}"] = row.failure

    def finish(self, results: Results, folder: Path) -> None:
        """Log the table, the numbers in it, the report and the pictures."""
        self._run.summary.update({**candidate_scalars(results), "table": results.table, "verdict": results.verdict})
        artifact = wandb.Artifact(f"results-{self._run.id}", type="results")
        for path in pictures(folder):
            artifact.add_file(str(path), name=path.name)
            if path.suffix == ".png":
                self._run.summary[f"plots/{path.stem}"] = wandb.Image(str(path))
        if pictures(folder):
            self._run.log_artifact(artifact)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
