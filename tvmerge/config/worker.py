"""The settings of a worker, which does trials of a run that was begun elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tvmerge.errors import ConfigError

__all__ = ["WorkerConfig"]

#: It names a folder too.
_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(kw_only=True)
class WorkerConfig:
    """Do trials of a search that runs, in this process beside it or on another machine, until all are done.

    Everything that is searched comes from the study. Models are looked for under the same names; what is no id of the
    Hub must lie at the same path. A worker that dies is started again.

    Args:
        output_dir: folder of the run, where this machine has it; else a folder for what this worker writes
        storage: address of the database that the search was given; default is the file in output_dir
        study_name: of the study in storage; not needed if it holds one
        name: what this worker is called; default is made of the machine's name and the process
        device: where the model runs: auto, cpu, cuda, cuda:1, ...; one worker for each
        batch_size: as of the search; default is the same
        cache_dir: where models of the Hub are kept here; default is that of the search
        restart: start a new process when one has died
    """

    output_dir: str | None = None
    storage: str | None = None
    study_name: str | None = None
    name: str | None = None
    device: str = "auto"
    batch_size: int | str | None = None
    cache_dir: str | None = None
    restart: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything.

        Raises:
            ConfigError: neither a folder nor a database.
        """
        if not (self.output_dir or "").strip() and not (self.storage or "").strip():
            raise ConfigError("--output_dir or --storage is needed: the folder of the run, or its database")
        if self.name is not None and (self.name == "main" or not _NAME.fullmatch(self.name)):
            raise ConfigError(
                f"--name must be letters, digits, '-', '_' and '.', 100 at most, and not main, got {self.name!r:.120}"
            )
