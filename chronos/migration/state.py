"""The state of a migration, kept in the database: one row beside the table, gone when all is over.

Each transition is written in the transaction that makes it true, and only by the run that owns the
row: ``claim`` locks the table and compares the run's token, so that a run which was taken over, its
process dead but its last statement still going, cannot write another row. Batches of the copy hold the
table in ROW EXCLUSIVE mode. It is the table that is locked, not its row: there, who comes first is
served first, and batches that follow each other closely do not keep a claim waiting.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, field, replace
from datetime import date, datetime
from enum import StrEnum
from typing import Any

from psycopg2 import sql
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from chronos.db import Statement, execute, name, opened, statement, transaction
from chronos.errors import SupersededError
from chronos.migration.table_shape import OwnedSequence
from chronos.partitions import OLD_TABLE, TABLE

STATE_TABLE = "webhook_log_migration"


class Phase(StrEnum):
    """How far a migration has come; DECISIONS.md draws the transitions."""

    BUILT = "built"
    COPYING = "copying"
    MIGRATED = "migrated"
    UNDOING = "undoing"
    UNDONE = "undone"
    FINALIZING = "finalizing"


DESCRIPTIONS = {
    Phase.BUILT: "webhook_log is the plain table; webhook_log_new lies beside it, unused.",
    Phase.COPYING: "webhook_log is partitioned and takes the writes; webhook_log_old holds what was before.",
    Phase.MIGRATED: "webhook_log is partitioned and complete; webhook_log_old holds what was before.",
    Phase.UNDOING: "webhook_log is partitioned and takes the writes; webhook_log_old gets its new rows.",
    Phase.UNDONE: "webhook_log is the plain table again; what is left of webhook_log_new is to be dropped.",
    Phase.FINALIZING: "webhook_log is partitioned and complete; webhook_log_old is being dropped.",
}


@dataclass(frozen=True)
class DayResult:
    """What was found when a day's copy was compared with its origin."""

    old_rows: int
    new_rows: int
    hash_equal: bool | None


@dataclass(frozen=True)
class State:
    """The row. ``renames`` lists the names taken over in the swap: (kind, name, aside, built as);
    ``sequences`` those that were the old table's own; ``functions`` the definitions of functions that
    stood under the names of ours.
    """

    run_id: uuid.UUID
    phase: Phase
    strategy: str
    started_at: datetime
    cutoff: datetime
    today: date
    first_day: date
    last_day: date
    fence: int | None
    old_oid: int
    new_oid: int | None
    renames: list[tuple[str, str, str, str]] = field(default_factory=list)
    sequences: list[OwnedSequence] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    days: dict[date, DayResult] = field(default_factory=dict)
    window_rows: int | None = None


_CREATE = """
CREATE TABLE {table} (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    run_id uuid NOT NULL,
    phase text NOT NULL,
    strategy text NOT NULL,
    started_at timestamptz NOT NULL,
    cutoff timestamptz NOT NULL,
    today date NOT NULL,
    first_day date NOT NULL,
    last_day date NOT NULL,
    fence bigint,
    old_oid oid NOT NULL,
    new_oid oid,
    renames jsonb NOT NULL,
    sequences jsonb NOT NULL,
    functions jsonb NOT NULL,
    days jsonb NOT NULL DEFAULT '{{}}',
    window_rows bigint
);
COMMENT ON TABLE {table} IS
    'chronos: how far the migration of webhook_log has come; finalize and rollback remove it';
INSERT INTO {table} (run_id, phase, strategy, started_at, cutoff, today, first_day, last_day, old_oid,
                     new_oid, renames, sequences, functions)
VALUES ({run_id}, {phase}, {strategy}, {started_at}, {cutoff}, {today}, {first_day}, {last_day},
        {old_oid}, {new_oid}, {renames}, {sequences}, {functions})
"""


def create_statement(schema: str, state: State) -> Statement:
    """The state's table and its row as it is first, for the transaction that makes it true."""
    return statement(
        _CREATE,
        table=name(schema, STATE_TABLE),
        run_id=str(state.run_id),
        phase=state.phase.value,
        strategy=state.strategy,
        started_at=state.started_at,
        cutoff=state.cutoff,
        today=state.today,
        first_day=state.first_day,
        last_day=state.last_day,
        old_oid=state.old_oid,
        new_oid=state.new_oid,
        renames=json.dumps(state.renames),
        sequences=json.dumps([asdict(sequence) for sequence in state.sequences]),
        functions=json.dumps(state.functions),
    )


def read(conn: Connection, schema: str) -> State | None:
    """The state of the migration in ``schema``, None when there is none."""
    exists = execute(
        conn,
        statement("SELECT to_regclass(format('%I.%I', {s}, {t}))", s=schema, t=STATE_TABLE),
    ).scalar_one()
    if exists is None:
        return None
    row = execute(
        conn,
        statement(
            "SELECT run_id::text, phase, strategy, started_at, cutoff, today, first_day, last_day,"
            " fence, old_oid::bigint, new_oid::bigint, renames, sequences, functions, days,"
            " window_rows FROM {table}",
            table=name(schema, STATE_TABLE),
        ),
    ).one_or_none()
    if row is None:
        return None
    return State(
        run_id=uuid.UUID(row[0]),
        phase=Phase(row[1]),
        strategy=row[2],
        started_at=row[3],
        cutoff=row[4],
        today=row[5],
        first_day=row[6],
        last_day=row[7],
        fence=row[8],
        old_oid=row[9],
        new_oid=row[10],
        renames=[(a, b, c, d) for a, b, c, d in row[11]],
        sequences=[OwnedSequence(**sequence) for sequence in row[12]],
        functions=row[13],
        days={date.fromisoformat(day): DayResult(**result) for day, result in row[14].items()},
        window_rows=row[15],
    )


def claim(conn: Connection, schema: str, run_id: uuid.UUID) -> None:
    """Lock the state to the end of the transaction and make sure that it is this run's.

    SHARE ROW EXCLUSIVE on the state's table. Raises SupersededError when another run has taken over.
    """
    execute(conn, _locked(schema))
    mine = execute(
        conn,
        statement(
            "SELECT FROM {table} WHERE run_id = {run_id}::uuid",
            table=name(schema, STATE_TABLE),
            run_id=str(run_id),
        ),
    )
    if mine.one_or_none() is None:
        raise SupersededError("another run has taken this migration over; this one wrote nothing more")


def _locked(schema: str) -> Statement:
    return statement("LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE", table=name(schema, STATE_TABLE))


def update(conn: Connection, schema: str, **changes: Any) -> None:
    """Set columns of the row that ``claim`` has locked."""
    for column, value in changes.items():
        execute(
            conn,
            statement(
                "UPDATE {table} SET {column} = {value}",
                table=name(schema, STATE_TABLE),
                column=name(column),
                value=value,
            ),
        )


def take_over(conn: Connection, schema: str, state: State) -> State:
    """Make this run the owner; waits for the last batch of the one before, if any still runs."""
    mine = replace(state, run_id=uuid.uuid4())
    execute(conn, _locked(schema))
    execute(
        conn,
        statement(
            "UPDATE {table} SET run_id = {run_id}::uuid",
            table=name(schema, STATE_TABLE),
            run_id=str(mine.run_id),
        ),
    )
    return mine


def record_day(conn: Connection, schema: str, day: date, result: DayResult) -> None:
    """Note that ``day`` is copied, compared and in its place; same transaction as the last of these."""
    execute(conn, record_statement(schema, day, sql.Literal(json.dumps(asdict(result)))))


def record_statement(schema: str, day: date, result: Statement) -> Statement:
    """Note for ``day`` the ``result``, which is a DayResult in JSON."""
    return statement(
        "UPDATE {table} SET days = days || jsonb_build_object({day}::text, {result}::jsonb)",
        table=name(schema, STATE_TABLE),
        day=day.isoformat(),
        result=result,
    )


def where(engine: Engine, schema: str) -> str:
    """Which table the application is writing, as far as can still be told."""
    try:
        with opened(engine) as conn, transaction(conn):
            found = read(conn, schema)
    except DBAPIError:
        return "The state of the tables is unknown: the server cannot be reached."
    if found is None:
        return f"{TABLE} is the plain table."
    return DESCRIPTIONS[found.phase]


def own(conn: Connection, schema: str, run_id: uuid.UUID) -> State | None:
    """The state as it is now, None when there is none, in a transaction of its own.

    Waits for the batch that another connection of this run may still execute. Raises
    SupersededError when the migration is another run's by now.
    """
    with transaction(conn):
        found = read(conn, schema)
        if found is not None:
            claim(conn, schema, run_id)
            found = read(conn, schema)
    return found


def undone_by_hand(conn: Connection, schema: str, state: State) -> bool:
    """Whether somebody has dropped the new table and renamed the old one back, without us."""
    oid = _oid(conn, schema, TABLE)
    swapped = state.phase in (Phase.COPYING, Phase.MIGRATED, Phase.UNDOING)
    return swapped and (
        oid == state.old_oid or (oid is None and _oid(conn, schema, OLD_TABLE) == state.old_oid)
    )


def finalized_by_hand(conn: Connection, schema: str, state: State) -> bool:
    """Whether somebody has dropped the old table of a finished migration, without us."""
    return (
        state.phase in (Phase.MIGRATED, Phase.FINALIZING)
        and _oid(conn, schema, TABLE) == state.new_oid
        and _oid(conn, schema, OLD_TABLE) is None
    )


def _oid(conn: Connection, schema: str, table: str) -> int | None:
    oid: int | None = execute(
        conn,
        statement(
            "SELECT to_regclass(format('%I.%I', {schema}, {table}))::oid::bigint", schema=schema, table=table
        ),
    ).scalar_one()
    return oid
