"""Partitions by the catalog's bounds: which are attached, which are missing, which have expired."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy.engine import Connection

from chronos.db import execute, statement
from chronos.table import Interval, Period, TableSpec, midnight

_BEGINNING = datetime.min.replace(tzinfo=UTC)
_END = datetime.max.replace(tzinfo=UTC)
# The furthest ahead that the create function goes.
_TEN_YEARS = 3650
_NEWEST_FEW = 3


@dataclass(frozen=True)
class Partition:
    """One attached partition, from the catalog.

    ``lower`` and ``upper`` (UTC; ``upper`` is exclusive) are None for a bound that is not a time:
    MINVALUE, MAXVALUE, or the default partition, which has neither.
    """

    name: str
    lower: datetime | None
    upper: datetime | None
    detach_pending: bool
    rows_estimate: int
    bytes: int
    schema: str


# pg_get_expr prints timestamptz bounds in the session's zone; db.transaction() pins UTC and ISO. A bound
# names no column, so printing it needs no relation, and no lock on one.
_BOUNDS = r"""
    SELECT to_timestamp(extract(epoch FROM bound[1]::timestamp)) AS lower,
           to_timestamp(extract(epoch FROM bound[2]::timestamp)) AS upper
    FROM regexp_match(
        pg_get_expr(c.relpartbound, '0'::oid),
        '^FOR VALUES FROM \((?:''(\d[^'']*)''|MINVALUE)\) TO \((?:''(\d[^'']*)''|MAXVALUE)\)$') AS bound
"""

_ATTACHED = f"""
SELECT c.relname,
       m.lower,
       m.upper,
       i.inhdetachpending,
       greatest(c.reltuples, 0)::bigint,
       coalesce(pg_total_relation_size(c.oid), 0),
       n.nspname
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN LATERAL ({_BOUNDS}) m ON true
WHERE i.inhparent = to_regclass({{table}})
ORDER BY m.lower NULLS LAST, c.relname
"""


def attached(conn: Connection, spec: TableSpec, table: str | None = None) -> list[Partition]:
    """The partitions of ``spec``, or of ``table`` beside it, oldest first.

    Call it inside ``db.transaction``. ACCESS SHARE on each partition, for its size.
    """
    qualified = execute(
        conn, statement("SELECT format('%I.%I', {s}, {t})", s=spec.home, t=table or spec.name)
    )
    rows = execute(conn, statement(_ATTACHED, table=qualified.scalar_one())).all()
    return [Partition(*row) for row in rows]


@dataclass(frozen=True)
class Detached:
    """A former partition that retention has detached.

    ``drop_on`` is the UTC day on which it is dropped: its grace is over and its last row has expired. None:
    it was changed since then, and stays. ``upper`` is where it ended (UTC, exclusive).
    """

    name: str
    schema: str
    bytes: int
    drop_on: date | None
    upper: datetime | None = None


# The same rule as in sql/partition_functions.sql, where it is explained.
_DETACHED = r"""
SELECT c.relname, n.nspname, coalesce(pg_total_relation_size(c.oid), 0), o.told[1], o.told[2]
FROM format('chronos: detached from %I.%I, to be dropped on ', {schema}, {table}) AS mark
JOIN pg_description d ON d.classoid = 'pg_class'::regclass AND d.objsubid = 0
JOIN pg_class c ON c.oid = d.objoid
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class t ON t.oid = to_regclass(format('%I.%I', {schema}, {table}))
LEFT JOIN LATERAL (
    SELECT told
    FROM regexp_match(
        substr(d.description, length(mark) + 1),
        '^(\d{{4}}-\d\d-\d\d) with all before (\d{{4}}-\d\d-\d\d [\d:.]+) UTC \(table (\d+)\);') AS told
    WHERE c.xmin = d.xmin AND told[3] = c.oid::text
      AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid)
) AS o ON true
WHERE starts_with(d.description, mark) AND c.relkind IN ('r', 'p') AND NOT c.relispartition
  AND pg_has_role(c.relowner, t.relowner, 'MEMBER')
ORDER BY 4, 1
"""


def detached(conn: Connection, spec: TableSpec) -> list[Detached]:
    """The former partitions of ``spec`` that retention has detached, in the order of their drop.

    Call it inside ``db.transaction``. ACCESS SHARE on each, for its size.
    """
    found = []
    for table, schema, size, day, upper in execute(
        conn, statement(_DETACHED, schema=spec.home, table=spec.name)
    ).all():
        drop_on = until = None
        with suppress(TypeError, ValueError):
            until = datetime.fromisoformat(upper).replace(tzinfo=UTC)
            drop_on = max(date.fromisoformat(day), expires_on(until, spec.retention_days) or date.min)
        found.append(Detached(table, schema, size, drop_on, until))
    return found


_COLUMN = """
SELECT a.attname
FROM pg_partitioned_table p
LEFT JOIN pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = p.partattrs[0] AND p.partnatts = 1
WHERE p.partrelid = to_regclass({table}) AND p.partstrat = 'r'
"""

_WIDTHS = f"""
SELECT m.lower, m.upper
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
CROSS JOIN LATERAL ({_BOUNDS}) m
WHERE i.inhparent = to_regclass({{table}}) AND m.lower IS NOT NULL AND m.upper IS NOT NULL
ORDER BY m.lower DESC
"""


def scheme(conn: Connection, spec: TableSpec) -> tuple[str | None, list[Interval]]:
    """The column that a table is partitioned by, and the intervals of its newest partitions, newest first.

    A partition that is not exactly one period of any interval is ignored. (None, []) for a plain table. Call
    it inside ``db.transaction``; only catalog locks.
    """
    table = statement("format('%I.%I', {s}, {t})", s=spec.home, t=spec.name)
    column = execute(conn, statement(_COLUMN, table=table)).scalar_one_or_none()
    widths: list[Interval] = []
    for lower, upper in execute(conn, statement(_WIDTHS, table=table)):
        widths += (every for every in Interval if every.floor(lower) == lower and every.next(lower) == upper)
        if len(widths) == _NEWEST_FEW:
            break
    return column, widths


def _covered(existing: Iterable[Partition]) -> list[tuple[datetime, datetime]]:
    """The time covered by partitions, as ranges that neither overlap nor touch, oldest first."""
    ranges: list[tuple[datetime, datetime]] = []
    for lower, upper in sorted(
        (p.lower or _BEGINNING, p.upper or _END)
        for p in existing
        if not p.detach_pending and (p.lower or p.upper)  # the default partition covers no time
    ):
        if ranges and lower <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(upper, ranges[-1][1]))
        else:
            ranges.append((lower, upper))
    return ranges


def missing(existing: Iterable[Partition], wanted: Iterable[Period]) -> list[Period]:
    """The wanted periods that existing partitions do not cover completely."""
    covered = _covered(existing)
    return [w for w in wanted if not any(lower <= w.start and w.end <= upper for lower, upper in covered)]


def expired(existing: Iterable[Partition], today: date, retention_days: int | None) -> list[Partition]:
    """The partitions whose last instant lies before the day that is ``retention_days`` old; none for None."""
    if retention_days is None:
        return []
    cutoff = midnight(today - timedelta(days=retention_days))
    return [p for p in existing if p.upper is not None and p.upper <= cutoff]


def expires_on(upper: datetime, retention_days: int | None) -> date | None:
    """The first day on which a partition that ends at ``upper`` has expired; None when it never does."""
    if retention_days is None:
        return None
    last = (upper.astimezone(UTC) - timedelta(microseconds=1)).date()
    return last + timedelta(days=retention_days + 1)


def droppable(existing: Iterable[Partition], today: date, retention_days: int | None) -> list[Partition]:
    """The expired partitions that the drop function drops: not the newest, nor one detached half-way."""
    bounded = [p for p in existing if not p.detach_pending and (p.lower or p.upper)]
    newest = max(bounded, key=lambda p: p.upper or _END, default=None)
    return [p for p in expired(bounded, today, retention_days) if p is not newest]


def runway(existing: Iterable[Partition], spec: TableSpec, now: datetime) -> int:
    """For how many whole days after today every row has a partition; 0 when the current period has none.

    At most ten years, the furthest ahead that the create function goes.
    """
    current = spec.period(now)
    for lower, upper in _covered(existing):
        if lower <= current.start and current.end <= upper:
            ahead = (upper - midnight(now.astimezone(UTC).date())).days - 1
            return min(max(ahead, 0), _TEN_YEARS)
    return 0
