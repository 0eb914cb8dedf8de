"""What Citus manages, in a database that has Citus."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from chronos.db import execute, statement

# Only an extension created by a superuser can put a table into pg_catalog.
_IS_THERE = "SELECT to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL"

_MANAGES = """
SELECT CASE WHEN partmethod = 'n' THEN 'local' ELSE 'distributed' END FROM pg_catalog.pg_dist_partition
WHERE logicalrelid = to_regclass(format('%I.%I', {schema}, {table}))
"""

# undistribute_table leaves the sequence of a table among the objects that Citus manages.
_OBSTACLES = """
SELECT CASE WHEN c.relkind = 'S'
            THEN format('Citus manages the sequence %s, so it cannot be altered; after undistribute_table'
                        ' of its table: SELECT citus_unmark_object_distributed(''pg_class''::regclass,'
                        ' %L::regclass, 0, false);', c.oid::regclass, c.oid::regclass)
            ELSE format('Citus manages the table %s; while it does, its name and rows cannot be swapped:'
                        ' SELECT undistribute_table(%L, cascade_via_foreign_keys => true);',
                        c.oid::regclass, c.oid::regclass) END
FROM pg_class c
WHERE (EXISTS (SELECT FROM pg_catalog.pg_dist_partition WHERE logicalrelid = c.oid)
       OR EXISTS (SELECT FROM pg_catalog.pg_dist_object
                  WHERE classid = 'pg_class'::regclass AND objid = c.oid))
  AND (c.oid IN (to_regclass(format('%I.%I', {schema}, {table})),
                 to_regclass(format('%I.%I', {schema}, {old})),
                 to_regclass(format('%I.%I', {schema}, {new})))
       OR c.relkind = 'S' AND c.oid IN (
           SELECT s.refobjid FROM pg_attrdef a
           JOIN pg_depend s ON s.classid = 'pg_attrdef'::regclass AND s.objid = a.oid
                           AND s.refclassid = 'pg_class'::regclass
           WHERE a.adrelid IN (to_regclass(format('%I.%I', {schema}, {table})),
                               to_regclass(format('%I.%I', {schema}, {old})))))
ORDER BY c.relkind = 'S', 1
"""


def is_there(conn: Connection) -> bool:
    """Whether this database has Citus."""
    found: bool = execute(conn, statement(_IS_THERE)).scalar_one()
    return found


def manages(conn: Connection, schema: str, table: str) -> str | None:
    """What the table is to Citus: `distributed`, `local` if Citus only tracks it, None if it is unknown.

    Call it inside ``db.transaction``; no lock.
    """
    if not is_there(conn):
        return None
    found: str | None = execute(conn, statement(_MANAGES, schema=schema, table=table)).scalar()
    return found


_SIZES = """
SELECT c.relname::text, coalesce(pg_catalog.citus_total_relation_size(c.oid, false), 0)
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = to_regclass(format('%I.%I', {schema}, {table}))
"""


def sizes(conn: Connection, schema: str, table: str) -> dict[str, int]:
    """The bytes of each partition of a table that Citus manages, on all nodes. In ``db.transaction``."""
    rows = execute(conn, statement(_SIZES, schema=schema, table=table)).all()
    return dict(rows)


def obstacles(conn: Connection, schema: str, table: str, old: str, new: str) -> list[str]:
    """Which of the three tables and of their sequences Citus manages, and what to type about it.

    Call it inside ``db.transaction``; no lock.
    """
    if not is_there(conn):
        return []
    query = statement(_OBSTACLES, schema=schema, table=table, old=old, new=new)
    return [row[0] for row in execute(conn, query).all()]
