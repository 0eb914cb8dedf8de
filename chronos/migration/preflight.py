"""Look before anything is changed: what stands in the way, by name, and what to type about it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import execute, joined, name, statement
from chronos.migration import state as migration_state
from chronos.migration.swap import CHANGES_TABLE, DEFAULT_PARTITION, NEW_TABLE, renames
from chronos.migration.table_shape import TableShape
from chronos.migration.table_shape import read as read_shape
from chronos.partitions import (
    DAYS_AHEAD,
    DAYS_BACK,
    OLD_TABLE,
    TABLE,
    desired,
    midnight,
    partition_name,
)

COMMAND = "python -m chronos.scripts.migrate_to_partitioned_webhook_log"


@dataclass(frozen=True)
class Survey:
    """What was found: the table, the server's clock, and every blocker.

    ``now`` is the database's; the window is what lies less than 15 days before it.
    """

    schema: str
    now: datetime
    rows_estimate: int
    bytes: int
    shape: TableShape | None
    blockers: tuple[str, ...]
    silent_triggers: bool

    @property
    def today(self) -> date:
        """The UTC day of the server's clock."""
        return self.now.date()

    @property
    def cutoff(self) -> datetime:
        """The oldest instant whose rows are copied."""
        return self.now - timedelta(days=DAYS_BACK)


def locate(conn: Connection) -> str | None:
    """The schema of webhook_log: first by the connection's own search path, then wherever there is just one.

    None when there is no such table, nor one that a half-done migration has renamed.
    """
    with conn.begin():
        rows = execute(
            conn,
            statement(
                "SELECT n.nspname, pg_table_is_visible(c.oid) FROM pg_class c"
                " JOIN pg_namespace n ON n.oid = c.relnamespace"
                " WHERE c.relname IN ({table}, {state}) AND c.relkind IN ('r', 'p')"
                " AND n.nspname !~ '^pg_' GROUP BY 1, 2 ORDER BY 2 DESC, 1",
                table=TABLE,
                state=migration_state.STATE_TABLE,
            ),
        ).all()
    if rows and (rows[0][1] or len({row[0] for row in rows}) == 1):
        schema: str = rows[0][0]
        return schema
    return None


def survey(conn: Connection, schema: str) -> Survey:
    """Examine ``schema.webhook_log`` inside a transaction that changes nothing.

    ACCESS SHARE on the table while rows without a place are looked for. ``shape`` is None when there
    is no plain table to speak of.
    """
    now, version, in_recovery = execute(
        conn,
        statement("SELECT now(), current_setting('server_version_num')::int, pg_is_in_recovery()"),
    ).one()
    blockers: list[str] = []
    if version < 150000:
        blockers.append(f"PostgreSQL 15 or later is needed, this server is {version // 10000}")
    if in_recovery:
        blockers.append("this server is a standby; connect to the primary")

    kind = execute(
        conn,
        statement(
            "SELECT c.relkind::text, c.relpersistence::text, c.relispartition, c.oid::bigint,"
            " greatest(c.reltuples, 0)::bigint, pg_total_relation_size(c.oid),"
            " EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid OR inhrelid = c.oid)"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = {schema} AND c.relname = {table}",
            schema=schema,
            table=TABLE,
        ),
    ).one_or_none()
    blockers += _half_done(conn, schema)
    if kind is None:
        blockers.append(f"there is no table {TABLE} in schema {schema}")
    elif kind[0] == "p":
        blockers.append(f"{TABLE} is partitioned already; see python -m chronos status")
    elif kind[0] != "r" or kind[2] or kind[6] or kind[1] != "p":
        blockers.append(
            f"{TABLE} is no ordinary table (unlogged, temporary, a view or part of an inheritance)"
        )
    if kind is None or kind[0] != "r":
        return Survey(schema, now, 0, 0, None, tuple(blockers), False)

    shape = read_shape(conn, schema, TABLE)
    today = now.date()
    blockers += _names_taken(conn, shape, today)
    blockers += _rights(conn, shape)
    blockers += _columns_and_keys(conn, shape)
    if not blockers:
        blockers += _dependents(conn, shape)
        blockers += _rows_without_a_place(conn, shape, today)
    return Survey(
        schema=schema,
        now=now,
        rows_estimate=kind[4],
        bytes=kind[5],
        shape=shape,
        blockers=tuple(blockers),
        silent_triggers=_has_user_triggers(conn, shape),
    )


def _exists(conn: Connection, schema: str, *tables: str) -> list[str]:
    rows = execute(
        conn,
        statement(
            "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = {schema} AND c.relname IN ({tables}) ORDER BY 1",
            schema=schema,
            tables=joined([sql.Literal(t) for t in tables]),
        ),
    ).all()
    return [row[0] for row in rows]


def _half_done(conn: Connection, schema: str) -> list[str]:
    found = migration_state.read(conn, schema)
    if found is not None and found.phase is migration_state.Phase.MIGRATED:
        return [f"{TABLE} is migrated already; see python -m chronos status"]
    if found is not None:
        return [
            f"a migration begun at {found.started_at:%Y-%m-%d %H:%M} UTC is half done ({found.phase});"
            f" carry on with: {COMMAND} --resume; or undo it with: python -m chronos rollback"
        ]
    if _exists(conn, schema, OLD_TABLE):
        return [
            f"Table {OLD_TABLE} already exists: an earlier migration or somebody's copy. Look at it"
            f" (\\d {OLD_TABLE}); if it is not needed, rename or drop it and start again"
        ]
    return []


def _names_taken(conn: Connection, shape: TableShape, today: date) -> list[str]:
    wanted = [
        NEW_TABLE,
        DEFAULT_PARTITION,
        CHANGES_TABLE,
        *map(partition_name, desired(today)),
        *(temporary for _, _, aside, built in renames(shape) for temporary in (aside, built)),
    ]
    return [
        f"the name {taken} is taken and the migration needs it; rename or drop that object"
        for taken in _exists(conn, shape.schema, *wanted)
    ]


def _rights(conn: Connection, shape: TableShape) -> list[str]:
    user, owns, creates = execute(
        conn,
        statement(
            "SELECT current_user, pg_has_role({owner}, 'USAGE'), has_schema_privilege({schema}, 'CREATE')",
            owner=shape.owner,
            schema=shape.schema,
        ),
    ).one()
    blockers = []
    if not owns:
        blockers.append(
            f"role {user} does not own {TABLE}; connect as its owner {shape.owner} or a member of it"
        )
    if not creates:
        blockers.append(
            f"role {user} may not create tables in schema {shape.schema};"
            f" GRANT CREATE ON SCHEMA {shape.schema} TO {user}"
        )
    for key in shape.foreign_keys:
        may = execute(
            conn,
            statement(
                "SELECT has_any_column_privilege(format('%I.%I', {s}, {t}), 'REFERENCES')",
                s=key.schema,
                t=key.table,
            ),
        ).scalar_one()
        if not may:
            blockers.append(
                f"role {user} may not refer to {key.table};"
                f" GRANT REFERENCES ON {key.schema}.{key.table} TO {user}"
            )
    return blockers


def _columns_and_keys(conn: Connection, shape: TableShape) -> list[str]:
    blockers = []
    types = {column.name: column.type for column in shape.columns}
    if types.get("id") not in ("smallint", "integer", "bigint"):
        blockers.append(f"{TABLE} needs a column id of an integer type")
    if not types.get("timestamp", "").startswith("timestamp"):
        blockers.append(f"{TABLE} needs a column timestamp of type timestamp or timestamptz")
    if blockers:
        return blockers
    valid = [index for index in shape.indexes if index.valid]
    for column, why in (("timestamp", "takes the batches"), ("id", "finds the highest id")):
        if not any(i.columns[0] == column and " WHERE " not in i.body for i in valid):
            blockers.append(
                f"no index begins with {column}, by which the migration {why};"
                f' CREATE INDEX CONCURRENTLY ON {shape.schema}.{TABLE} ("{column}")'
            )
    for index in shape.indexes:
        key = set(index.columns)
        if index.primary and key not in ({"id"}, {"id", "timestamp"}):
            blockers.append(f"the primary key {index.name} is neither (id) nor (id, timestamp)")
        elif not index.primary and index.unique and "timestamp" not in key:
            blockers.append(
                f"the unique index {index.name} does not hold the timestamp,"
                " and a partitioned table cannot keep it; drop it, or make it not unique"
            )
        if not index.valid:
            blockers.append(f"index {index.name} is invalid; drop it or REINDEX it")
        if index.constraint and index.constraint.startswith("EXCLUDE"):
            blockers.append(f"the exclusion constraint of {index.name} cannot be partitioned")
    blockers += [
        f"the foreign key {key.name} is not validated;"
        f' ALTER TABLE {shape.schema}.{TABLE} VALIDATE CONSTRAINT "{key.name}"'
        for key in shape.foreign_keys
        if not key.validated
    ]
    return blockers


# What hangs on the table and would be left behind without a word. Each row is a sentence to print.
_DEPENDENTS = """
SELECT format('table %s has a foreign key (%s) to webhook_log, whose id alone will not be unique;'
              ' drop it first', conrelid::regclass, conname)
FROM pg_constraint WHERE confrelid = {oid} AND contype = 'f' AND conrelid <> {oid}
UNION ALL
SELECT format('the foreign key %s of webhook_log refers to webhook_log itself; drop it first', conname)
FROM pg_constraint WHERE confrelid = {oid} AND contype = 'f' AND conrelid = {oid}
UNION ALL
SELECT DISTINCT format('%s %s reads webhook_log and would go on reading the old table; drop it,'
              ' and create it again after the migration',
              CASE c.relkind WHEN 'm' THEN 'materialized view' ELSE 'view' END, c.oid::regclass)
FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class c ON c.oid = r.ev_class
WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
  AND d.refobjid = {oid} AND c.oid <> {oid}
UNION ALL
SELECT format('rule %s on webhook_log would be left behind; drop it first', rulename)
FROM pg_rewrite WHERE ev_class = {oid}
UNION ALL
SELECT format('trigger %s on webhook_log would be left behind; drop it,'
              ' and create it again after the migration', tgname)
FROM pg_trigger WHERE tgrelid = {oid} AND NOT tgisinternal
UNION ALL
SELECT format('row level security is on for webhook_log and would be left behind; disable it first')
FROM pg_class WHERE oid = {oid} AND (relrowsecurity OR relforcerowsecurity)
UNION ALL
SELECT format('policy %s on webhook_log would be left behind; drop it first', polname)
FROM pg_policy WHERE polrelid = {oid}
UNION ALL
SELECT format('publication %s publishes webhook_log; take the table out of it,'
              ' and add it after the migration', pubname)
FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = {oid}
UNION ALL
SELECT format('extended statistics %s on webhook_log would be left behind; drop them first', stxname)
FROM pg_statistic_ext WHERE stxrelid = {oid}
UNION ALL
SELECT 'the replica identity of webhook_log is not the default and would be left behind;'
       ' ALTER TABLE webhook_log REPLICA IDENTITY DEFAULT first'
FROM pg_class WHERE oid = {oid} AND relreplident <> 'd'
UNION ALL
SELECT format('the check constraint %s is not validated;'
              ' ALTER TABLE webhook_log VALIDATE CONSTRAINT %I', conname, conname)
FROM pg_constraint WHERE conrelid = {oid} AND contype = 'c' AND NOT convalidated
"""


def _dependents(conn: Connection, shape: TableShape) -> list[str]:
    return [row[0] for row in execute(conn, statement(_DEPENDENTS, oid=shape.oid)).all()]


def _has_user_triggers(conn: Connection, shape: TableShape) -> bool:
    found: bool = execute(
        conn,
        statement(
            "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = {oid} AND NOT tgisinternal)",
            oid=shape.oid,
        ),
    ).scalar_one()
    return found


def _rows_without_a_place(conn: Connection, shape: TableShape, today: date) -> list[str]:
    """Rows whose timestamp no partition takes, and that are not simply too old to be copied."""
    end = midnight(today + timedelta(days=DAYS_AHEAD + 1))
    blockers = []
    for what, condition in (
        ("is NULL", statement('"timestamp" IS NULL')),
        ("is infinite", statement("\"timestamp\" IN ('infinity', '-infinity')")),
        (
            f"lies beyond the newest partition ({end:%Y-%m-%d})",
            statement('"timestamp" >= {end} AND "timestamp" <> \'infinity\'', end=shape.instant(end)),
        ),
    ):
        rows, example, value = execute(
            conn,
            statement(
                'SELECT count(*), min(id), (array_agg("timestamp"::text ORDER BY id))[1]'
                " FROM {table} WHERE {condition}",
                table=name(shape.schema, TABLE),
                condition=condition,
            ),
        ).one()
        if rows:
            shown = f", {value}" if value else ""
            blockers.append(
                f"the timestamp of {rows:,} row{'s' if rows > 1 else ''} {what}"
                f" (for example id {example}{shown}); correct or delete them"
            )
    return blockers
