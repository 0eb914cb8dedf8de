"""Compare both tables: period by period before the swap, the noted keys again after it.

A row may differ only if a note of it is still to be replayed. Such keys are left out on both sides, in the
same snapshot; their notes are replayed later, and the second comparison covers those keys. So no row is left
out of both.
"""

from __future__ import annotations

from datetime import datetime

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.catalog.partitions import attached
from chronos.db import Statement, execute, name, statement
from chronos.errors import ChronosError
from chronos.migration.context import Direction, Migration, match, names
from chronos.migration.state import PeriodResult
from chronos.table import Period


class VerificationError(ChronosError):
    """A copy differs from its source."""

    id = "verification-failed"


# Both are read once in time order, side by side; hashing or sorting a day of large rows would spill to disk.
_SIDE_BY_SIDE = """
SELECT set_config(setting, 'off', true)
FROM unnest(ARRAY['enable_hashjoin', 'enable_seqscan', 'enable_bitmapscan', 'jit']) AS setting
"""


def compare_period(conn: Connection, migration: Migration, period: Period, *, content: bool) -> PeriodResult:
    """Compare ``period`` of the plain table with its filled partition, which is not attached yet.

    ``content`` false only counts. One statement, so one snapshot; ACCESS SHARE on both tables.
    """
    if content:
        execute(conn, side_by_side_statement())
    return PeriodResult(*execute(conn, period_comparison(migration, period, content=content)).one())


def side_by_side_statement() -> Statement:
    """Settings for the transaction that compares contents."""
    return statement(_SIDE_BY_SIDE)


def period_comparison(migration: Migration, period: Period, *, content: bool) -> Statement:
    """The query of ``compare_period``: one row, the fields of PeriodResult."""
    return _comparison(
        migration,
        Direction.FORWARD,
        migration.relation(migration.table.name),
        migration.relation(migration.table.partition(period)),
        within(migration, period),
        content=content,
    )


def compare_newer_rows(conn: Connection, migration: Migration) -> PeriodResult:
    """On the way back: compare the rows beyond the fence in both tables; ACCESS SHARE on both."""
    fence = migration.state.fence
    assert fence is not None
    query = _comparison(
        migration,
        Direction.BACK,
        migration.relation(migration.table.name),
        migration.relation(migration.table.old),
        statement("{c} > {fence}", c=migration.shape.time_column, fence=migration.shape.instant(fence)),
        content=True,
    )
    return PeriodResult(*execute(conn, query).one())


def within(migration: Migration, period: Period) -> Statement:
    """The condition for the rows of ``period`` that lie in the window."""
    shape = migration.shape
    return statement(
        "{c} >= {lower} AND {c} < {upper}",
        c=shape.time_column,
        lower=shape.instant(max(migration.plan.cutoff, period.start)),
        upper=shape.instant(period.end),
    )


def _comparison(
    migration: Migration,
    direction: Direction,
    source: Statement,
    target: Statement,
    which: Statement,
    *,
    content: bool,
) -> Statement:
    """One row: how many rows each side has, and whether they match byte for byte (NULL if only counted).

    Left out are keys with notes still to be replayed and, on the way back, rows that somebody wrote into the
    plain table by hand, which stay there.
    """
    plan, key = migration.plan, migration.plan.new_key
    changes = migration.relation(plan.table.changes)
    columns = tuple(column.name for column in migration.shape.columns) if content else key

    def side(table: Statement) -> Statement:
        return statement(
            "SELECT {columns} FROM {table} AS t WHERE {which} AND NOT EXISTS (SELECT FROM {changes} AS c"
            " WHERE {origin}{same}){order}",
            columns=names(columns),
            table=table,
            which=which,
            changes=changes,
            origin=sql.SQL("")
            if direction is Direction.BACK
            else statement("c.chronos_origin = {origin} AND ", origin=direction.origin),
            same=match(key, "c", "t"),
            order=statement(" ORDER BY {c}, {key}", c=migration.shape.time_column, key=names(plan.old_key))
            if content
            else sql.SQL(""),
        )

    if not content:
        return statement(
            "SELECT (SELECT count(*) FROM ({old}) AS o), (SELECT count(*) FROM ({new}) AS n), NULL::boolean",
            old=side(source),
            new=side(target),
        )
    return statement(
        "SELECT old_rows, new_rows, alike = old_rows AND alike = new_rows FROM (\n"
        " SELECT count(o.{one}), count(n.{one}),"
        " count(*) FILTER (WHERE record_image_eq(ROW({old_columns}), ROW({new_columns})))\n"
        " FROM ({old}) AS o\n FULL JOIN ({new}) AS n ON {same}\n"
        ") AS c (old_rows, new_rows, alike)",
        one=name(key[0]),
        old_columns=names(columns, "o"),
        new_columns=names(columns, "n"),
        old=side(source),
        new=side(target),
        same=match((plan.table.column, *(c for c in key if c != plan.table.column)), "o", "n"),
    )


def require_equal(migration: Migration, period: Period, result: PeriodResult) -> None:
    """Raise VerificationError, naming the period, if the two differ."""
    if not result.equal:
        what = "the rows differ" if result.old_rows == result.new_rows else "rows are missing"
        raise VerificationError(
            f"verification failed for {period}: {what}"
            f" ({result.old_rows:,} in {migration.table.name}, {result.new_rows:,} in its copy)"
        )


def compare_replayed(conn: Connection, migration: Migration, one: str, other: str) -> int:
    """Compare the keys whose notes were replayed, in the relations ``one`` and ``other``; returns how many.

    Left out are keys that the application has since written in the partitioned table (they are noted), and
    rows that retention or a TRUNCATE has since removed. Raises VerificationError.
    """
    bounds = [p.lower for p in attached(conn, migration.table) if p.lower]
    oldest = max(migration.plan.cutoff, min(bounds, default=migration.plan.cutoff))
    row = execute(conn, replayed_comparison(migration, one, other, oldest)).one()
    if row[1]:
        raise VerificationError(
            f"verification failed: {row[1]:,} of {row[0]:,} rows that were written during the migration"
            f" differ between {one} and {other}, for example {row[2]}"
        )
    return int(row[0])


def replayed_comparison(
    migration: Migration, one: str, other: str, oldest: datetime | None = None
) -> Statement:
    """The query of ``compare_replayed``: how many keys there are, how many differ, and one that does."""
    plan, shape = migration.plan, migration.shape
    columns = tuple(column.name for column in shape.columns)
    keys = statement(
        "SELECT DISTINCT {key} FROM {replayed} AS r WHERE {c} >= {cutoff} AND NOT EXISTS ("
        "SELECT FROM {changes} AS c WHERE c.chronos_origin = 'n' AND (c.chronos_truncated OR {same}))",
        key=names(plan.new_key),
        replayed=migration.relation(plan.table.replayed),
        c=shape.time_column,
        cutoff=shape.instant(oldest or plan.cutoff),
        changes=migration.relation(plan.table.changes),
        same=match(plan.new_key, "c", "r"),
    )
    return statement(
        "SELECT count(*), count(*) FILTER (WHERE NOT same), (array_agg(shown) FILTER (WHERE NOT same))[1]"
        " FROM (SELECT coalesce(record_image_eq(a.found, b.found), a.found IS NULL AND b.found IS NULL),"
        " ROW({shown})::text FROM ({keys}) AS k"
        " LEFT JOIN LATERAL (SELECT ROW({one_columns}) FROM {one} AS o WHERE {one_same})"
        " AS a (found) ON true"
        " LEFT JOIN LATERAL (SELECT ROW({other_columns}) FROM {other} AS n WHERE {other_same})"
        " AS b (found) ON true) AS compared (same, shown)",
        shown=names(plan.new_key, "k"),
        keys=keys,
        one_columns=names(columns, "o"),
        one=migration.relation(one),
        one_same=match(plan.new_key, "o", "k"),
        other_columns=names(columns, "n"),
        other=migration.relation(other),
        other_same=match(plan.new_key, "n", "k"),
    )


def compare_and_note_statement(migration: Migration, period: Period) -> Statement:
    """For a script: compare the contents of ``period`` and record the result, both on the server."""
    return statement(
        "UPDATE {state} SET compared = compared || jsonb_build_object({start}::text,\n"
        " (SELECT jsonb_build_object('old_rows', old_rows, 'new_rows', new_rows, 'alike', alike) FROM (\n"
        "{comparison}\n) AS found (old_rows, new_rows, alike)))",
        state=migration.relation(migration.table.state),
        start=period.start.isoformat(),
        comparison=period_comparison(migration, period, content=True),
    )
