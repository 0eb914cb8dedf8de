"""Connections, transactions, and statements whose names and values the driver quotes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg2
from psycopg2 import errorcodes, sql
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, CursorResult, Engine
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.pool import NullPool

from chronos.errors import RefusedError

Statement = sql.Composable


def connect_engine(url: URL, *, application_name: str = "chronos") -> Engine:
    """An engine for ``url``; each ``connect()`` opens a new connection. No lock is taken."""
    engine = create_engine(
        url,
        poolclass=NullPool,
        connect_args={"application_name": application_name, "connect_timeout": 10},
        hide_parameters=True,
        use_native_hstore=False,
    )
    # On every new connection SQLAlchemy queries for hstore and for the current schema, with operators and
    # functions found through the role's search path, which may be somebody else's. We need neither.
    engine.dialect._get_default_schema_name = lambda _: ""  # type: ignore
    event.listen(engine, "connect", _require_standard_strings)
    return engine


def _require_standard_strings(driver: Any, _: object) -> None:
    """Our statements have backslashes in their strings, and so have those that pglast deparses."""
    if driver.get_parameter_status("standard_conforming_strings") == "off":
        raise RefusedError(
            "standard_conforming_strings is off for this role or database, so the server would misread"
            " chronos's statements; nothing was changed. Connect as a role that has it on: ALTER ROLE ... SET"
            " standard_conforming_strings = on"
        )


@contextmanager
def opened(engine: Engine) -> Iterator[Connection]:
    """A connection for the block; one that the server has closed is discarded silently."""
    conn = engine.connect()
    try:
        yield conn
    finally:
        discard(conn)


def discard(conn: Connection) -> None:
    """Close a connection, alive or dead; the server rolls back what it had not committed."""
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

    The driver does all the quoting, and the resulting text can be read, logged and run by psql.
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
    """Run one statement, or several separated by semicolons, in the open transaction."""
    return conn.exec_driver_sql(render(conn, query), execution_options={"no_parameters": True})


@contextmanager
def transaction(conn: Connection, *, lock_timeout_ms: int = 0) -> Iterator[Connection]:
    """One transaction with UTC, no row filtering and the given ``lock_timeout`` (0: none).

    READ COMMITTED, whatever the default of the role or database: what is read after waiting for a lock must
    be current.

    Its search path is pg_catalog alone: we write each name with its schema, and so does the server. The
    settings are local to the transaction, so a pooler that reuses the server connection does not see them.
    """
    with conn.begin():
        begin(conn, lock_timeout_ms=lock_timeout_ms)
        yield conn


def begin(conn: Connection, *, lock_timeout_ms: int = 0) -> None:
    """The settings of ``transaction``, for one that is already open and has done nothing yet."""
    execute(conn, session_settings(lock_timeout_ms))


def session_settings(lock_timeout_ms: int = 0) -> Statement:
    """What ``transaction`` begins with."""
    return statement(
        # The path first: until then the role's own applies, where somebody else's functions may come first.
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL search_path = pg_catalog, pg_temp;\n"
        "SELECT set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO', true),"
        " set_config('row_security', 'off', true), set_config('statement_timeout', '0', true),"
        " set_config('idle_in_transaction_session_timeout', '0', true),"
        " set_config('lock_timeout', {timeout}, true), {no_timeout}",
        timeout=str(lock_timeout_ms),
        no_timeout=no_transaction_timeout(),
    )


def no_transaction_timeout() -> Statement:
    """Disable transaction_timeout, which servers before 17 do not have, for this transaction."""
    return statement(
        "CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL"
        " THEN set_config('transaction_timeout', '0', true) END"
    )


def application_path() -> Statement:
    """For moving rows: functions in the table's checks may rely on the role's own search path.

    It comes after pg_catalog, so that nobody's operator or function takes precedence over the ones we mean.
    """
    return statement("SELECT {setting}", setting=application_path_setting())


def application_path_setting() -> Statement:
    """The expression that sets what ``application_path`` sets, safe under any search path."""
    return statement(
        "pg_catalog.set_config('search_path', pg_catalog.concat('pg_catalog, ', (SELECT reset_val"
        " FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) 'search_path')), true)"
    )


def our_path() -> Statement:
    """Back to that of ``transaction``."""
    return statement("SELECT set_config('search_path', 'pg_catalog, pg_temp', true)")


@contextmanager
def autocommit(conn: Connection) -> Iterator[Connection]:
    """For the block, each message to the server is its own transaction: one round trip, not three.

    A message of several statements is also one transaction, in which local settings apply.
    """
    with conn.begin():
        driver: Any = conn.connection.dbapi_connection
        driver.autocommit = True
        try:
            yield conn
        finally:
            with suppress(psycopg2.Error):  # the connection may be gone
                driver.autocommit = False


def sqlstate(error: BaseException) -> str | None:
    """The server's five-character code of a driver error, None for anything else."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return original.pgcode if isinstance(original, psycopg2.Error) else None


def is_lock_failure(error: BaseException) -> bool:
    """Whether a transaction failed because it got no lock, so that a retry may succeed."""
    # How Citus reports that another node failed to do its part, whether for a lock or a connection.
    if "failure on connection marked as essential" in str(error):
        return True
    return sqlstate(error) in (errorcodes.LOCK_NOT_AVAILABLE, errorcodes.DEADLOCK_DETECTED)


def is_disconnect(error: BaseException) -> bool:
    """Whether the server went away or closed the connection, as opposed to rejecting a statement."""
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


# Conflicts, exhausted resources, a lock, operator intervention, system errors.
_PASSING = ("40", "53", "55", "57", "58")


def may_pass(error: BaseException) -> bool:
    """Whether the same statement may succeed later: see _PASSING, or the connection was lost."""
    return is_disconnect(error) or (sqlstate(error) or "")[:2] in _PASSING


def one_line(error: BaseException) -> str:
    """The first line of a driver error, without the statement and its values."""
    original = error.orig if isinstance(error, DBAPIError) else error
    lines = str(original).strip().splitlines()
    return lines[0].strip() if lines else type(original).__name__
