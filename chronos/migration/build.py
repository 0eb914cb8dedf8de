"""Build the partitioned table beside the plain one, and start noting what is written to the plain one.

Nobody uses the new table yet. Creating the note triggers takes a lock that waits for every open writer. So
once they are committed, all earlier writes are committed too: what the copy then reads, plus the notes, is
everything.
"""

from __future__ import annotations

from chronos.catalog.ddl import (
    attach_statements,
    leaf_statements,
    parent_statements,
    state_grants,
)
from chronos.catalog.shape import TableShape
from chronos.db import Statement, execute, joined, statement, transaction
from chronos.locks import lock_table
from chronos.migration import state as states
from chronos.migration.changes import change_log_statements, note_trigger_statements
from chronos.migration.context import Direction, Migration
from chronos.migration.state import Phase, State, create_statement, phase_statement
from chronos.table import Period


def parent_and_log_statements(shape: TableShape, state: State) -> list[Statement]:
    """The partitioned table without partitions, the notes without triggers on the table in use, the state."""
    return [
        *parent_statements(shape, state.plan.renames),
        *change_log_statements(shape, state.plan),
        create_statement(state),
        *state_grants(shape),
    ]


def begin_notes_statements(shape: TableShape) -> list[Statement]:
    """The note triggers on the table in use, under SHARE ROW EXCLUSIVE: writers wait for a moment."""
    spec = shape.spec
    return [
        lock_table(spec.home, spec.name, "SHARE ROW EXCLUSIVE"),
        *note_trigger_statements(shape, spec.name, Direction.FORWARD),
        phase_statement(spec, Phase.COPYING),
    ]


def build_parent(migration: Migration) -> None:
    """Step 1: the partitioned table, then the triggers that note every write from now on.

    SHARE ROW EXCLUSIVE on the table in use for the triggers, in short attempts. Raises
    LockUnavailableError.
    """
    shape, state, conn = migration.shape, migration.state, migration.conn
    with transaction(conn):
        execute(conn, joined(parent_and_log_statements(shape, state), ";\n"))
        states.read(conn, migration.table)  # fails now, before the commit, on what could not be read later
    begin_notes(migration)


def begin_notes(migration: Migration) -> None:
    """Start noting what is written to the table in use; see ``build_parent``."""
    locks = migration.locks(attempts=None)
    tables = [(migration.table.home, migration.table.name)]
    for attempt in locks.attempts(migration.conn, tables):
        with attempt as conn:
            migration.claim(conn)
            execute(conn, joined(begin_notes_statements(migration.shape), ";\n"))
    migration.note(locks)
    migration.refresh()


def leaves_statements(shape: TableShape, periods: list[Period], empty_from: Period | None) -> list[Statement]:
    """The partitions: bare and detached, or, from ``empty_from`` on, indexed and attached."""
    statements: list[Statement] = []
    for period in periods:
        empty = empty_from is not None and period >= empty_from
        statements += leaf_statements(shape, period, indexes=empty)
        if empty:
            statements += attach_statements(shape, period, checked=False)
    return statements


def build_partitions(migration: Migration) -> bool:
    """Step 2: a partition for each period. Those after the newest row stay empty and are attached at once.

    Returns whether there was anything to build.
    """
    shape, conn = migration.shape, migration.conn
    with transaction(conn):
        migration.claim(conn)
        if _built(migration):
            return False
        newest = execute(
            conn,
            statement(
                "SELECT max({c}) FROM {table}",
                c=shape.time_column,
                table=migration.relation(migration.table.name),
            ),
        ).scalar_one()
        periods = migration.plan.periods
        empty = [period for period in periods if newest is None or _after(migration, period, newest)]
        execute(conn, joined(leaves_statements(shape, periods, empty[0] if empty else None), ";\n"))
    return True


def _after(migration: Migration, period: Period, newest: object) -> bool:
    """Whether ``period`` begins after the newest row. The server compares, as it also knows infinity."""
    found: bool = execute(
        migration.conn,
        statement("SELECT {start} > {newest}", start=migration.shape.instant(period.start), newest=newest),
    ).scalar_one()
    return found


def _built(migration: Migration) -> bool:
    found: bool = execute(
        migration.conn,
        statement(
            "SELECT to_regclass(format('%I.%I', {schema}, {leaf})) IS NOT NULL",
            schema=migration.table.home,
            leaf=migration.table.partition(migration.plan.periods[0]),
        ),
    ).scalar_one()
    return found


def pending_periods(migration: Migration) -> list[Period]:
    """The periods whose partition is not attached yet."""
    with transaction(migration.conn):
        rows = execute(
            migration.conn,
            statement(
                "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = to_regclass(format('%I.%I', {schema}, {new}))",
                schema=migration.table.home,
                new=migration.table.new,
            ),
        ).all()
    attached = {row[0] for row in rows}
    return [p for p in migration.plan.periods if migration.table.partition(p) not in attached]
