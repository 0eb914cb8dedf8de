"""What a migration takes, estimated before it begins: time, WAL and disk, for a copy and for an attach.

A short sample of the table's own rows shows how fast the server is; the cost of a row in those units was
fitted to measured migrations (``python -m bench``).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.catalog.partitions import expires_on
from chronos.catalog.shape import TableShape
from chronos.db import Statement, execute, joined, name, opened, statement, transaction
from chronos.migration import attach
from chronos.migration.checks import Finding, Survey, first_plan
from chronos.migration.compare import within
from chronos.migration.console import in_bytes
from chronos.migration.context import Migration
from chronos.migration.queries import OURS
from chronos.migration.state import Expected
from chronos.table import Period

_SAMPLE = 50_000
# What a row costs, in units of the time that this server takes to read and hash one, and to sort an index
# entry. Fitted to migrations of 1 million rows, of 200 bytes and of 1.1 kB, with 3 and with 7 indexes, on
# PostgreSQL 15 and 18, on quiet machines and on busy ones.
_COPY_READS, _COPY_SORTS = 0.76, 0.475
_ATTACH_READS, _ATTACH_SORTS = 0.035, 0.55
# Seconds: fixed, and for each partition.
_FIXED_S, _PARTITION_S = 0.1, 0.004
# WAL of an inserted row besides its values: record header, row header, alignment.
_ROW_WAL_BYTES = 68
# What index pages compress to in the WAL: keys of ascending numbers, and all others.
_COMPRESSED_NUMBERS, _COMPRESSED = 0.48, 0.74
# An entry of the new index is that of the old key plus the time, aligned.
_TIME_BYTES = 8
# Beyond these, a copy asks too much of a disk or a night to be the default.
_LARGE_BYTES = 100 * 2**30
_LONG_S = 3 * 3600


@dataclass(frozen=True)
class Pace:
    """How fast this server is, from a sample of the newest rows: seconds to read and hash one, seconds to
    sort an entry of an index, and the bytes of a row's values.
    """

    read_s: float
    sort_s: float
    row_bytes: float


def measure(migration: Migration) -> Pace | None:
    """Measure it here and now; None without rows.

    Over two connections at once, like the copy, so that other load counts as it will then. ACCESS SHARE,
    for a second or two.
    """
    shape = migration.shape
    ours = sql.SQL(OURS)
    sample = statement(
        "(SELECT * FROM {table} ORDER BY {c} DESC LIMIT {limit}) AS s",
        table=migration.relation(migration.table.name),
        c=shape.time_column,
        limit=_SAMPLE,
    )
    sizes = [statement("coalesce(pg_column_size({c}), 0)", c=name("s", c.name)) for c in shape.columns]
    sizing = statement(
        "SELECT {ours} count(*), avg({sizes}) FROM {sample}",
        ours=ours,
        sizes=joined(sizes, " + "),
        sample=sample,
    )
    rows, size = execute(migration.conn, sizing).one()
    if not rows:
        return None
    reading = statement("SELECT {ours} count(md5(s::text)) FROM {sample}", ours=ours, sample=sample)
    sorting = statement(
        "SELECT {ours} count(*) FROM"
        " (SELECT {key}, {c} FROM {sample} ORDER BY md5(format('%s', {key})) COLLATE \"C\" OFFSET 0) AS o",
        ours=ours,
        sample=sample,
        key=name("s", shape.old_key[0]),
        c=shape.time_column,
    )

    def timed(_: int) -> list[float]:
        with opened(migration.engine) as conn, transaction(conn):
            execute(conn, statement("SET TRANSACTION READ ONLY; SET LOCAL jit = off"))
            # The first run may wait for the disk; the copy does not, as it reads ahead.
            return [[_seconds(conn, query) for _ in range(2)][1] for query in (reading, sorting)]

    with ThreadPoolExecutor(2, "chronos") as pool:
        found = list(pool.map(timed, range(2)))
    read_s, sort_s = (sum(of_each) / len(found) / rows for of_each in zip(*found, strict=True))
    return Pace(read_s, sort_s, float(size))


def _seconds(conn: Connection, query: Statement) -> float:
    started = time.monotonic()
    execute(conn, query).all()
    return time.monotonic() - started


@dataclass(frozen=True)
class Way:
    """What one strategy takes: ``seconds``, ``bytes`` of disk and of ``wal``; ``facts`` are shown."""

    seconds: float
    bytes: float
    facts: dict[str, str]
    blockers: tuple[Finding, ...] = ()
    wal: float = 0.0


def expected_rows(migration: Migration) -> dict[Period, int]:
    """The planner's row estimate for each period; for a future period only if it has any row."""
    plan, conn = migration.plan, migration.conn
    found: dict[Period, int] = {}
    for period in plan.periods:
        rows = statement(
            "FROM {table} WHERE {within}",
            table=migration.relation(plan.table.name),
            within=within(migration, period),
        )
        explained = execute(conn, statement("EXPLAIN (FORMAT JSON) SELECT {rows}", rows=rows)).scalar_one()
        count = int(explained[0]["Plan"]["Plan Rows"])
        if period.start > plan.started_at:
            some = execute(conn, statement("SELECT EXISTS (SELECT {rows})", rows=rows)).scalar_one()
            count = max(count, 1) if some else 0
        if count:
            found[period] = count
    return found


def expected(migration: Migration, found: Survey) -> Expected:
    """What the migration that begins now will take with its strategy. Reads a sample: a second or two."""
    conn = migration.conn
    with transaction(conn):
        execute(conn, statement("SET TRANSACTION READ ONLY"))
        pace = measure(migration)
        rows = 0 if found.attaches else sum(expected_rows(migration).values())
        way = (by_attaching if found.attaches else by_copying)(conn, found, rows, pace)
    return Expected(rows, found.bytes, way.seconds, way.wal, way.bytes)


def by_copying(conn: Connection, found: Survey, rows: int, pace: Pace | None) -> Way:
    if found.blockers:
        return Way(0, 0, {}, found.blockers)
    table, shape = found.spec, found.shape
    assert shape is not None
    seconds = wal = 0.0
    size = rows * row_bytes(found, rows)
    if pace is not None:
        each = _COPY_READS * pace.read_s + _COPY_SORTS * pace.sort_s * len(shape.indexes)
        seconds = _FIXED_S + _PARTITION_S * found.partitions + rows * each
        indexes = execute(conn, statement("SELECT pg_indexes_size({oid}::oid)", oid=shape.oid)).scalar_one()
        index_bytes = indexes / max(found.rows_estimate, rows, 1) + _TIME_BYTES
        wal = rows * (pace.row_bytes + _ROW_WAL_BYTES + index_bytes)
    facts = {
        "rows copied": f"{rows:,}",
        "duration": f"about {_duration(seconds)}",
        "WAL": f"about {in_bytes(wal)}, and notes",
        "disk now": f"about {in_bytes(size)} more",
        "until": "finalize",
        "then": f"about {in_bytes(found.bytes - size)} less than today",
        f"by {table.every}": "at once",
        "one partition": "none",
        "locks before": "writers, for the triggers",
        "cut-over, ms": "last notes, renames",
    }
    return Way(seconds, size, facts, wal=wal)


def by_attaching(conn: Connection, found: Survey, counted: int, pace: Pace | None) -> Way:
    if found.blockers:
        return Way(0, 0, {}, found.blockers)
    table, rows, shape = found.spec, max(found.rows_estimate, counted), found.shape
    assert shape is not None
    assert shape.key_index is not None
    before = after = sorts = 0.0
    until = "nothing is added"
    if not attach.has_its_key(first_plan(found)):
        old, fill_factor = _size_of_index(conn, shape)
        before = after = old + rows * _TIME_BYTES * 100 / fill_factor
        until, sorts = f"{table.history} goes", _ATTACH_SORTS
        if shape.key_index.primary:
            after, until = before - old, "the swap"
    seconds = 0.0
    if pace is not None:
        seconds = _FIXED_S + _PARTITION_S * found.partitions
        seconds += rows * (_ATTACH_READS * pace.read_s + sorts * pace.sort_s)
    wal = before * (_compressed_to(shape) if _compresses(conn) else 1)
    goes = expires_on(found.first, table.retention_days)
    facts = {
        "rows copied": "none",
        "duration": f"about {_duration(seconds)}",
        "WAL": f"about {in_bytes(wal)}",
        "disk now": f"about {in_bytes(before)} more",
        "until": until,
        "then": f"about {in_bytes(after)} more",
        f"by {table.every}": f"from {found.first:%Y-%m-%d} on",
        "one partition": f"all before, {f'until {goes}' if goes else 'for good'}",
        "locks before": "everybody, for the CHECK",
        "cut-over, ms": "renames, primary key, ATTACH",
    }
    return Way(seconds, before, facts, wal=wal)


def _compressed_to(shape: TableShape) -> float:
    types = {column.name: column.type for column in shape.columns}
    numbers = all(types[column] in ("smallint", "integer", "bigint") for column in shape.old_key)
    return _COMPRESSED_NUMBERS if numbers else _COMPRESSED


def _compresses(conn: Connection) -> bool:
    """Whether the WAL of the index is compressed, by the server's setting or by ours for the build."""
    found: bool = execute(
        conn,
        statement(
            "SELECT current_setting('wal_compression') <> 'off' OR ({ours}) IS NOT NULL",
            ours=statement(attach.COMPRESSION),
        ),
    ).scalar_one()
    return found


def _size_of_index(conn: Connection, shape: TableShape) -> tuple[int, int]:
    """Bytes of the index of the key, and its fill factor in percent."""
    assert shape.key_index is not None
    size, fill_factor = execute(
        conn,
        statement(
            "SELECT pg_relation_size(oid), coalesce((SELECT option_value::int"
            " FROM pg_options_to_table(reloptions) WHERE option_name = 'fillfactor'), 90)"
            " FROM pg_class WHERE oid = to_regclass(format('%I.%I', {schema}, {index}))",
            schema=shape.schema,
            index=shape.key_index.name,
        ),
    ).one()
    return size, fill_factor


def recommended(copying: Way, attaching: Way) -> str:
    """Which strategy, and why; only the operator knows how much room the disk has."""
    if copying.blockers:
        return f"attach; a copy would be refused: {copying.blockers[0]}"
    if attaching.blockers:
        return f"copy; an attach would be refused: {attaching.blockers[0]}"
    room, takes = in_bytes(copying.bytes), _duration(copying.seconds)
    if copying.bytes > _LARGE_BYTES or copying.seconds > _LONG_S:
        return (
            f"attach, as a copy takes {room} of disk and about {takes}; if there is room and time, a copy"
            " puts every period into a partition of its own at once: --strategy copy"
        )
    return (
        "copy, as it puts every period into a partition of its own at once; if there is no room for"
        f" {room}: --strategy attach"
    )


def row_bytes(found: Survey, counted: int) -> float:
    """Bytes per row, indexes included; a table never analyzed has no row estimate."""
    return found.bytes / max(found.rows_estimate, counted, 1)


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{max(seconds, 1):.1f}".removesuffix(".0") + " s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
