"""A partitioned webhook_log with the two functions, quickly created by plain SQL without a migration."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

from psycopg2 import sql
from psycopg2.extensions import cursor

from chronos.functions import installation
from chronos.table import WEBHOOK_LOG, TableSpec, midnight

_TABLES = """
CREATE TABLE webhook_endpoint (id bigint PRIMARY KEY, url text NOT NULL);
INSERT INTO webhook_endpoint VALUES (1, 'https://example.com');
CREATE TABLE webhook_log (
    id bigserial,
    request_headers jsonb,
    request_body jsonb,
    response_headers jsonb,
    response_body jsonb,
    status text NOT NULL,
    status_code integer,
    "timestamp" {type} NOT NULL,
    webhook_endpoint_id bigint REFERENCES webhook_endpoint,
    PRIMARY KEY (id, "timestamp")
) PARTITION BY RANGE ("timestamp");
CREATE INDEX ON webhook_log ("timestamp");
"""


def run(cur: cursor, text: str | sql.Composable, *values: Any) -> list[tuple[Any, ...]]:
    """The rows of one statement; empty when it returns none."""
    cur.execute(text, values or None)
    return cur.fetchall() if cur.description else []


def column(cur: cursor, text: str | sql.Composable, *values: Any) -> list[Any]:
    """The first column of the rows of one statement."""
    return [row[0] for row in run(cur, text, *values)]


def today(cur: cursor) -> date:
    """The UTC day on which the transaction of ``cur`` began, which is also the functions' today."""
    [day] = column(cur, "SELECT (now() AT TIME ZONE 'UTC')::date")
    assert isinstance(day, date)
    return day


def leaf(day: date) -> str:
    """The name of the partition of ``day``."""
    return WEBHOOK_LOG.partition(WEBHOOK_LOG.period(midnight(day)))


def leaves(cur: cursor, first: int, last: int) -> list[str]:
    """The names of the partitions of the days ``first`` to ``last`` from today."""
    day = today(cur)
    return [leaf(day + timedelta(days=n)) for n in range(first, last + 1)]


def create_tables(cur: cursor, type_: str = "timestamptz", schema: str = "public") -> None:
    """Create the two tables, without partitions, and the functions, in ``schema``."""
    run(cur, sql.SQL("SET LOCAL search_path = {}, pg_temp").format(sql.Identifier(schema)))
    run(cur, _TABLES.format(type=type_))
    install_functions(cur, schema=schema)


def install_functions(cur: cursor, spec: TableSpec = WEBHOOK_LOG, schema: str = "public") -> None:
    """Install the two functions of a table in ``schema``; the search path is restored."""
    [(path, user)] = run(cur, "SELECT current_setting('search_path'), current_user")
    for part in installation(spec.located(schema), user):
        run(cur, part)
    run(cur, "SELECT set_config('search_path', %s, true)", path)


def add_partitions(cur: cursor, first: int, last: int, table: str = "webhook_log") -> None:
    """Add partitions for the days ``first`` to ``last`` from today."""
    day = today(cur)
    for n in range(first, last + 1):
        add_partition(cur, leaf(day + timedelta(days=n)), n, n + 1, table)


def add_partition(cur: cursor, name: str, first: int, end: int, table: str = "webhook_log") -> None:
    """Add a partition called ``name`` from the day ``first`` up to, but not including, the day ``end``."""
    day = today(cur)
    lower, upper = (f"{day + timedelta(days=n)} 00:00:00+00" for n in (first, end))
    run(cur, f"CREATE TABLE {name} PARTITION OF {table} FOR VALUES FROM ('{lower}') TO ('{upper}')")


def attached(cur: cursor, table: str = "webhook_log") -> list[str]:
    """The names of the partitions, in order of their bounds; the default partition first."""
    return column(
        cur,
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = %s::regclass AND NOT i.inhdetachpending"
        " ORDER BY pg_get_expr(c.relpartbound, c.oid)",
        table,
    )


def create(cur: cursor, days_ahead: int | None) -> list[str]:
    """Call the create function."""
    return column(cur, "SELECT create_future_webhook_log_partitions(%s)", days_ahead)


def drop(cur: cursor, retention_days: int | None) -> list[str]:
    """Call the drop function."""
    return column(cur, "SELECT drop_old_webhook_log_partitions(%s)", retention_days)
