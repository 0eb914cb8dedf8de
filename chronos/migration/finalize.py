"""The end of a migration: make sure that nothing needs the old table, then drop it and what else is left."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy.engine import Connection, Engine

from chronos.catalog.ddl import sequences_back_statements
from chronos.catalog.shape import TableShape
from chronos.catalog.shape import read as read_shape
from chronos.commands import finalize as finalize_command
from chronos.commands import migrate as migrate_command
from chronos.commands import rollback as rollback_command
from chronos.commands import status as status_command
from chronos.db import Statement, execute, joined, name, statement, transaction
from chronos.errors import ChronosError, RefusedError
from chronos.locks import lock_table
from chronos.migration import attach
from chronos.migration import state as states
from chronos.migration.changes import (
    drop_log_statement,
    drop_trigger_statements,
    truncated,
    written_by_hand,
)
from chronos.migration.context import Migration, match, read_plain
from chronos.migration.obstacles import require_no_citus
from chronos.migration.old_and_new import renamed_by_hand
from chronos.migration.operator import Operator, asking, resumable_with, sole_operator
from chronos.migration.state import (
    Phase,
    Plan,
    State,
    finalized_by_hand,
    phase_statement,
    take_over,
    undone_by_hand,
)
from chronos.results import FinalizeResult
from chronos.table import Period, TableSpec, midnight

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
    engine: Engine,
    table: TableSpec,
    operator: Operator,
    confirm: Callable[[State, bool], None],
) -> FinalizeResult:
    """Drop the old table, once nothing needs it any more.

    Refuses unless the migration is complete, the new table holds every row of the old one within
    retention, and nothing depends on the old table. ``confirm`` gets the state and whether the old table
    still exists; it raises RefusedError to call it off.
    """
    retention_days, began = table.retention_days, time.monotonic()
    with sole_operator(engine, table) as (conn, table):
        with transaction(conn):
            found = states.read(conn, table)
            if found is None or found.phase not in (Phase.MIGRATED, Phase.FINALIZING):
                raise RefusedError(_why_not(table, found))
            require_no_citus(conn, table)
            if undone_by_hand(conn, found):
                raise RefusedError(
                    f"{table} was put back by hand; nothing was changed."
                    f" Tidy up with: {rollback_command(table)}"
                )
            there = not finalized_by_hand(conn, found)
            renamed = None if there or found.plan.attaches else renamed_by_hand(conn, table)
            if renamed is not None:
                raise RefusedError(f"nothing was changed: {renamed}")
            shape = read_plain(conn, found) if there and not found.plan.attaches else None
            if found.plan.attaches:
                _require_verified(found)
            if shape is not None and found.phase is Phase.MIGRATED:
                _require_dispensable(conn, shape, found, retention_days)
        with asking(conn, table):
            confirm(found, there)
        with transaction(conn):
            found = take_over(conn, found)
            # The operator may have taken long to answer, and retention may have run meanwhile.
            if shape is not None and found.phase is Phase.MIGRATED:
                _require_dispensable(conn, shape, found, retention_days)
        with resumable_with(finalize_command(table), "clean-up", engine, table):
            finalize(engine, conn, operator, found, shape)
        stays = found.plan.attaches and there
        done = f"{table.history} stays a partition" if stays else f"{found.plan.former} is dropped"
        operator.output.ok(f"{done}; {table} stands on its own")
        dropped = TableSpec(table.old, schema=table.home).typed if shape is not None else None
        return FinalizeResult(table, dropped, time.monotonic() - began)


def _is_ours(conn: Connection, table: TableSpec) -> bool:
    """Whether the old table still has the note triggers that the migration created."""
    found: bool = execute(
        conn,
        statement(
            "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgname = {trigger}"
            " AND tgrelid = to_regclass(format('%I.%I', {schema}, {old})))",
            trigger=table.note_triggers[0],
            schema=table.home,
            old=table.old,
        ),
    ).scalar_one()
    return found


def _why_not(table: TableSpec, found: State | None) -> str:
    if found is None:
        return f"there is no migration of {table} to finalize; nothing was changed"
    return f"the migration is not complete ({found.phase}); nothing was changed. See: {status_command(table)}"


def _late(table: TableSpec, rows: int) -> str:
    return (
        f"{rows:,} rows of {table.old} were written after the swap. Check whether {table} has them, and"
        f" insert any that are missing; then: DELETE FROM {table.changes} WHERE chronos_origin = 'o'"
    )


def _require_verified(found: State) -> None:
    if not found.verified:
        what = "rows written during the migration were not compared yet"
        if found.plan.attaches:
            what = "foreign keys of the partitions are not yet adopted by the partitioned table"
        raise RefusedError(
            f"the {what}; nothing was changed. Carry on with: {migrate_command(found.table)} --resume"
        )


def _require_dispensable(conn: Connection, old: TableShape, found: State, retention_days: int | None) -> None:
    table = found.table
    _require_verified(found)
    dependents = what_depends_on(conn, old)
    if dependents:
        raise RefusedError(
            f"{table.old} is still needed by {', '.join(dependents)}; nothing was changed."
            " Drop or redefine that first"
        )
    if late := written_by_hand(conn, table):
        raise RefusedError(f"{_late(table, late)}; nothing was changed")
    lost = missing_rows(conn, old, found, retention_days)
    if lost:
        some = ", ".join(f"{period} ({count:,})" for period, count in sorted(lost.items())[:3])
        raise RefusedError(
            f"{sum(lost.values()):,} rows of {table.old} within retention are not in {table}: {some};"
            f" nothing was changed. Bring them back with: {rollback_command(table)}; or, if they were meant"
            " to go, lower retention_days, or delete them there"
        )


def what_depends_on(conn: Connection, shape: TableShape) -> list[str]:
    """What would break or be dropped too if the old table were dropped, as PostgreSQL names it."""
    return sorted({row[0] for row in execute(conn, statement(_BLOCKING, oid=shape.oid)).all()})


def missing_rows(
    conn: Connection, shape: TableShape, state: State, retention_days: int | None
) -> dict[Period, int]:
    """Per period, the rows of the old table that the new one should still hold and does not.

    Days beyond retention may be gone. A row that the application deleted or moved to another time since the
    swap is noted, and does not count as missing. ACCESS SHARE only.
    """
    plan, table = state.plan, state.table
    oldest = plan.first
    if retention_days is not None:
        today = execute(conn, statement("SELECT now()")).scalar_one().date()
        oldest = midnight(today.fromordinal(today.toordinal() - retention_days))
    found: dict[Period, int] = {}
    for period in [] if truncated(conn, table) else plan.periods:
        if period.start < oldest:
            continue
        count = execute(
            conn,
            statement(
                "SELECT count(*) FROM {old} AS o WHERE o.{c} >= {lower} AND o.{c} < {upper}"
                " AND NOT EXISTS (SELECT FROM {new} AS n WHERE {same}"
                "  AND n.{c} >= {lower} AND n.{c} < {upper})"
                " AND NOT EXISTS (SELECT FROM {changes} AS c WHERE {noted})",
                old=name(table.home, table.old),
                new=name(table.home, table.name),
                changes=name(table.home, table.changes),
                c=shape.time_column,
                lower=shape.instant(max(plan.cutoff, period.start)),
                upper=shape.instant(period.end),
                same=match(plan.new_key, "n", "o"),
                noted=match(plan.new_key, "c", "o"),
            ),
        ).scalar_one()
        if count:
            found[period] = count
    return found


def _own_sequences(plan: Plan) -> list[Statement]:
    """Once there is no way back: the partitioned table owns its sequences."""
    return sequences_back_statements(plan.table, [s for s in plan.sequences if not s.identity])


def finalize(
    engine: Engine, conn: Connection, operator: Operator, state: State, old: TableShape | None
) -> None:
    """Drop the old table, give its sequence to the new one and clear the state; safe to call again.

    ``old`` is None when somebody has dropped the table already. Each step is a transaction of its own:
    ACCESS EXCLUSIVE on the table in use to drop the triggers, for a moment.
    """
    table = state.table
    home = table.home
    locks = operator.locks()
    if state.plan.attaches:
        with transaction(conn):
            shape = read_shape(conn, table, table.name)
        attach.drop_leftover(Migration(engine, conn, operator, state, shape))
        with transaction(conn):
            states.claim(conn, table, state.run_id)
            for query in _own_sequences(state.plan):
                execute(conn, query)
    elif state.phase is not Phase.FINALIZING:
        for attempt in locks.attempts(conn, [(home, table.name)]):
            with attempt:
                states.claim(conn, table, state.run_id)
                execute(conn, lock_table(home, table.name, "ACCESS EXCLUSIVE"))
                statements = [
                    *drop_trigger_statements(table, table.name),
                    *_own_sequences(state.plan),
                    phase_statement(table, Phase.FINALIZING),
                ]
                execute(conn, joined(statements, ";\n"))
    if old is not None:
        for attempt in locks.attempts(conn, [(home, table.old)]):
            with attempt:
                states.claim(conn, table, state.run_id)
                execute(conn, lock_table(home, table.old, "ACCESS EXCLUSIVE"))
                if not _is_ours(conn, table):
                    raise ChronosError(f"{table.old} is not the table that was migrated: rename it")
                if late := written_by_hand(conn, table):
                    raise ChronosError(_late(table, late))
                if needed_by := what_depends_on(conn, old):
                    raise ChronosError(
                        f"{table.old} is still needed by {', '.join(needed_by)}; drop that first"
                    )
                execute(conn, statement("DROP TABLE {old}", old=name(home, table.old)))
    for attempt in locks.attempts(conn, [(home, table.changes), (home, table.state)]):
        with attempt:
            states.claim(conn, table, state.run_id)
            execute(conn, drop_log_statement(state.plan))
