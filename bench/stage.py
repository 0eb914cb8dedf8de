"""Where the measurements run: a server, databases cloned from a template, a live application."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Self

import psutil
import psycopg2
from sqlalchemy import NullPool, create_engine
from sqlalchemy.engine import Engine, make_url

from chronos.db import connect_engine
from chronos.demo.embedded import EmbeddedPostgres, ServerSettings
from chronos.demo.rows import create_webhook_log
from chronos.demo.writer import LiveWriter

# A small production server's settings; everything else is PostgreSQL's default, above all fsync and
# synchronous_commit, which are on. No checkpoint hits a measurement: each starts with one.
SETTINGS: ServerSettings = {
    "shared_buffers": "1GB",
    "max_wal_size": "16GB",
    "min_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "max_connections": 50,
}

# What is measured: returns how many rows it processed, and in how many seconds.
Work = Callable[[Engine], tuple[int, float]]

WRITERS = 4
WRITES_A_SECOND = 100  # twice the 200,000 an hour of the application that this was made for
_READER_PAUSE_S = 0.02

_READ = """
SELECT * FROM webhook_log WHERE "timestamp" >= date_trunc('day', now(), 'UTC')
ORDER BY "timestamp" DESC LIMIT 50
"""


# Rows of about 200 bytes: without the requests.
_NARROW = (
    "ALTER TABLE webhook_log ALTER request_headers TYPE jsonb USING NULL,"
    " ALTER request_body TYPE jsonb USING NULL",
    "VACUUM ANALYZE webhook_log",
)


@dataclass(frozen=True)
class Sample:
    """One measurement: seconds, WAL in bytes, and the longest waits of the live application in seconds."""

    rows: int
    seconds: float
    wal: int
    writer_s: float
    reader_s: float

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


class Stage:
    """A server where databases may be created; ``clean`` drops those that are left."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._server = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        self._made: set[str] = set()

    def template(self, rows: int, days: float, *, narrow: bool = False) -> str:
        """The name of a database with ``rows`` rows in webhook_log, created on first use.

        Rows are about 1.1 kB, ``narrow`` ones about 200 bytes.
        """
        name = f"chronos_bench_{os.getpid()}_{rows}{'_narrow' if narrow else ''}"
        if name not in self._made:
            self._create(name)
            engine = self.engine(name)
            create_webhook_log(engine, rows, days=days)
            if narrow:
                with engine.connect() as conn:
                    conn.execution_options(isolation_level="AUTOCOMMIT")
                    for text in _NARROW:
                        conn.exec_driver_sql(text)
        return name

    @contextmanager
    def clone(self, template: str) -> Iterator[Engine]:
        """A copy of ``template`` for the block, which starts after a checkpoint."""
        name = f"chronos_bench_{os.getpid()}_run"
        self._create(name, template)
        self._execute("CHECKPOINT")
        try:
            yield self.engine(name)
        finally:
            self._drop(name)

    def keep(self, template: str, name: str) -> str:
        """A copy of ``template`` that stays, to be changed and cloned in turn."""
        name = f"{template}_{name}"
        self._create(name, template)
        return name

    def vacuum(self, database: str) -> None:
        """Leave the table as autovacuum would after the last write."""
        with self.engine(database).connect() as conn:
            conn.execution_options(isolation_level="AUTOCOMMIT")
            conn.exec_driver_sql("VACUUM ANALYZE webhook_log")

    def engine(self, database: str) -> Engine:
        """An engine for a database of this server."""
        return connect_engine(self._url.set(database=database))

    def measure(self, engine: Engine, work: Work) -> Sample:
        """``work`` under a live application."""
        with live_application(engine) as waits:
            before = self.wal()
            rows, seconds = work(engine)
            wal = self.wal() - before
        return Sample(rows, seconds, wal, waits.writer_s, waits.reader_s)

    def measure_alone(self, engine: Engine, work: Work) -> Sample:
        """The same with no other load: for WAL that the application's own would hide."""
        before = self.wal()
        rows, seconds = work(engine)
        return Sample(rows, seconds, self.wal() - before, 0.0, 0.0)

    def describe(self) -> list[str]:
        """The machine and the server, a line each."""
        with self._server.connect() as conn:
            version = conn.exec_driver_sql("SHOW server_version").scalar_one()
            wanted = [
                *SETTINGS,
                "fsync",
                "synchronous_commit",
                "maintenance_work_mem",
                "work_mem",
                "wal_level",
            ]
            values = {name: conn.exec_driver_sql(f"SHOW {name}").scalar_one() for name in wanted}
        memory = psutil.virtual_memory().total / 2**30
        return [
            f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GB of memory, {platform.system()}",
            f"PostgreSQL {version}: " + ", ".join(f"{name} {value}" for name, value in values.items()),
        ]

    def clean(self) -> None:
        """Drop every database that was created."""
        for name in list(self._made):
            self._drop(name)

    def _create(self, name: str, template: str | None = None) -> None:
        copied = f" TEMPLATE {template}" if template else ""
        with self._server.connect() as conn:
            new = conn.exec_driver_sql("SHOW server_version_num").scalar_one() >= "150000"
            # By copying files, as if it had been restored: through the WAL it would take longer.
            strategy = " STRATEGY file_copy" if template and new else ""
            conn.exec_driver_sql(f"CREATE DATABASE {name}{copied}{strategy}")
        self._made.add(name)

    def _drop(self, name: str) -> None:
        self._execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self._made.discard(name)

    def _execute(self, text: str) -> None:
        with self._server.connect() as conn:
            conn.exec_driver_sql(text)

    def wal(self) -> int:
        """The bytes of WAL that the server has written so far."""
        with self._server.connect() as conn:
            text = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
            return int(conn.exec_driver_sql(text).scalar_one())


@contextmanager
def opened_stage() -> Iterator[Stage]:
    """The server of DATABASE_URL, from the environment and not .env, or one started for the block."""
    url = os.environ.get("DATABASE_URL")
    if url:
        plain = make_url(url).set(drivername="postgresql+psycopg2")
        yield from _cleaned(Stage(plain.render_as_string(hide_password=False)))
    else:
        with EmbeddedPostgres(SETTINGS) as server:
            yield from _cleaned(Stage(server.url))


def _cleaned(stage: Stage) -> Iterator[Stage]:
    try:
        yield stage
    finally:
        stage.clean()


@dataclass
class Waits:
    """The longest waits, in seconds; known once the application has stopped."""

    writer_s: float = 0.0
    reader_s: float = 0.0


@contextmanager
def live_application(engine: Engine) -> Iterator[Waits]:
    """Writers and a reader, in their own process, so that they wait for the server alone."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    url = engine.url.render_as_string(hide_password=False)
    process = context.Process(target=_application, args=(url, theirs), daemon=True)
    process.start()
    theirs.close()
    waits = Waits()
    try:
        ours.recv()
        yield waits
        ours.send(None)
        waits.writer_s, waits.reader_s, failed = ours.recv()
        if failed:
            raise RuntimeError(f"the live application failed: {failed}")
    finally:
        ours.close()
        process.join()


def _application(url: str, orders: Pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the measuring process handles Ctrl-C and ends the pipe
    with _Reader(url) as reader, LiveWriter(url, threads=WRITERS, rate=WRITES_A_SECOND) as writer:
        writer.catch_up()
        warm = len(writer.commits)
        reader.longest_s = 0.0
        orders.send(None)
        try:
            orders.recv()
        except EOFError:
            return
        writer.catch_up()
    failed = reader.failed or "; ".join(error.message for error in writer.errors[:1])
    orders.send((writer.longest_wait(since=warm), reader.longest_s, failed))


class _Reader:
    """Keeps reading today's newest rows."""

    def __init__(self, url: str) -> None:
        dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._session = psycopg2.connect(dsn)
        self._session.autocommit = True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.longest_s = 0.0
        self.failed = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._session.close()

    def _work(self) -> None:
        try:
            with self._session.cursor() as cursor:
                while not self._stopping.wait(_READER_PAUSE_S):
                    started = time.monotonic()
                    cursor.execute(_READ)
                    cursor.fetchall()
                    self.longest_s = max(self.longest_s, time.monotonic() - started)
        except psycopg2.Error as error:
            self.failed = str(error).strip()


def _processor() -> str:
    with Path("/proc/cpuinfo").open() as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.machine()
