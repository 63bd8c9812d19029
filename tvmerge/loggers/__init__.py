"""Loggers: trials and results to W&B, MLflow and TensorBoard. One file for each.

A logger runs in a thread of its own and never fails a run or makes it wait: what it raises becomes one line of
warning, and then it is off. output_dir/loggers.json says what each has logged, so that a run that goes on goes on in
the same place. A trial is noted there after it was logged: a process that is killed in between logs it a second time,
with the same numbers at the same step. MLflow is asked what it has, and TensorBoard is told to forget what came after,
so it is W&B only that can show such a trial twice.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from tvmerge.errors import ConfigError
from tvmerge.evaluators import mean_score, task_scores
from tvmerge.files import write_text
from tvmerge.results import Results, TrialRow

__all__ = [
    "LOGGERS",
    "MAX_SCALARS",
    "MEMORY",
    "Logger",
    "Loggers",
    "Memory",
    "candidate_scalars",
    "check_loggers",
    "open_loggers",
    "pictures",
    "trial_scalars",
]

#: Most weights of a trial that are logged as numbers of their own.
MAX_SCALARS = 64
#: Seconds that a run waits for a logger to open, and at its end for all of them to send what is left.
OPEN_SECONDS = 120.0
CLOSE_SECONDS = 60.0
#: Environment variables whose values are never printed.
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")
FINISHED = frozenset({"complete", "pruned", "failed"})


class Logger(Protocol):
    """Where trials and results are shown."""

    def log_trial(self, row: TrialRow, *, best: float | None) -> None:
        """Log a finished trial at the step of its number.

        Args:
            row: the trial.
            best: the best score of it and of all before it; None: none was scored.
        """

    def finish(self, results: Results, folder: Path) -> None:
        """Log the table, the scores of the candidates, and report.html and the pictures of the run's folder."""

    def close(self) -> None:
        """Send what is left and end."""


class Memory:
    """What one logger keeps between processes, in a file that it shares with the others.

    Args:
        path: of the file.
        name: of the logger.
        lock: of the file.
    """

    def __init__(self, path: Path, name: str, lock: threading.Lock) -> None:
        self.path, self.name, self._lock = path, name, lock
        own = self._read().get(name)
        self.values: dict[str, Any] = own if isinstance(own, dict) else {}

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    @property
    def logged(self) -> list[int]:
        """Numbers of the trials that are logged."""
        numbers: list[int] = self.values.setdefault("logged", [])
        return numbers

    def save(self, **values: Any) -> None:
        """Keep plain JSON values beside what is kept already."""
        with self._lock:
            self.values |= values
            write_text(self.path, json.dumps({**self._read(), self.name: self.values}) + "\n")


#: File that says what each has logged.
MEMORY = "loggers.json"
#: Name → module, class, package to import, extra that installs it.
LOGGERS: Mapping[str, tuple[str, str, str]] = {
    "wandb": ("tvmerge.loggers.wandb", "WandbLogger", "wandb"),
    "mlflow": ("tvmerge.loggers.mlflow", "MlflowLogger", "mlflow"),
    "tensorboard": ("tvmerge.loggers.tensorboard", "TensorboardLogger", "tensorboard"),
}


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a logger that is not known or whose package is missing, without importing it.

    Raises:
        ConfigError: with the extra to install.
    """
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"--loggers {name}: known are {', '.join(LOGGERS)}")
        if importlib.util.find_spec(LOGGERS[name][2]) is None:
            raise ConfigError(f'--loggers {name} needs the package {LOGGERS[name][2]}, pip install "tvmerge[{name}]"')


def open_loggers(names: Sequence[str], *, settings: Mapping[str, Any], folder: Path) -> Loggers:
    """Open loggers; one that cannot be opened is off, and the run goes on without it.

    Args:
        names: keys of LOGGERS.
        settings: the resolved configuration, which is logged without passwords.
        folder: of the run, which is there.

    Raises:
        ConfigError: a name is not known, or a package is missing.
    """
    check_loggers(names)
    lock, public = threading.Lock(), json.loads(hide(json.dumps(dict(settings), ensure_ascii=False, default=str)))
    threads = []
    for name in names:
        module, kind, _ = LOGGERS[name]

        def make(module: str = module, kind: str = kind, name: str = name) -> tuple[Logger, Memory]:
            memory = Memory(folder / MEMORY, name, lock)
            logger: Logger = getattr(importlib.import_module(module), kind)(public, folder, memory)
            return logger, memory

        threads.append(_LoggerThread(name, make))
    for thread in threads:
        thread.wait_until_open()
    return Loggers(threads)


class Loggers:
    """The loggers of a run, or none; use it from one thread."""

    def __init__(self, threads: Sequence[_LoggerThread]) -> None:
        self._threads = threads
        self._given: set[int] = set()
        self._best: float | None = None

    def log(self, trials: Sequence[TrialRow]) -> None:
        """Log the finished trials that are not logged yet, by this process or by an earlier one; returns at once.

        Args:
            trials: all of the study, or those that are new.
        """
        for row in sorted(trials, key=lambda row: row.number):
            if row.state in FINISHED and row.number not in self._given:
                self._given.add(row.number)
                scores = [score for score in (self._best, row.score) if score is not None]
                self._best = max(scores, default=None)
                for thread in self._threads:
                    thread.log_trial(row, self._best)

    def finish(self, results: Results, folder: Path) -> None:
        """Log what was found; returns at once."""
        for thread in self._threads:
            thread.finish(results, folder)

    def close(self) -> None:
        """Wait for what is left, CLOSE_SECONDS at most."""
        ends = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.close()
        for thread in self._threads:
            thread.wait_until_closed(ends - time.monotonic())


class _LoggerThread:
    """Runs one logger; turns it off with one line of warning when it fails."""

    def __init__(self, name: str, make: Callable[[], tuple[Logger, Memory]]) -> None:
        self._name, self._make = name, make
        self._tasks: queue.SimpleQueue[Callable[[Logger, Memory], None] | None] = queue.SimpleQueue()
        self._is_open, self._is_off = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tvmerge-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        logger: Logger | None = None
        try:
            logger, memory = self._make()
            self._is_open.set()
            while (task := self._tasks.get()) is not None and not self._is_off.is_set():
                task(logger, memory)
        except BaseException as error:  # noqa: BLE001  # of a library and of what it stands on, sys.exit too
            self._turn_off(f"{type(error).__name__}: {error}")
        self._is_open.set()
        try:
            if logger is not None:
                logger.close()
        except BaseException as error:  # noqa: BLE001
            self._turn_off(f"{type(error).__name__}: {error}")

    def _turn_off(self, reason: str) -> None:
        if not self._is_off.is_set():
            self._is_off.set()
            line = hide(" ".join(reason.split()))[:300]
            tqdm.write(f"warning: --loggers {self._name} is off from here on: {line}", file=sys.stderr)

    def wait_until_open(self) -> None:
        """Wait, so that what is wrong is said before a trial runs."""
        if not self._is_open.wait(OPEN_SECONDS):
            self._turn_off(f"it did not open within {OPEN_SECONDS:.0f} seconds")

    def log_trial(self, row: TrialRow, best: float | None) -> None:
        """Log a trial, unless it is logged."""

        def task(logger: Logger, memory: Memory) -> None:
            if row.number not in memory.logged:
                logger.log_trial(row, best=best)
                memory.save(logged=[*memory.logged, row.number])

        self._tasks.put(task)

    def finish(self, results: Results, folder: Path) -> None:
        """Log the results."""
        self._tasks.put(lambda logger, _: logger.finish(results, folder))

    def close(self) -> None:
        """End after what was given."""
        self._tasks.put(None)

    def wait_until_closed(self, seconds: float) -> None:
        """Wait for the end."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._turn_off(f"it did not send everything within {CLOSE_SECONDS:.0f} seconds, what is left is lost")


def hide(text: str) -> str:
    """Text without passwords in addresses, and without the keys of the environment."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "…")
    return re.sub(r"(\w://[^/@\s:\"]*):[^/@\s\"]*@", r"\1:…@", text)


def trial_scalars(row: TrialRow, *, best: float | None) -> dict[str, float]:
    """The numbers of a trial, by name: weights too if they are few."""
    numbers: dict[str, float | None] = {"score": row.score, "best": best}
    numbers |= {f"task/{task}": mean for task, mean in row.tasks.items()}
    numbers |= {"seconds": row.seconds, "judge_usd": row.cost, "failed": float(row.state == "failed")}
    facts = ("unscored", "judge_spread", "generated_tokens")
    numbers |= {key: row.facts[key] for key in facts if isinstance(row.facts.get(key), (int, float))}
    if len(row.weights) <= MAX_SCALARS:
        numbers |= {f"weight/{name}": weight for name, weight in row.weights.items()}
    return {plain(name): float(n) for name, n in numbers.items() if n is not None and math.isfinite(n)}


def candidate_scalars(results: Results) -> dict[str, float]:
    """The numbers of the table, by name."""
    numbers: dict[str, float | None] = {}
    for candidate in results.candidates:
        numbers[f"candidate/{candidate.label}/score"] = mean_score(candidate.scores, results.goals)
        for task, mean in task_scores(candidate.scores).items():
            numbers[f"candidate/{candidate.label}/{task}"] = mean
    return {plain(name): n for name, n in numbers.items() if n is not None and math.isfinite(n)}


def plain(name: str) -> str:
    """A name that all of them take."""
    return re.sub(r"[^\w\-. /]", "_", name)


def pictures(folder: Path) -> list[Path]:
    """report.html and the pictures of a run's folder."""
    report = folder / "report.html"
    return [*([report] if report.is_file() else []), *sorted(folder.glob("*.png"))]
