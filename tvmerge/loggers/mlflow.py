"""MLflow: the server that MLFLOW_TRACKING_URI names, else a sqlite file in output_dir/mlruns."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from time import time
from typing import Any
from urllib.parse import quote

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from tvmerge.loggers import MAX_SCALARS, Memory, candidate_scalars, pictures, trial_scalars
from tvmerge.results import Results, TrialRow

__all__ = ["MlflowLogger"]

#: Characters of a parameter's value, and parameters in one request. Source: MLflow's REST API.
PARAM_LENGTH = 500
BATCH = 100


class MlflowLogger:
    """A run of MLflow.

    Args:
        settings: of the run.
        folder: of the run.
        memory: what was logged before.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, memory: Memory) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes
        named = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
        local = (folder / "mlruns").resolve()
        if not named:
            local.mkdir(exist_ok=True)
        uri = named or f"sqlite:///{quote(str(local / 'mlflow.db'))}"
        self._client = MlflowClient(uri)
        where = sha256(uri.encode()).hexdigest()[:16]  # it may hold a password
        known = memory.values.get("run") if memory.values.get("where") == where else None
        if known is None or self._client.get_run(known).info.lifecycle_stage != "active":
            known = self._begin(settings, folder, None if named else local)
            memory.save(where=where, run=known, logged=[])
        self._run: str = known
        steps = {metric.step for metric in self._client.get_metric_history(self._run, "failed")}  # every trial has it
        memory.save(logged=sorted(steps))
        self._client.log_dict(self._run, dict(settings), "settings.json")

    def _begin(self, settings: Mapping[str, Any], folder: Path, local: Path | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or "tvmerge"
        found = self._client.get_experiment_by_name(name)
        place = None if local is None else (local / "artifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=place)
        run: str = self._client.create_run(experiment, run_name=folder.resolve().name).info.run_id
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
        params = [Param(key, value[:PARAM_LENGTH]) for key, value in texts.items() if value]
        for start in range(0, len(params), BATCH):
            self._client.log_batch(run, params=params[start : start + BATCH])
        return run

    def log_trial(self, row: TrialRow, *, best: float | None) -> None:
        """Log a trial; weights that are too many for numbers of their own as a file."""
        if len(row.weights) > MAX_SCALARS:
            self._client.log_dict(self._run, dict(row.weights), f"weights/trial-{row.number:04d}.json")
        self._log(trial_scalars(row, best=best), row.number)
        if row.failure is not None:
            self._client.log_text(self._run, row.failure, f"failures/trial-{row.number:04d}.txt")

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(time() * 1000)
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in numbers.items()])

    def finish(self, results: Results, folder: Path) -> None:
        """Log the table, the numbers in it, the report and the pictures."""
        self._log(candidate_scalars(results), max((row.number for row in results.trials), default=0))
        text = f"{results.table}\n\n{results.verdict}\n"
        self._client.log_text(self._run, text, "table.md")
        self._client.set_tag(self._run, "mlflow.note.content", text[:5000])
        for path in pictures(folder):
            self._client.log_artifact(self._run, str(path))

    def close(self) -> None:
        """Mark the run as ended; one that goes on is marked again."""
        self._client.set_terminated(self._run)
