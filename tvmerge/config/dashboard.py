"""The settings of the dashboard."""

from __future__ import annotations

from dataclasses import dataclass

from tvmerge.errors import ConfigError

__all__ = ["DashboardConfig"]

LARGEST_PORT = 65535


@dataclass(kw_only=True)
class DashboardConfig:
    """Show a run in the browser while it goes on or later: optuna-dashboard, with notes on trials and the plots.

    Args:
        output_dir: folder of the run
        host: address to listen at; any other than this machine's own lets others in, and there is no login
        port: port to listen at; 0 takes a free one
        storage: address of the study's storage, if it is not output_dir/study.db
        study_name: name of the study in the storage; not needed if it holds one
    """

    output_dir: str = "output"
    host: str = "127.0.0.1"
    port: int = 8080
    storage: str | None = None
    study_name: str | None = None

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        if not self.host.strip():
            raise ConfigError("--host is empty")
        if self.storage is not None and not self.storage.strip():
            raise ConfigError("--storage is empty, give an address as sqlite:///study.db")
        if not 0 <= self.port <= LARGEST_PORT:
            raise ConfigError(f"--port must be from 0 to {LARGEST_PORT}, got {self.port}")
