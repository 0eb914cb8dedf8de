"""Compare a day's rows in the old table with its partition: how many they are, and what is in them."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

from psycopg2 import sql
from sqlalchemy.engine import Connection, CursorResult

from chronos.db import Statement, execute, joined, name, statement
from chronos.migration.state import STATE_TABLE, DayResult, State
from chronos.migration.swap import CHANGES_TABLE
from chronos.migration.table_shape import TableShape
from chronos.partitions import OLD_TABLE, midnight, partition_name

_NO_HASH = sql.SQL("0")


def old_rows(shape: TableShape, state: State, day: date, alias: str) -> Statement:
    """FROM and WHERE of the rows that the old table contributes to ``day``."""
    lower = max(state.cutoff, midnight(day))
    return statement(
        'FROM {old} AS {a} WHERE {a}."timestamp" >= {lower} AND {a}."timestamp" < {upper}'
        " AND {a}.id <= {fence}",
        old=name(shape.schema, OLD_TABLE),
        a=name(alias),
        lower=shape.instant(lower),
        upper=shape.instant(midnight(day + timedelta(days=1))),
        fence=fence(shape, state),
    )


def fence(shape: TableShape, state: State) -> Statement:
    """The highest id that the old table had at the swap; before that, where it will be found."""
    if state.fence is None:
        return statement("(SELECT fence FROM {state})", state=name(shape.schema, STATE_TABLE))
    return sql.Literal(state.fence)


def beyond_the_fence(conn: Connection, schema: str, state: State) -> int:
    """How many rows were written to the old table after the swap: none, unless somebody did on purpose."""
    found: int = execute(
        conn,
        statement(
            "SELECT count(*) FROM {old} WHERE id > {fence}", old=name(schema, OLD_TABLE), fence=state.fence
        ),
    ).scalar_one()
    return found


def compare_history_day(
    conn: Connection, shape: TableShape, state: State, day: date, *, content: bool
) -> DayResult:
    """Compare a partition that nobody but us has written: it holds the day's rows and no other.

    ``content`` false counts only. One statement, so one snapshot; ACCESS SHARE on both tables.
    """
    # In the order of their timestamps both are read once, side by side; to hash or to sort a day of
    # large rows would spill it to the disk.
    execute(
        conn,
        statement(
            "SELECT set_config(setting, 'off', true)"
            " FROM unnest(ARRAY['enable_hashjoin', 'enable_seqscan', 'enable_bitmapscan', 'jit']) AS setting"
            " WHERE {content}",
            content=content,
        ),
    )
    return _result(execute(conn, history_comparison(shape, state, day, content=content)))


def history_comparison(shape: TableShape, state: State, day: date, *, content: bool) -> Statement:
    """Whether ``day`` is in the old table as it is in its partition, which is not attached yet.

    One row: ``old_rows``, ``new_rows``, and ``equal``, whether each row has its like on the other
    side, byte for byte (NULL when only counted).
    """
    old = old_rows(shape, state, day, "o")
    leaf = name(shape.schema, partition_name(day))
    if not content:
        return statement(
            "SELECT (SELECT count(*) {old}) AS old_rows, (SELECT count(*) FROM {leaf}) AS new_rows,"
            " NULL::boolean AS equal",
            old=old,
            leaf=leaf,
        )
    columns = [name(column.name) for column in shape.columns]
    return statement(
        "SELECT old_rows, new_rows, alike = old_rows AND alike = new_rows AS equal FROM (\n"
        " SELECT count(o.id), count(n.id),"
        " count(*) FILTER (WHERE record_image_eq(ROW({old_columns}), ROW({new_columns})))\n"
        ' FROM (SELECT {columns} {old} ORDER BY "timestamp", id) AS o\n'
        ' FULL JOIN (SELECT {columns} FROM {leaf} ORDER BY "timestamp", id) AS n'
        ' ON o."timestamp" = n."timestamp" AND o.id = n.id\n'
        ") AS c (old_rows, new_rows, alike)",
        columns=joined(columns),
        old_columns=joined([statement("o.{c}", c=column) for column in columns]),
        new_columns=joined([statement("n.{c}", c=column) for column in columns]),
        old=old,
        leaf=leaf,
    )


def compare_live_day(
    conn: Connection, shape: TableShape, state: State, day: date, *, content: bool
) -> DayResult:
    """Compare a partition that the application writes too: is each old row in it, as it was?

    Rows that the application itself has written, changed or deleted since the swap are its own
    business and left out on both sides: new ones have no counterpart, the keys of others are noted.
    """
    return _result(execute(conn, live_comparison(shape, state, day, content=content)))


def live_comparison(shape: TableShape, state: State, day: date, *, content: bool) -> Statement:
    """The same for a day whose partition the application writes, by a hash of its rows."""
    untouched = (
        ' AND NOT EXISTS (SELECT FROM {changes} AS c WHERE c.id = {a}.id AND c."timestamp" = {a}."timestamp")'
    )
    changes = name(shape.schema, CHANGES_TABLE)
    leaf = name(shape.schema, partition_name(day))
    return statement(
        "SELECT old_rows, new_rows, {equal} AS equal\n"
        " FROM (SELECT count(*), {old_hash} {old_rows}{old_untouched}) AS o (old_rows, old_hash),\n"
        " (SELECT count(*), {new_hash} FROM {leaf} AS n WHERE n.id <= {fence}"
        ' AND EXISTS (SELECT {old_rows} AND o.id = n.id AND o."timestamp" = n."timestamp")'
        "{new_untouched}) AS n (new_rows, new_hash)",
        equal=sql.SQL("old_hash = new_hash" if content else "NULL::boolean"),
        old_hash=shape.content_hash("o") if content else _NO_HASH,
        new_hash=shape.content_hash("n") if content else _NO_HASH,
        old_rows=old_rows(shape, state, day, "o"),
        old_untouched=statement(untouched, changes=changes, a=name("o")),
        new_untouched=statement(untouched, changes=changes, a=name("n")),
        leaf=leaf,
        fence=fence(shape, state),
    )


def _result(rows: CursorResult[*tuple[Any, ...]]) -> DayResult:
    old_count, new_count, equal = rows.one()
    return DayResult(old_rows=old_count, new_rows=new_count, hash_equal=equal)


def matches(result: DayResult) -> bool:
    """Whether nothing was found to differ."""
    return result.old_rows == result.new_rows and result.hash_equal is not False
