"""TensorBoard: event files in output_dir/tensorboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from tvmerge.loggers import MAX_SCALARS, Memory, candidate_scalars, pictures, trial_scalars
from tvmerge.results import Results, TrialRow

__all__ = ["TensorboardLogger"]


class TensorboardLogger:
    """Writes event files.

    Args:
        settings: of the run.
        folder: of the run.
        memory: what was logged before.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, memory: Memory) -> None:
        # Of what a killed process wrote and did not note down, TensorBoard shows nothing.
        first = max(memory.logged, default=-1) + 1
        self._writer: Any = SummaryWriter(
            str(folder / "tensorboard"), purge_step=first if first or memory.values else None
        )
        if not memory.values.get("begun"):
            text = json.dumps(dict(settings), indent=2, ensure_ascii=False)
            self._writer.add_text("settings", f"```\n{text}\n```", 0)
        memory.save(begun=True)

    def log_trial(self, row: TrialRow, *, best: float | None) -> None:
        """Log a trial."""
        for name, value in trial_scalars(row, best=best).items():
            self._writer.add_scalar(name, value, row.number)
        if len(row.weights) > MAX_SCALARS:
            self._writer.add_histogram("weights", np.array(list(row.weights.values())), row.number)
        if row.failure is not None:
            self._writer.add_text("failure", f"```\n{row.failure}\n```", row.number)
        self._writer.flush()

    def finish(self, results: Results, folder: Path) -> None:
        """Log the table, the numbers in it and the pictures."""
        step = max((row.number for row in results.trials), default=0)
        self._writer.add_text("table", results.table, step)
        self._writer.add_text("verdict", results.verdict, step)
        for name, value in candidate_scalars(results).items():
            self._writer.add_scalar(name, value, step)
        for path in pictures(folder):
            if path.suffix == ".png":
                from PIL import Image

                with Image.open(path) as picture:
                    self._writer.add_image(path.stem, np.array(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
