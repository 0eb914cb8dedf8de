"""Compare a day's rows in the old table with its partition: how many they are, and a hash of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import Statement, execute, name, statement
from chronos.migration.state import DayResult, State
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
        fence=state.fence,
    )


def compare_history_day(
    conn: Connection, shape: TableShape, state: State, day: date, *, content: bool
) -> DayResult:
    """Compare a partition that nobody but us has written: it holds the day's rows and no other.

    ``content`` false counts only. One statement, so one snapshot; ACCESS SHARE on both tables.
    """
    return _result(
        execute(
            conn,
            statement(
                "SELECT * FROM (SELECT count(*), {old_hash} {old_rows}) o,"
                " (SELECT count(*), {new_hash} FROM {leaf} AS n) n",
                old_hash=shape.content_hash("o") if content else _NO_HASH,
                new_hash=shape.content_hash("n") if content else _NO_HASH,
                old_rows=old_rows(shape, state, day, "o"),
                leaf=name(shape.schema, partition_name(day)),
            ),
        ).one(),
        content=content,
    )


def compare_live_day(
    conn: Connection, shape: TableShape, state: State, day: date, *, content: bool
) -> DayResult:
    """Compare a partition that the application writes too: is each old row in it, as it was?

    Rows that the application itself has written, changed or deleted since the swap are its own
    business and left out on both sides: new ones have no counterpart, the keys of others are noted.
    """
    untouched = (
        ' AND NOT EXISTS (SELECT FROM {changes} AS c WHERE c.id = {a}.id AND c."timestamp" = {a}."timestamp")'
    )
    changes = name(shape.schema, CHANGES_TABLE)
    leaf = name(shape.schema, partition_name(day))
    return _result(
        execute(
            conn,
            statement(
                "SELECT * FROM (SELECT count(*), {old_hash} {old_rows}{old_untouched}) o,"
                " (SELECT count(*), {new_hash} FROM {leaf} AS n WHERE n.id <= {fence}"
                '  AND EXISTS (SELECT {old_rows} AND o.id = n.id AND o."timestamp" = n."timestamp")'
                "  {new_untouched}) n",
                old_hash=shape.content_hash("o") if content else _NO_HASH,
                new_hash=shape.content_hash("n") if content else _NO_HASH,
                old_rows=old_rows(shape, state, day, "o"),
                old_untouched=statement(untouched, changes=changes, a=name("o")),
                new_untouched=statement(untouched, changes=changes, a=name("n")),
                leaf=leaf,
                fence=state.fence,
            ),
        ).one(),
        content=content,
    )


def _result(row: Sequence[int], *, content: bool) -> DayResult:
    old_count, old_hash, new_count, new_hash = row
    return DayResult(
        old_rows=old_count,
        new_rows=new_count,
        hash_equal=old_hash == new_hash if content else None,
    )


def matches(result: DayResult) -> bool:
    """Whether nothing was found to differ."""
    return result.old_rows == result.new_rows and result.hash_equal is not False
