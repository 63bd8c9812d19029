"""optuna-dashboard on the study of a run, with notes and plots that a thread adds: a run pays nothing for them."""

from __future__ import annotations

import importlib
import json
import mimetypes
import re
import socket
import sys
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from tvmerge.config import DashboardConfig
from tvmerge.errors import ConfigError, StudyError
from tvmerge.files import local_path, write_bytes
from tvmerge.report.notes import RunNotes, study_note
from tvmerge.results import trial_rows
from tvmerge.storage import PATIENCE, STUDY_FILE, file_url, only_study, open_storage, reason_of, shown_url

__all__ = ["DashboardThread", "dashboard", "open_study"]

#: Seconds between two looks for new trials and plots.
INTERVAL = 3.0
#: Notes that are written in one transaction: a few ms, for which a run may have to wait.
BATCH = 100
#: Characters of a piece of a note. Source: optuna_dashboard 0.21, _note.py.
PIECE = 2045
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
#: What a storage raises; KeyError: the study was deleted meanwhile.
STORAGE_ERRORS = (OptunaError, SQLAlchemyError, OSError, KeyError, RuntimeError)
#: The attribute of a study that says which note we gave it.
OUR_NOTE = "tvmerge:note"


def dashboard(config: DashboardConfig) -> None:
    """Serve the dashboard until it is interrupted.

    Raises:
        ConfigError: the package is missing, or the address cannot be listened at.
        StudyError: there is no such study.
    """
    try:
        wsgi = importlib.import_module("optuna_dashboard").wsgi
    except ImportError as error:
        raise ConfigError(
            f'the dashboard needs the package optuna-dashboard, pip install "tvmerge[dashboard]" ({error})'
        ) from error
    folder = local_path(config.output_dir, flag="--output_dir")
    storage, name = open_study(config, folder)
    thread = DashboardThread(storage, study_name=name, folder=folder)
    try:
        app = wsgi(get_storage(storage), artifact_store=FileSystemArtifactStore(folder / "artifacts"))
        with _listen(config) as server:
            server.set_app(app)
            with suppress(KeyboardInterrupt):
                thread.look()  # notes that come later than the page are seen when it is opened anew
                _announce(config, server.server_address[1])
                thread.start()
                server.serve_forever()
    finally:
        thread.stop()
        storage.remove_session()
        storage.engine.dispose()


def open_study(config: DashboardConfig, folder: Path) -> tuple[RDBStorage, str]:
    """The storage of a study that is there, and its name; nothing is made.

    Raises:
        StudyError: there is none, or none of this name, or it cannot be opened.
    """
    url, shown = config.storage, "" if config.storage is None else f"--storage {shown_url(config.storage)}"
    if url is None:
        path = folder / STUDY_FILE
        if not path.is_file():
            raise StudyError(f"{path}: there is no study, name the --output_dir of a run or its --storage")
        url, shown = file_url(path), str(path)
    storage = open_storage(url, make=False)
    try:
        name = config.study_name or only_study(storage, shown=shown)
        names = [study.study_name for study in storage.get_all_studies()]
    except STORAGE_ERRORS as error:
        raise StudyError(f"{shown}: cannot be opened as a study: {reason_of(error)}") from error
    if name not in names:
        storage.engine.dispose()
        raise StudyError(f"{shown}: holds no study {name!r}, --study_name may be {', '.join(names) or 'none'}")
    return storage, name


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread of its own, which ends with the process."""

    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking a name server for our name, which may take a minute."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that has hung up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    """Prints no line for each request."""

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def _listen(config: DashboardConfig) -> _Server:
    kind = _Server6 if ":" in config.host else _Server
    try:
        return kind((config.host, config.port), _Quiet)
    except OSError as error:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: cannot listen there ({error.strerror or error}), "
            "try another --port"
        ) from error


def _announce(config: DashboardConfig, port: int) -> None:
    """Say where it is, and who may do what there."""
    is_local = config.host in {"localhost", "::1"} or config.host.startswith("127.")
    if not is_local:
        print(
            f"warning: --host {config.host} lets other machines in: everyone who can reach this address can see and "
            "delete your study. Rather keep 127.0.0.1 and use ssh -L.",
            file=sys.stderr,
            flush=True,
        )
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"the dashboard is at http://{host}:{port}/ (Ctrl-C ends it)")
    print("It has no login, and whoever opens it can change and delete studies.", flush=True)


class DashboardThread:
    """Gives finished trials notes, and the study its note and its plots, at once and then every few seconds.

    Args:
        storage: of the study.
        study_name: its name.
        folder: of the run.
    """

    def __init__(self, storage: RDBStorage, *, study_name: str, folder: Path) -> None:
        self._rdb, self._storage = storage, get_storage(storage)
        self._name, self._folder = study_name, folder
        self._study_id: int | None = None
        self._noted: set[int] = set()  # ids of trials
        self._notes = RunNotes(folder)
        self._seen: dict[Path, tuple[int, int]] = {}  # picture → when it was written, and its size
        self._said: set[str] = set()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tvmerge-dashboard", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End it, after what is being written."""
        self._ends.set()
        if self._thread.ident is not None:
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        while not self._ends.wait(INTERVAL):
            self.look()

    def look(self) -> None:
        """Write what is missing; what cannot be written now is when it is looked again."""
        try:
            self._write()
        except STORAGE_ERRORS as error:  # a busy or a deleted study
            # A study that is made anew has the numbers of the old one.
            self._storage, self._study_id = get_storage(self._rdb), None
            line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            if line not in self._said:
                self._said.add(line)
                print(f"tvmerge dashboard: notes wait ({line})", file=sys.stderr, flush=True)

    def _write(self) -> None:
        study_id = self._storage.get_study_id_from_name(self._name)
        if study_id != self._study_id:
            attributes = self._storage.get_study_system_attrs(study_id)
            found = (re.fullmatch(r"dashboard:(\d+):note_ver", key) for key in attributes)
            self._noted = {int(each[1]) for each in found if each is not None}
            self._study_id = study_id
            self._seen.clear()
        trials = self._storage.get_all_trials(study_id, deepcopy=False, states=FINISHED)
        new = [trial for trial in trials if trial._trial_id not in self._noted]
        if new:
            self._notes.refresh()
        for start in range(0, len(new), BATCH):
            if self._ends.is_set():
                return
            self._note(study_id, new[start : start + BATCH])
        self._note_study(study_id)
        self._show_plots(study_id)

    def _note(self, study_id: int, trials: Sequence[FrozenTrial]) -> None:
        """Write the notes of some trials in one transaction: one for each would take a hundred times as long.

        Source: optuna_dashboard 0.21, _note.py, and the tables of optuna 5.
        """
        pairs: list[tuple[str, Any]] = []
        for trial in trials:
            pairs.append((f"dashboard:{trial._trial_id}:note_str:0", self._notes.of(trial_rows([trial])[0])))
            pairs.append((f"dashboard:{trial._trial_id}:note_ver", 1))
        rows = [{"study": study_id, "key": key, "value": json.dumps(value)} for key, value in pairs]
        table = sqlalchemy.table("study_system_attributes", *map(sqlalchemy.column, ("study_id", "key", "value_json")))
        names = {"study_id": "study", "key": "key", "value_json": "value"}
        insert = sqlalchemy.insert(table).values({to: sqlalchemy.bindparam(of) for to, of in names.items()})
        try:
            with self._rdb.engine.begin() as connection:
                connection.execute(insert, rows)
        except IntegrityError:  # a note was written meanwhile, by a user or by another dashboard: it stays
            known = self._storage.get_study_system_attrs(study_id)
            for key, value in pairs:
                if key not in known:
                    self._storage.set_study_system_attr(study_id, key, value)
        self._noted |= {trial._trial_id for trial in trials}

    def _note_study(self, study_id: int) -> None:
        """Give the study its note, unless a user has changed it."""
        card = self._folder / "best" / "README.md"
        if not self._is_new(card):
            return
        text = study_note(self._folder)
        if text is None:
            return
        attributes = self._storage.get_study_system_attrs(study_id)
        prefix = "dashboard:note_str:"
        pieces = sum(key.startswith(prefix) for key in attributes)
        shown = "".join(str(attributes.get(f"{prefix}{n}", "")) for n in range(pieces))
        if shown == text or (shown and attributes.get(OUR_NOTE) != _digest(shown)):
            return
        self._storage.set_study_system_attr(study_id, OUR_NOTE, _digest(text))
        n_pieces = max(pieces, -(-len(text) // PIECE))
        for n in range(n_pieces):
            self._storage.set_study_system_attr(study_id, f"{prefix}{n}", text[n * PIECE : (n + 1) * PIECE])
        version = int(attributes.get("dashboard:note_ver", 0)) + 1
        self._storage.set_study_system_attr(study_id, "dashboard:note_ver", version)

    def _show_plots(self, study_id: int) -> None:
        """Have every picture of the folder as an artifact of the study, under one id as long as it has this name.

        Source: optuna 5, artifacts/_upload.py.
        """
        for path in sorted(self._folder.glob("*.png")):
            if not self._is_new(path):
                continue
            artifact = str(uuid.uuid5(uuid.NAMESPACE_URL, f"tvmerge:{path.name}"))
            place = self._folder / "artifacts" / artifact
            content = path.read_bytes()
            if not place.exists() or place.read_bytes() != content:
                place.parent.mkdir(exist_ok=True)
                write_bytes(place, content)
            key = f"artifacts:{artifact}"
            if key not in self._storage.get_study_system_attrs(study_id):  # null: a user has deleted it
                kind, _ = mimetypes.guess_type(path.name)
                meta = {"artifact_id": artifact, "filename": path.name, "mimetype": kind, "encoding": None}
                self._storage.set_study_system_attr(study_id, key, json.dumps(meta))

    def _is_new(self, path: Path) -> bool:
        """Whether a file was written since it was last asked for."""
        try:
            status = path.stat()
        except OSError:
            return False
        before, self._seen[path] = self._seen.get(path), (status.st_mtime_ns, status.st_size)
        return before != self._seen[path]


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
