"""Look at the tables of a test database: what rows there are, what shape they have, who is waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
from psycopg2.extensions import connection
from sqlalchemy.engine import make_url

from tests.waiting import wait_until


@contextmanager
def connected(url: str, *, autocommit: bool = True) -> Iterator[connection]:
    """A plain psycopg2 connection, for looking at what chronos did with other eyes."""
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
    """The one value of one query."""
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
    """The pid of a chronos backend that waits for a lock on ``table``, once there is one."""
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
    """Whether there is a relation of this name."""
    return bool(value(url, "SELECT to_regclass(%s) IS NOT NULL", table))
