"""What every search needs to know, whatever it scores models on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from tvmerge.config.experts import ExpertsConfig
from tvmerge.config.merge import listed
from tvmerge.errors import ConfigError

__all__ = ["ALL", "N_QUESTIONS", "SearchConfig"]

#: How a limit is spelt that is none.
ALL = "all"
#: Questions of a trial, if nobody says how many.
N_QUESTIONS = 300
#: Weights are float32 numbers.
LARGEST_WEIGHT = 3e38
#: Seconds: a dead worker is noticed after four of them.
LONGEST_HEARTBEAT = 86_400
#: Names of loggers, which are not imported to read a configuration.
LOGGER_NAMES = ("wandb", "mlflow", "tensorboard")


@dataclass(kw_only=True)
class SearchConfig(ExpertsConfig):
    """How weights are searched.

    Args:
        weight_min: least weight searched
        weight_max: greatest weight searched
        optuna_sampler: how the search chooses the next weights; TPE, CMA-ES, RSM, sep-CMA-ES, GP, NSGA-II, GA, random,
            QMC, or module:Class of a sampler of your own
        search: guided starts at the best single weight and stays near it, flat takes the whole range
        n_trials: trials in all, those of an earlier run with the same output_dir counted in
        optuna_seed: seed of the sampler
        pruner: stops trials early that do badly on their first questions: halving goes on with the better half of the
            trials that came as far, wilcoxon with what is not clearly worse than the best one; none stops no trial
        holdout: share of the questions of each kind that the search never sees, to judge the best model on
        heldout_limit: most of these that are asked, of all tasks together, the shares of labels kept; all for all
        question_seed: seed of the choice of questions
        system_instruction: text that goes before every prompt, or is the system's message of a chat
        batch_size: requests of full length that the model answers at a time, of shorter ones more; auto takes many, and
            halves them until they fit in memory
        device: where the model runs: auto, cpu, cuda, cuda:1, ...
        output_dir: folder of this run; the best model is saved in output_dir/best
        storage: address of a database that workers on other machines reach, as postgresql+psycopg://user@host/database;
            default is a file in output_dir
        study_name: of the study in storage; default is the name of output_dir
        heartbeat: seconds between two signs of life of a worker; one that misses four is taken for dead, and its trial
            is run again
        trial_timeout: seconds that a trial may take; a longer one fails
        loggers: where trials and results are logged too, several separated by spaces; wandb, mlflow, tensorboard
    """

    #: Settings that change where or how long a run runs, and no score: a study may be resumed with others.
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        {
            *("n_trials", "cache_dir", "output_dir", "delta_storage", "save_experts", "gate_prompts", "heldout_limit"),
            *("storage", "study_name", "heartbeat", "trial_timeout", "loggers"),
        }
    )

    weight_min: float = 0.0
    weight_max: float = 2.0
    optuna_sampler: str = "RSM"
    search: Literal["guided", "flat"] = "guided"
    n_trials: int = 100
    optuna_seed: int = 42
    pruner: Literal["none", "halving", "wilcoxon"] = "none"
    holdout: float = 0.3
    heldout_limit: int | str = 1000
    question_seed: int = 0
    system_instruction: str | None = None
    batch_size: int | str = 16
    device: str = "auto"
    output_dir: str = "output"
    storage: str | None = None
    study_name: str | None = None
    heartbeat: float = 15.0
    trial_timeout: float | None = None
    loggers: list[str] | str | None = None

    def check_search(self) -> None:
        """Check every setting of the search that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        self.check_merge()
        self.check_experts()
        if not isinstance(self.output_dir, str) or not self.output_dir.strip():
            raise ConfigError("--output_dir is empty, name a folder")
        for name in ("weight_min", "weight_max"):
            if not abs(getattr(self, name)) < LARGEST_WEIGHT:  # also if it is no number
                raise ConfigError(f"--{name} must be a number that float32 can hold, got {getattr(self, name)}")
        if self.weight_min >= self.weight_max:
            raise ConfigError(
                f"--weight_min must be less than --weight_max, got {self.weight_min} and {self.weight_max}"
            )
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ConfigError(f"--batch_size must be a whole number or auto, got {self.batch_size!r}")
        from tvmerge.samplers import check_sampler  # not before a command runs: --help must be fast

        check_sampler(self.optuna_sampler)
        for name in ("heartbeat", "trial_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name} must be more than 0 seconds, got {value}")
        if self.heartbeat > LONGEST_HEARTBEAT:
            raise ConfigError(f"--heartbeat must be {LONGEST_HEARTBEAT:,} seconds at most, got {self.heartbeat}")
        for name, least in (("n_trials", 2), ("optuna_seed", 0), ("question_seed", 0), ("batch_size", 1)):
            if getattr(self, name) != "auto":
                self.check_whole(name, least=least)
        names = self.logger_names
        if len(set(names)) != len(names) or not set(names) <= set(LOGGER_NAMES):
            raise ConfigError(f"--loggers must be different ones of {', '.join(LOGGER_NAMES)}, got {' '.join(names)}")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"--holdout must be a share from 0 to less than 1, got {self.holdout}")
        self.check_limit("heldout_limit")
        if self.study_name is not None and (self.storage is None or not self.study_name.strip()):
            raise ConfigError("--study_name names a study in a database: give --storage too, or leave it out")
        try:
            (self.system_instruction or "").encode()
        except UnicodeEncodeError:
            raise ConfigError("--system_instruction is not text in the encoding of this terminal") from None

    def check_limit(self, name: str) -> None:
        """Refuse what is neither a number of questions nor all of them.

        Raises:
            ConfigError: with the setting's name.
        """
        value = getattr(self, name)
        if isinstance(value, str) and value != ALL:
            raise ConfigError(f"--{name} must be a whole number or {ALL}, got {value!r}")
        if not isinstance(value, str):
            self.check_whole(name, least=1)

    @property
    def most_heldout(self) -> int | None:
        """Most held-out questions that are asked, of all tasks together; None for all."""
        return self.heldout_limit if isinstance(self.heldout_limit, int) else None

    @property
    def logger_names(self) -> list[str]:
        """Names of the loggers, in order."""
        return listed(self.loggers)

    def check_whole(self, name: str, *, least: int) -> None:
        """Refuse a whole number that is too small or too large.

        Raises:
            ConfigError: with the setting's name.
        """
        value = getattr(self, name)
        if value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")
        if value >= 1 << 63:
            raise ConfigError(f"--{name} must be less than 2^63, got {value}")

    def identity(self) -> dict[str, Any]:
        """Every setting that a score depends on, in one spelling."""
        without = self.NOT_IDENTITY | (frozenset() if self.is_mixture else self.ONLY_MIXTURES.keys())
        same = {key: value for key, value in asdict(self).items() if key not in without}
        if self.pruner == "none":
            del same["pruner"]  # studies that are older than it go on
        if self.is_mixture and not self.gate_mode.endswith("random"):
            same["gate_seed"] = None  # nothing is drawn
            same["gate_mode"] = self.gate_mode.removesuffix("_last")  # another name for the same
        return {**same, "weight_groups": listed(self.weight_groups), "freeze": listed(self.freeze)}
