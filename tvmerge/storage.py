"""Where a study is kept: a file beside the run, or a database that workers on several machines reach."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import optuna
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import NOT_FOUND_MSG
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from tvmerge.errors import ConfigError, RunError, StudyError

__all__ = [
    "PATIENCE",
    "STORAGE_ERRORS",
    "STUDY_FILE",
    "STUDY_NAME",
    "absolute_url",
    "deletion_is_said",
    "file_url",
    "has_study",
    "only_study",
    "open_storage",
    "reason_of",
    "shown_url",
]

#: What the storage of a study raises, on a full disk for one.
STORAGE_ERRORS = (SQLAlchemyError, OptunaError)
STUDY_FILE = "study.db"
#: What a study is called that is alone in its file.
STUDY_NAME = "tvmerge"
#: Seconds that a process waits for another one's write to a file.
PATIENCE = 60
#: Names of an address's parameters whose values are shown nowhere: drivers take passwords as these too.
SECRET = re.compile("pass(?!file)|pwd|secret|token", re.IGNORECASE)


def file_url(path: Path) -> str:
    """The address of a study in a file."""
    return f"sqlite:///{quote(str(path))}"


def shown_url(url: str) -> str:
    """An address without its password, which no file and no message may hold.

    Raises:
        ConfigError: it is no address.
    """
    parsed = _parsed(url)
    secret = [key for key in parsed.query if SECRET.search(key)]
    # `set` takes None for "as it is".
    return parsed.difference_update_query(secret)._replace(password=None).render_as_string()


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except (SQLAlchemyError, ValueError) as error:
        raise ConfigError(
            "--storage is no address of a database, write it as postgresql+psycopg://user@host/database"
        ) from error


def absolute_url(url: str) -> str:
    """An address that means the same in every working folder.

    Raises:
        ConfigError: it is no address.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database.startswith(("file:", ":")):
        return url
    return parsed.set(database=str(Path(parsed.database).absolute())).render_as_string(hide_password=False)


def open_storage(url: str, *, make: bool = True) -> RDBStorage:
    """Connect to a database.

    Args:
        url: as SQLAlchemy reads it, `postgresql+psycopg://user@host/database`.
        make: whether a file that is not there is made.

    Raises:
        ConfigError: it is no address, or a package is missing that speaks to such a database.
        StudyError: it cannot be reached, or holds something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parsed = _parsed(url)
    is_file = parsed.get_backend_name() == "sqlite"
    arguments = {"connect_args": {"timeout": PATIENCE}} if is_file else {"pool_pre_ping": True}
    shown = (parsed.database or url) if is_file else shown_url(url)
    if is_file and (not parsed.database or parsed.database.startswith((":", "file:"))):
        raise ConfigError(f"--storage {shown}: is no file, in which a study stays: write it as sqlite:///study.db")
    file = Path(str(parsed.database))
    if is_file and not file.exists() and not (make and file.parent.is_dir()):
        raise StudyError(f"{shown}: there is no such {'file' if not make else 'folder to make a study in'}")
    try:
        if is_file and not file.exists():
            _make_file(file)
        return RDBStorage(url, engine_kwargs=arguments)
    except ImportError as error:
        driver = error.__cause__ or error
        raise ConfigError(
            f'--storage {shown}: {driver}: install it, as by pip install "tvmerge[postgresql]"'
        ) from error
    except SQLAlchemyError as error:
        if "NoSuchModule" in type(error).__name__:
            raise ConfigError(f"--storage {shown}: there is no such kind of database") from error
        raise StudyError(f"{shown}: cannot be opened as a study: {reason_of(error)}") from error
    except (OptunaError, RuntimeError, OSError) as error:  # a database of another version of Optuna
        raise StudyError(f"{shown}: cannot be opened as a study: {reason_of(error)}") from error


def _make_file(path: Path) -> None:
    """A database without a study, which appears whole.

    Sqlite makes tables and indices one by one. Where a kill left a table without its index, Optuna never makes it, and
    there are soon two studies of one name.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        storage = RDBStorage(file_url(staging / path.name))
        storage.remove_session()
        storage.engine.dispose()
        if not path.exists():
            (staging / path.name).replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def only_study(storage: RDBStorage, *, shown: str) -> str:
    """The name of the study in a storage that holds a single one.

    Raises:
        StudyError: it holds none, or several.
    """
    names = sorted(study.study_name for study in storage.get_all_studies())
    if len(names) != 1:
        which = f"one of them with --study_name: {', '.join(names)}" if names else "a run that has begun"
        raise StudyError(f"{shown}: holds {len(names)} studies, name {which}")
    return names[0]


def has_study(url: str | None, output: Path, name: str) -> bool:
    """Whether there is a study of this name already.

    Args:
        url: of a database; None: a file in `output`.
        output: folder of the run.
        name: of the study.

    Raises:
        ConfigError, StudyError: as `open_storage`.
    """
    if url is None:
        return (output / STUDY_FILE).exists()
    storage = open_storage(url)
    try:
        return name in {study.study_name for study in storage.get_all_studies()}
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def deletion_is_said(name: str) -> Iterator[None]:
    """Say that a study has gone, as whoever opens a dashboard can delete it.

    Raises:
        RunError: it was deleted meanwhile.
    """
    try:
        yield
    except KeyError as error:
        if error.args != (NOT_FOUND_MSG,):
            raise
        raise RunError(f"study {name} was deleted meanwhile: the search's command begins it anew") from error


def reason_of(error: Exception) -> str:
    """Why a storage failed, in one line."""
    inner = getattr(error, "orig", None) or error.__cause__ or error
    return " ".join(str(inner).split())[:200]
