"""The end of a migration: make sure that nothing needs the old table, then drop it and every trace."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

from sqlalchemy.engine import Connection, Engine

from chronos.db import ShortTransactions, execute, name, statement, transaction
from chronos.errors import ChronosError, RefusedError
from chronos.migration import state as migration_state
from chronos.migration.operator import Operator, going_on_with, sole_operator
from chronos.migration.rollback import UNDO
from chronos.migration.state import (
    STATE_TABLE,
    Phase,
    State,
    claim,
    finalized_by_hand,
    take_over,
    undone_by_hand,
    update,
)
from chronos.migration.swap import CHANGES_FUNCTION, CHANGES_TABLE, LIVE_TABLE, NOTED_FUNCTION, lock_table
from chronos.migration.table_shape import CHANGE_TRIGGERS, TableShape
from chronos.migration.table_shape import read as read_shape
from chronos.migration.verify import beyond_the_fence, old_rows
from chronos.partitions import OLD_TABLE, TABLE, days, midnight

FINISH = "python -m chronos finalize"

_BLOCKING = """
SELECT pg_describe_object(d.classid, d.objid, d.objsubid)
FROM pg_depend d
LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
LEFT JOIN pg_constraint k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
WHERE d.refclassid = 'pg_class'::regclass
  AND d.refobjid = {oid}
  AND d.deptype = 'n'
  AND (r.oid IS NULL OR r.ev_class <> {oid})
  AND (k.oid IS NULL OR k.conrelid <> {oid})
  AND NOT (d.classid = 'pg_attrdef'::regclass
           AND EXISTS (SELECT FROM pg_attrdef a WHERE a.oid = d.objid AND a.adrelid = {oid}))
  AND NOT (d.classid = 'pg_policy'::regclass
           AND EXISTS (SELECT FROM pg_policy p WHERE p.oid = d.objid AND p.polrelid = {oid}))
  AND NOT (d.classid = 'pg_trigger'::regclass
           AND EXISTS (SELECT FROM pg_trigger t WHERE t.oid = d.objid AND t.tgrelid = {oid}))
ORDER BY 1
"""


def finish(
    engine: Engine, operator: Operator, confirm: Callable[[State, bool], None], retention_days: int
) -> None:
    """Drop webhook_log_old, once nothing needs it any more.

    Refuses unless the migration is complete, the new table holds every row of the old one that is
    not older than ``retention_days``, and nothing depends on the old table. ``confirm`` is told the
    state, and whether the old table is still there; it raises RefusedError to call it off.
    """
    with sole_operator(engine) as (conn, schema):
        with transaction(conn):
            found = migration_state.read(conn, schema)
            if found is None or found.phase not in (Phase.MIGRATED, Phase.FINALIZING):
                raise RefusedError(_why_not(found, OLD_TABLE))
            if undone_by_hand(conn, schema, found):
                raise RefusedError(f"{TABLE} was put back by hand; nothing was changed. Tidy up with: {UNDO}")
            old = None if finalized_by_hand(conn, schema, found) else read_shape(conn, schema, OLD_TABLE)
            if old is not None and found.phase is Phase.MIGRATED:
                _require_dispensable(conn, old, found, retention_days)
        confirm(found, old is not None)
        with transaction(conn):
            found = take_over(conn, schema, found)
        with going_on_with(FINISH, "clean-up", engine, schema):
            finalize(conn, old, schema, found, operator.short())
        operator.output.ok(f"{OLD_TABLE} is dropped; {TABLE} stands on its own")


def _why_not(found: State | None, old: str) -> str:
    if found is None:
        return f"there is no migration to finalize, {old} is none of ours; nothing was changed"
    return (
        f"the migration is not complete ({found.phase}); nothing was changed. See: python -m chronos status"
    )


def _require_dispensable(conn: Connection, old: TableShape, found: State, retention_days: int) -> None:
    dependents = what_depends_on(conn, old)
    if dependents:
        raise RefusedError(
            f"{OLD_TABLE} is still needed by {', '.join(dependents)}; nothing was changed."
            " Drop or redefine that first"
        )
    late = beyond_the_fence(conn, old.schema, found)
    if late:
        raise RefusedError(
            f"{late:,} rows were written to {OLD_TABLE} after the swap (ids above {found.fence});"
            f" nothing was changed. See whether {TABLE} has them, insert what it lacks, and delete them there"
        )
    lost = missing_rows(conn, old, found, retention_days)
    if lost:
        some = ", ".join(f"{day} ({count:,})" for day, count in sorted(lost.items())[:3])
        raise RefusedError(
            f"{sum(lost.values()):,} rows of {OLD_TABLE} within retention are not in {TABLE}: {some};"
            " nothing was changed. Find out who removed them before the old table goes"
        )


def what_depends_on(conn: Connection, shape: TableShape) -> list[str]:
    """What would break, or go along, if the old table were dropped, as PostgreSQL names it."""
    return sorted({row[0] for row in execute(conn, statement(_BLOCKING, oid=shape.oid)).all()})


def missing_rows(conn: Connection, shape: TableShape, state: State, retention_days: int) -> dict[date, int]:
    """Per day, the rows of the old table that the new one should still hold and does not.

    A day beyond retention may have gone. A row that the application has itself deleted or given
    another timestamp since the swap is noted in the change log, and not missed. ACCESS SHARE only.
    """
    today: date = execute(conn, statement("SELECT now()")).scalar_one().date()
    oldest_kept = today.toordinal() - retention_days
    found: dict[date, int] = {}
    for day in days(state.first_day, state.last_day):
        if day.toordinal() < oldest_kept:
            continue
        count = execute(
            conn,
            statement(
                "SELECT count(*) {old_rows}"
                ' AND NOT EXISTS (SELECT FROM {new} AS n WHERE n.id = o.id AND n."timestamp" = o."timestamp"'
                '  AND n."timestamp" >= {lower} AND n."timestamp" < {upper})'
                " AND NOT EXISTS (SELECT FROM {changes} AS c"
                '  WHERE c.id = o.id AND c."timestamp" = o."timestamp")',
                old_rows=old_rows(shape, state, day, "o"),
                new=name(shape.schema, TABLE),
                changes=name(shape.schema, CHANGES_TABLE),
                lower=shape.instant(midnight(day)),
                upper=shape.instant(midnight(date.fromordinal(day.toordinal() + 1))),
            ),
        ).scalar_one()
        if count:
            found[day] = count
    return found


def finalize(
    conn: Connection, old: TableShape | None, schema: str, state: State, short: ShortTransactions
) -> None:
    """Drop the old table, give its sequence to the new one and clear the state; safe to call again.

    ``old`` is None when somebody has dropped the table already. Each step is a transaction of its
    own: ACCESS EXCLUSIVE on webhook_log to take the triggers off, ACCESS EXCLUSIVE on the tables
    that the old one's foreign keys refer to, each for moments.
    """

    def let_go(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        execute(conn, lock_table(schema, TABLE, "ACCESS EXCLUSIVE"))
        for trigger in CHANGE_TRIGGERS:
            execute(
                conn,
                statement(
                    "DROP TRIGGER IF EXISTS {trigger} ON {table}",
                    trigger=name(trigger),
                    table=name(schema, TABLE),
                ),
            )
        for sequence in state.sequences:
            if not sequence.identity:
                execute(
                    conn,
                    statement(
                        "ALTER SEQUENCE {sequence} OWNED BY {column}",
                        sequence=name(sequence.schema, sequence.name),
                        column=name(schema, TABLE, sequence.column),
                    ),
                )
        update(conn, schema, phase=Phase.FINALIZING.value)

    if state.phase is not Phase.FINALIZING:
        short.run(conn, let_go, tables=[(schema, TABLE)])
    if old is not None:
        _drop_old(conn, old, state, short)

    def clear(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        execute(
            conn,
            statement(
                "DROP TABLE {changes}, {live}; DROP FUNCTION {noting}(), {noted}(bigint); DROP TABLE {state}",
                changes=name(schema, CHANGES_TABLE),
                live=name(schema, LIVE_TABLE),
                noting=name(schema, CHANGES_FUNCTION),
                noted=name(schema, NOTED_FUNCTION),
                state=name(schema, STATE_TABLE),
            ),
        )

    short.run(conn, clear, tables=[(schema, CHANGES_TABLE), (schema, STATE_TABLE)])


def _drop_old(conn: Connection, old: TableShape, state: State, short: ShortTransactions) -> None:
    """First the foreign keys, which tie other tables; then the table, which by then is nobody's business."""
    schema = old.schema
    referred = [(key.schema, key.table) for key in old.foreign_keys]
    table = name(schema, OLD_TABLE)

    def untie(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        # What is ours first: whoever still reads it must not make those wait who use the others.
        execute(conn, lock_table(schema, OLD_TABLE, "ACCESS EXCLUSIVE"))
        for referred_schema, referred_table in referred:
            execute(conn, lock_table(referred_schema, referred_table, "ACCESS EXCLUSIVE"))
        for key in old.foreign_keys:
            execute(
                conn,
                statement("ALTER TABLE {table} DROP CONSTRAINT {key}", table=table, key=name(key.name)),
            )

    def drop(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        execute(conn, lock_table(schema, OLD_TABLE, "ACCESS EXCLUSIVE"))
        if late := beyond_the_fence(conn, schema, state):
            raise ChronosError(f"{late:,} rows have just been written to {OLD_TABLE}")
        execute(conn, statement("DROP TABLE {table}", table=table))

    if referred:
        short.run(conn, untie, tables=[(schema, OLD_TABLE), *referred])
    short.run(conn, drop, tables=[(schema, OLD_TABLE)])
