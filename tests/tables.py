"""Inspect the tables of a test database: their rows, their definitions, who is waiting."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import connection
from sqlalchemy.engine import make_url

from tests.waiting import wait_until


@contextmanager
def connected(url: str, *, autocommit: bool = True) -> Iterator[connection]:
    """A plain psycopg2 connection, to check independently what chronos did."""
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    conn = psycopg2.connect(dsn)
    conn.autocommit = autocommit
    try:
        yield conn
    finally:
        conn.close()


def query(url: str, text: str, *values: Any) -> list[tuple[Any, ...]]:
    """The rows of one query."""
    with connected(url) as conn, conn.cursor() as cursor:
        cursor.execute(text, values or None)
        return cursor.fetchall() if cursor.description else []


def value(url: str, text: str, *values: Any) -> Any:
    """The single value that one query returns."""
    [[found]] = query(url, text, *values)
    return found


def relations(url: str) -> set[tuple[str, str]]:
    """Every user relation and function: (kind, name)."""
    return set(
        query(
            url,
            "SELECT c.relkind::text, format('%I.%I', n.nspname, c.relname) FROM pg_class c"
            " JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
            " UNION SELECT 'function', p.oid::regprocedure::text FROM pg_proc p"
            " JOIN pg_namespace n ON n.oid = p.pronamespace"
            " WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'",
        )
    )


def dump(url: str, pg_bin: Path) -> str:
    """``pg_dump -s`` of the database, without the random key that newer versions add."""
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    found = subprocess.run(
        [pg_bin / "pg_dump", "--schema-only", dsn], capture_output=True, text=True, check=True
    )
    return re.sub(r"^\\(un)?restrict .*$", "", found.stdout, flags=re.MULTILINE)


def digest(url: str, table: str = "webhook_log", where: str = "true") -> tuple[int, int, int]:
    """Rows, distinct ids and a hash of the contents of a table."""
    [found] = query(
        url,
        "SELECT count(*), count(DISTINCT id), coalesce(bit_xor(hash_record_extended(ROW(id, request_headers,"
        " request_body, response_headers, response_body, status, status_code, extract(epoch FROM timestamp),"
        f" webhook_endpoint_id), 0)), 0) FROM {table} t WHERE {where}",
    )
    return found[0], found[1], found[2]


@contextmanager
def holding(url: str, statement: str) -> Iterator[connection]:
    """An open transaction that has run ``statement``; it ends with the block."""
    with connected(url, autocommit=False) as conn:
        with conn.cursor() as cursor:
            cursor.execute(statement)
        yield conn
        conn.rollback()


def waiting_pid(url: str, table: str) -> int:
    """The pid of a chronos backend waiting for a lock on ``table``, once there is one."""
    [[pid]] = wait_until(
        lambda: query(
            url,
            "SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE NOT l.granted AND a.application_name LIKE 'chronos%%' AND l.relation = to_regclass(%s)"
            " LIMIT 1",
            table,
        ),
        30,
        f"chronos waits for {table}",
    )
    assert isinstance(pid, int)
    return pid


def exists(url: str, table: str) -> bool:
    """Whether a relation of this name exists."""
    return bool(value(url, "SELECT to_regclass(%s) IS NOT NULL", table))


def planned(url: str, what: str) -> datetime:
    """An instant fixed by the migration's plan: ``started_at``, ``cutoff``, ``first`` or ``end``."""
    found = value(url, "SELECT (plan ->> %s)::timestamptz FROM webhook_log_migration", what)
    assert isinstance(found, datetime)
    return found


# A session that reaches the gate waits until it is opened: an advisory lock, as no lock_timeout is set while
# rows are copied.
_GATE = """
CREATE FUNCTION passes_gate(bigint) RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock_shared(4711, 1); RETURN true; END $$;
CREATE FUNCTION at_the_gate() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock_shared(4711, 1); RETURN NEW; END $$;
"""


@contextmanager
def closed_gate(url: str) -> Iterator[Callable[[], None]]:
    """Keep the gate closed, see ``gate_in_the_copy``; the yielded function opens it."""
    with ExitStack() as closed:
        closed.enter_context(holding(url, "SELECT pg_advisory_xact_lock(4711, 1)"))
        yield closed.close


def gate_in_the_copy(url: str, days: int = 10) -> int:
    """Put a gate, a check that waits, before the last row of the day ``days`` + 1 days ago.

    With one worker, newer days are copied by then. Returns the row's id.
    """
    query(url, _GATE)
    gated = value(
        url,
        "SELECT id FROM webhook_log WHERE timestamp < date_trunc('day', now() - %s * interval '1 day', 'UTC')"
        " ORDER BY timestamp DESC, id DESC LIMIT 1",
        days,
    )
    query(
        url,
        f"ALTER TABLE webhook_log ADD CONSTRAINT gate CHECK (CASE id WHEN {gated} THEN passes_gate(id)"
        " ELSE true END)",
    )
    assert isinstance(gated, int)
    return gated


def gate_before_the_last_word(url: str) -> None:
    """Put a gate after the swap, before the record that earlier writes have since been compared."""
    query(
        url,
        _GATE + "CREATE TRIGGER gate BEFORE UPDATE ON webhook_log_migration FOR EACH ROW"
        " WHEN (NEW.verified) EXECUTE FUNCTION at_the_gate()",
    )


def pid_at_the_gate(url: str) -> int:
    """The pid of the session waiting at the gate, once there is one."""
    [[pid]] = wait_until(
        lambda: query(
            url,
            "SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database"
            " WHERE locktype = 'advisory' AND NOT granted AND classid = 4711"
            " AND datname = current_database()",
        ),
        30,
        "a session waits at the gate",
    )
    assert isinstance(pid, int)
    return pid
