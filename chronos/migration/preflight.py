"""Look before anything is changed: what stands in the way, by name, and what to type about it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import execute, joined, name, statement
from chronos.migration import state as migration_state
from chronos.migration.belongings import belongings, columns_and_keys
from chronos.migration.state import Phase, State
from chronos.migration.swap import CHANGES_TABLE, DEFAULT_PARTITION, LIVE_TABLE, NEW_TABLE, renames
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

    @property
    def today(self) -> date:
        """The UTC day of the server's clock."""
        return self.now.date()

    @property
    def cutoff(self) -> datetime:
        """The oldest instant whose rows are copied."""
        return self.now - timedelta(days=DAYS_BACK)


def first_state(found: Survey) -> State:
    """Where a migration of the table that was found begins: the window is fixed, once."""
    assert found.shape is not None
    return State(
        run_id=uuid.uuid4(),
        phase=Phase.BUILT,
        strategy="copy",
        started_at=found.now,
        cutoff=found.cutoff,
        today=found.today,
        first_day=found.today - timedelta(days=DAYS_BACK),
        last_day=found.today + timedelta(days=DAYS_AHEAD),
        fence=None,
        old_oid=found.shape.oid,
        new_oid=None,
        renames=renames(found.shape),
        sequences=list(found.shape.sequences),
    )


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
    half_done = _half_done(conn, schema)
    blockers += half_done
    if kind is None:
        blockers.append(f"there is no table {TABLE} in schema {schema}")
    elif kind[0] == "p":
        if not half_done:
            blockers.append(f"{TABLE} is partitioned already; see python -m chronos status")
    elif kind[0] != "r" or kind[2] or kind[6] or kind[1] != "p":
        blockers.append(
            f"{TABLE} is no ordinary table (unlogged, temporary, a view or part of an inheritance)"
        )
    if kind is None or kind[0] != "r":
        return Survey(schema, now, 0, 0, None, tuple(blockers))

    shape = read_shape(conn, schema, TABLE)
    today = now.date()
    blockers += _names_taken(conn, shape, today)
    blockers += _rights(conn, shape)
    blockers += columns_and_keys(shape)
    if not blockers:
        blockers += belongings(conn, shape, now - timedelta(days=DAYS_BACK))
        blockers += _rows_without_a_place(conn, shape, today)
    return Survey(
        schema=schema,
        now=now,
        rows_estimate=kind[4],
        bytes=kind[5],
        shape=shape,
        blockers=tuple(blockers),
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
        LIVE_TABLE,
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
