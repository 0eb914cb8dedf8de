"""Connections, statements with quoted names, and short transactions that wait for a lock with patience."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg2
from psycopg2 import errorcodes, sql
from sqlalchemy import create_engine
from sqlalchemy.engine import URL, Connection, CursorResult, Engine
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.pool import NullPool

from chronos.errors import LockUnavailableError

Statement = sql.Composable
T = TypeVar("T")


def connect_engine(url: URL, *, application_name: str = "chronos") -> Engine:
    """An engine for ``url``; each ``connect()`` opens one connection of its own, and no lock is taken."""
    return create_engine(
        url,
        poolclass=NullPool,
        connect_args={"application_name": application_name, "connect_timeout": 10},
        hide_parameters=True,
    )


@contextmanager
def opened(engine: Engine) -> Iterator[Connection]:
    """A connection for the block; one that the server has cut is let go without a word."""
    conn = engine.connect()
    try:
        yield conn
    finally:
        discard(conn)


def discard(conn: Connection) -> None:
    """Close a connection, alive or dead; what it had not committed is undone by the server."""
    if conn.closed:
        return
    with suppress(DBAPIError, PendingRollbackError):
        conn.invalidate()
    conn.close()


def name(*parts: str) -> sql.Identifier:
    """A quoted identifier: ``name("public", "webhook_log")`` is ``"public"."webhook_log"``."""
    return sql.Identifier(*parts)


def statement(template: str, **parts: Any) -> sql.Composed:
    """``template`` with each ``{part}`` filled in: a Composable as it is, any other value as a literal.

    The driver does all the quoting, and the text that it yields can be read, logged and run by psql.
    """
    return sql.SQL(template).format(
        **{
            key: part if isinstance(part, sql.Composable) else sql.Literal(part)
            for key, part in parts.items()
        }
    )


def joined(parts: Sequence[Statement], separator: str = ", ") -> sql.Composed:
    """The parts one after another, with ``separator`` between them."""
    return sql.SQL(separator).join(parts)


def render(conn: Connection, query: Statement) -> str:
    """The text of ``query`` as it goes to the server."""
    text: str = query.as_string(conn.connection.dbapi_connection)  # type: ignore[arg-type]
    return text


def execute(conn: Connection, query: Statement) -> CursorResult[*tuple[Any, ...]]:
    """Run one statement, or several separated by semicolons, in the transaction that is open."""
    return conn.exec_driver_sql(render(conn, query), execution_options={"no_parameters": True})


@contextmanager
def transaction(conn: Connection, *, lock_timeout_ms: int = 0) -> Iterator[Connection]:
    """One transaction with UTC, no row filtering and the given ``lock_timeout`` (0: none).

    READ COMMITTED, whatever the role or the database has as its default: what is read after a lock was
    waited for must be what is there by then.

    Its search path is pg_catalog alone: each name is written with its schema, and the server prints
    it so. The settings are local to the transaction, so a pooler that hands the server connection on
    leaves them behind.
    """
    with conn.begin():
        execute(conn, session_settings(lock_timeout_ms))
        yield conn


def session_settings(lock_timeout_ms: int = 0) -> Statement:
    """What ``transaction`` begins with."""
    return statement(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;\n"
        "SELECT set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO', true),"
        " set_config('search_path', 'pg_catalog, pg_temp', true),"
        " set_config('row_security', 'off', true), set_config('statement_timeout', '0', true),"
        " set_config('idle_in_transaction_session_timeout', '0', true),"
        " set_config('lock_timeout', {timeout}, true), {no_timeout}",
        timeout=str(lock_timeout_ms),
        no_timeout=no_transaction_timeout(),
    )


def no_transaction_timeout() -> Statement:
    """Switches off for this transaction what servers before 17 do not know."""
    return statement(
        "CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL"
        " THEN set_config('transaction_timeout', '0', true) END"
    )


def application_path() -> Statement:
    """For what moves rows: functions in the table's checks may count on the role's own search path."""
    return statement("SET LOCAL search_path TO DEFAULT")


def our_path() -> Statement:
    """Back to that of ``transaction``."""
    return statement("SELECT set_config('search_path', 'pg_catalog, pg_temp', true)")


@contextmanager
def autocommit(conn: Connection) -> Iterator[Connection]:
    """For the block, each message to the server is a transaction by itself: one round trip, not three.

    A message of several statements is one transaction too, in which local settings hold.
    """
    with conn.begin():
        driver: Any = conn.connection.dbapi_connection
        driver.autocommit = True
        try:
            yield conn
        finally:
            with suppress(psycopg2.Error):  # the connection may be gone
                driver.autocommit = False


@dataclass(frozen=True)
class Patience:
    """How long to wait for a lock, and how often.

    ``lock_timeout_ms`` bounds each attempt, and with it the time that others queue behind us;
    ``attempts`` bounds the whole. The pause between two attempts doubles up to ``longest_pause_s``
    and is jittered, so that two waiters do not meet again and again.
    """

    lock_timeout_ms: int = 100
    attempts: int = 60
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    sleep: Callable[[float], None] = time.sleep

    def pause_s(self, attempt: int) -> float:
        """Seconds to wait after the attempt with this number (from 1)."""
        ceiling = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(attempt - 1, 16))
        return ceiling * random.uniform(0.5, 1.0)  # jitter, not cryptography


@dataclass(frozen=True)
class LockHolder:
    """A session that holds a lock on a table we wait for."""

    pid: int
    application: str
    state: str
    seconds: float

    def __str__(self) -> str:
        who = f"pid {self.pid}"
        if self.application:
            who += f" ({self.application})"
        return f"{who}, {self.state or 'in a transaction'} for {self.seconds:.0f} s"


def lock_holders(conn: Connection, tables: list[tuple[str, str]]) -> list[LockHolder]:
    """Who holds locks on ``tables`` (schema, name), the oldest transaction first; takes no lock itself."""
    wanted = joined([statement("({schema}, {table})", schema=s, table=t) for s, t in tables])
    rows = execute(
        conn,
        statement(
            "SELECT a.pid, coalesce(a.application_name, ''), coalesce(a.state, ''),"
            " coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::float8"
            " FROM pg_stat_activity a"
            " WHERE a.pid <> pg_backend_pid() AND EXISTS ("
            "  SELECT FROM pg_locks l JOIN pg_class c ON c.oid = l.relation"
            "  JOIN pg_namespace n ON n.oid = c.relnamespace"
            "  WHERE l.pid = a.pid AND l.granted"
            "  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            "  AND (n.nspname, c.relname) IN ({wanted}))"
            " ORDER BY a.xact_start NULLS LAST",
            wanted=wanted,
        ),
    ).all()
    return [LockHolder(*row) for row in rows]


class ShortTransactions:
    """Runs transactions that need a strong lock: briefly, again and again, never queueing for long.

    ``on_blocked`` is told of each attempt that came to nothing; it may raise to give up.
    ``longest_s`` is the longest that any attempt lasted from the moment it asked for the strong lock,
    waiting and working together: nobody can have stood behind one of ours for longer than that.
    """

    def __init__(
        self,
        patience: Patience | None = None,
        on_blocked: Callable[[str, int], None] | None = None,
    ) -> None:
        self.patience = patience or Patience()
        self.longest_s = 0.0
        self._asked = 0.0
        self._on_blocked = on_blocked or (lambda message, attempt: None)

    def asks_now(self) -> None:
        """For work that first looks around: only from here on does anybody wait."""
        self._asked = time.monotonic()

    def run(self, conn: Connection, work: Callable[[Connection], T], *, tables: list[tuple[str, str]]) -> T:
        """``work(conn)`` in one transaction, tried again while a lock on ``tables`` is not to be had.

        Raises LockUnavailableError, with the holders, when the attempts are used up.
        """
        for attempt in range(1, self.patience.attempts + 1):
            self.asks_now()
            try:
                with transaction(conn, lock_timeout_ms=self.patience.lock_timeout_ms):
                    # Nobody behind our lock need wait for the disk as well: a commit that anybody makes
                    # after ours takes ours along to the disk, so after a crash both are there, or neither.
                    execute(conn, statement("SELECT set_config('synchronous_commit', 'off', true)"))
                    return work(conn)
            except DBAPIError as error:
                if not is_lock_failure(error):
                    raise
            finally:
                self.longest_s = max(self.longest_s, time.monotonic() - self._asked)
            with transaction(conn):
                holders = lock_holders(conn, tables)
            what = " and ".join(table for _, table in tables)
            who = "; ".join(map(str, holders[:3])) or "a session that is gone by now"
            message = f"waiting for a lock on {what}, held by {who}"
            if attempt < self.patience.attempts:
                self._on_blocked(message, attempt)
                self.patience.sleep(self.patience.pause_s(attempt))
        raise LockUnavailableError(f"gave up {message} ({attempt} attempts)")


def sqlstate(error: BaseException) -> str | None:
    """The server's five-character code of a driver error, None for anything else."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return original.pgcode if isinstance(original, psycopg2.Error) else None


def is_lock_failure(error: BaseException) -> bool:
    """Whether a transaction failed for want of a lock, so that trying again may succeed."""
    return sqlstate(error) in (errorcodes.LOCK_NOT_AVAILABLE, errorcodes.DEADLOCK_DETECTED)


def is_disconnect(error: BaseException) -> bool:
    """Whether the server went away or cut the connection, as opposed to refusing a statement."""
    if not isinstance(error, DBAPIError):
        return False
    code = sqlstate(error)
    if code is None:
        return isinstance(error.orig, psycopg2.OperationalError | psycopg2.InterfaceError)
    return code[:2] == "08" or code in (
        errorcodes.ADMIN_SHUTDOWN,
        errorcodes.CRASH_SHUTDOWN,
        errorcodes.CANNOT_CONNECT_NOW,
    )


def one_line(error: BaseException) -> str:
    """The first line of what a driver error says, without the statement and its values."""
    original = error.orig if isinstance(error, DBAPIError) else error
    lines = str(original).strip().splitlines()
    return lines[0].strip() if lines else type(original).__name__
