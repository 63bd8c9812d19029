"""Which model is uploaded, and where to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tvmerge.errors import ConfigError

__all__ = ["PushConfig"]

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_./-]*")


@dataclass(kw_only=True)
class PushConfig:
    """Upload the best model of a run to the Hugging Face Hub, as one commit.

    Args:
        output_dir: folder of a run, whose best/ is uploaded, or the folder of a model that apply wrote
        repo_id: repository on the Hub, as owner/name; it is made if it is not there
        private: whether only its owners see it; a repository that is there stays what it is, and a public one is
            refused unless this is false
        revision: branch to commit to, which is made if it is not there; default is main
        dry_run: say what would be uploaded, without a network
    """

    output_dir: str
    repo_id: str
    private: bool = True
    revision: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything.

        Raises:
            ConfigError: a name that the Hub does not take.
        """
        name, most = self.repo_id, 96  # the Hub's limit
        if not _REPO_ID.fullmatch(name) or len(name) > most or name.endswith((".git", ".ipynb", ".", "-")):
            raise ConfigError(f"--repo_id {name!r}: must be owner/name of letters, digits, '-', '_' and '.'")
        if "--" in name or ".." in name:
            raise ConfigError(f"--repo_id {name!r}: the Hub takes no '--' and no '..' in a name")
        if self.revision is not None and not _REVISION.fullmatch(self.revision):
            raise ConfigError(f"--revision {self.revision!r}: is no name of a branch")
