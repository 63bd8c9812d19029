"""A PostgreSQL server on this machine, of Debian's package `postgresql`, with a data folder and a port of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

ROLE, PASSWORD, DATABASE = "tvmerge", "geheim-7f3a91", "studies"


def binaries() -> Path | None:
    """Where initdb and pg_ctl are."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class PostgreSQL:
    """A server that only a password opens; `start` may follow `stop`."""

    def __init__(self) -> None:
        found = binaries()
        assert found is not None, "asked for only where it is installed"
        self._bin = found
        # Not in pytest's folder, which is root's: the server refuses to run as root.
        self._folder = Path(tempfile.mkdtemp(prefix="tvmerge-postgresql-"))
        self._user = None if os.geteuid() else _somebody()
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self.port = _free_port()
        password = self._folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        # Trusted for nothing: whoever connects is asked.
        self._run("initdb", "-D", self._data, "-U", ROLE, "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync")
        password.unlink()
        self.start()
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        address = ["-h", "127.0.0.1", "-p", str(self.port), "-U", ROLE]
        subprocess.run([self._bin / "createdb", *address, DATABASE], env=environment, check=True, capture_output=True)

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def url(self, password: str = PASSWORD, database: str = DATABASE) -> str:
        return f"postgresql+psycopg://{ROLE}:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        settings = f"-p {self.port} -h 127.0.0.1 -k {self._folder} -F -c max_connections=60"
        self._run("pg_ctl", "-D", self._data, "-w", "-o", settings, "-l", str(self._folder / "log"), "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-w", "-m", "fast", "stop")

    def close(self) -> None:
        try:
            self.stop()
        except AssertionError:  # a test has stopped it
            pass
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        prefix = [] if self._user is None else ["setpriv", "--reuid", self._user, "--regid", _group(self._user)]
        prefix += [] if self._user is None else ["--clear-groups"]
        command = [*prefix, str(self._bin / program), *arguments]
        # Into a file: a server keeps what it is given open.
        with tempfile.TemporaryFile() as said:
            status = subprocess.call(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd="/")
            said.seek(0)
            assert status == 0, said.read().decode(errors="replace")


def _somebody() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


def _group(user: str) -> str:
    return str(pwd.getpwnam(user).pw_gid)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
