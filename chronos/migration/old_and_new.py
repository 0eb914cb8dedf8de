"""What finalize reports about the two tables before it drops one."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.engine import Connection

from chronos.db import execute, statement
from chronos.table import TableSpec, quoted

_WEIGHT = """
SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint,
       coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint
FROM pg_class c, to_regclass(format('%I.%I', {schema}, {table})) AS t
WHERE c.relkind = 'r' AND (c.oid = t OR c.oid IN (SELECT relid FROM pg_partition_tree(t)))
"""


def weigh(conn: Connection, table: TableSpec) -> tuple[datetime, dict[str, tuple[int, int]]]:
    """The server's clock, and rows (as the planner estimates them) and bytes (with indexes and TOAST) of the
    old table and of the new one. Call it inside ``db.transaction``; ACCESS SHARE on both.
    """
    now: datetime = execute(conn, statement("SELECT now()")).scalar_one()
    found = {}
    for relation in (table.old, table.name):
        row = execute(conn, statement(_WEIGHT, schema=table.home, table=relation)).one()
        found[relation] = (row[0], row[1])
    return now, found


_ELSEWHERE = """
SELECT n.nspname, c.relname
FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace pn ON pn.oid = p.pronamespace
WHERE t.tgname = {trigger} AND t.tgparentid = 0 AND pn.nspname = {schema} AND p.proname = {function}
  AND c.relkind = 'r' AND NOT c.relispartition
  AND (n.nspname, c.relname) NOT IN (({schema}, {table}), ({schema}, {old}))
"""


def renamed_by_hand(conn: Connection, table: TableSpec) -> str | None:
    """What to do when the old table, recognized by the migration's note triggers, has another name; None:
    there is no such table. Call it inside ``db.transaction``.
    """
    row = execute(
        conn,
        statement(
            _ELSEWHERE,
            trigger=table.note_triggers[0],
            function=table.note_function,
            schema=table.home,
            table=table.name,
            old=table.old,
        ),
    ).first()
    if row is None:
        return None
    back = [
        f" ALTER TABLE {TableSpec(row[1], schema=row[0]).typed} RENAME TO {quoted(table.old)};",
        f" ALTER TABLE {TableSpec(table.old, schema=row[0]).typed} SET SCHEMA {quoted(table.home)};",
    ]
    return (
        f"{quoted(table.old)} was renamed to {TableSpec(row[1], schema=row[0]).typed}. Rename it back:"
        f"{back[0] if row[1] != table.old else ''}{back[1] if row[0] != table.home else ''}"
    )
