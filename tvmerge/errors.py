"""The exception tree. Everything that tvmerge raises on purpose derives from TvmergeError.

TvmergeError
├── InputError              what the user gave cannot work; the command line exits with status 2
│   ├── ConfigError         a flag or a key of the YAML configuration
│   ├── CheckpointError     a model folder, a Hub id, or a file in it
│   ├── IncompatibleError   models that do not fit together
│   ├── TaskError           an evaluation task or its questions
│   ├── StudyError          a run's folder that belongs to another run
│   └── RecipeError         a recipe file
└── RunError                the input was right and the run failed; exit status 1
    ├── BudgetError         the next request to a judge could cost more than is left to spend
    ├── JudgeError          a judge did not answer one request; the case is unscored and the run goes on
    ├── TrialStopped        a trial was ended early (pruning.py, as it carries scores); it has no score
    ├── TrialTimeout        a trial took longer than it may
    └── StopError           the run stops here, and the same command goes on; a trial under way is not recorded
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "IncompatibleError",
    "InputError",
    "JudgeError",
    "RecipeError",
    "RunError",
    "StopError",
    "StudyError",
    "TaskError",
    "TrialTimeout",
    "TvmergeError",
]


class TvmergeError(Exception):
    """Base of all errors raised on purpose. Its message is one line: what, where, what to do."""


class InputError(TvmergeError):
    """What the user gave cannot work."""


class ConfigError(InputError):
    """A flag or a key of the configuration has a value that cannot work."""


class CheckpointError(InputError):
    """A model cannot be found or read."""


class IncompatibleError(InputError):
    """Two models do not fit together."""


class TaskError(InputError):
    """An evaluation task is unknown or cannot be used."""


class StudyError(InputError):
    """A run's folder belongs to another configuration or to a process that still runs."""


class RecipeError(InputError):
    """A recipe cannot be read or does not fit its sources."""


class RunError(TvmergeError):
    """A run that started well could not go on."""


class BudgetError(RunError):
    """The next request to a judge could cost more than is left to spend."""


class JudgeError(RunError):
    """A judge did not answer one request: it, the network or a gateway failed, after all retries."""


class TrialTimeout(RunError):
    """A trial took longer than it may."""


class StopError(RunError):
    """The run cannot go on, by no fault of the trial under way: it is run again by the same command."""
