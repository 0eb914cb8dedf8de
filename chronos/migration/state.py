"""The state of a migration, kept in the database: one row in a table of its own, dropped when all is done.

``plan`` is what was fixed when the migration began; the other columns say how far it is. Each transition
commits with the change that it describes, and only the run that owns the row writes it: ``claim`` locks the
table and compares the run's token, so that a run that was taken over (its process dead, its last statement
still running) cannot write another row. Batches of the copy hold ROW EXCLUSIVE on the table. The lock is on
the table, not the row, because table locks are queued fairly: batches in quick succession cannot starve a
claim.

Objects are stored by name, never by OID, so a migration can carry on in a restored dump.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from psycopg2 import sql
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from chronos.catalog.partitions import expires_on
from chronos.catalog.shape import ForeignKey, Grant, Identity, Index, OwnedSequence, Trigger
from chronos.commands import rollback as rollback_command
from chronos.db import Statement, execute, name, opened, statement, transaction
from chronos.errors import RefusedError, SupersededError
from chronos.locks import lock_table
from chronos.table import Period, TableSpec, quoted


class Phase(StrEnum):
    """How far a migration has come."""

    BUILT = "built"
    COPYING = "copying"
    READY = "ready"
    MIGRATED = "migrated"
    RETURNING = "returning"
    UNDONE = "undone"
    FINALIZING = "finalizing"

    @property
    def swapped(self) -> bool:
        """Whether the partitioned table has the name."""
        return self in (Phase.MIGRATED, Phase.RETURNING, Phase.FINALIZING)


class Strategy(StrEnum):
    """How rows get into partitions: COPY into new tables, or ATTACH the table itself as one partition."""

    COPY = "copy"
    ATTACH = "attach"


def describe(state: State) -> str:
    """One sentence: which table is in use, and what the others are for."""
    table, phase = state.table, state.phase
    t, old, new, history = map(quoted, (table.name, table.old, table.new, table.history))
    if state.plan.attaches and phase in _ATTACHING:
        return _ATTACHING[phase].format(t=t, new=new, history=history)
    return {
        Phase.BUILT: f"{t} is the plain table; {new} exists beside it, empty.",
        Phase.COPYING: f"{t} is the plain table, complete and in use; {new} is being filled beside it.",
        Phase.READY: f"{t} is the plain table, complete and in use; {new} is filled, compared and ready.",
        Phase.MIGRATED: f"{t} is partitioned and complete; {old} holds what was before.",
        Phase.RETURNING: f"{t} is partitioned, complete and in use; {old} is getting its new rows.",
        Phase.UNDONE: f"{t} is the plain table; what is left of the migration has yet to be dropped.",
        Phase.FINALIZING: f"{t} is partitioned and complete; {old} is being dropped.",
    }[phase]


def what_becomes_of(plan: Plan) -> str:
    """When the table that has become a partition will be dropped."""
    history = f"{plan.former}, all rows before {plan.first:%Y-%m-%d %H:%M} UTC,"
    goes = expires_on(plan.first, plan.table.retention_days)
    if goes is None:
        return f"{history} is never dropped: every row is kept"
    return f"{history} is dropped when its last row has expired, on {goes}"


def not_to_be_dropped(table: TableSpec) -> str:
    """A warning for those who have gone back from a copy by hand before."""
    return (
        f"DROP TABLE {table} would drop it too, with every row; to go back, type: {rollback_command(table)}"
    )


_ATTACHING = {
    Phase.COPYING: "{t} is the plain table, complete and in use; it is being prepared to become a partition.",
    Phase.READY: "{t} is the plain table, complete, in use, and ready to become a partition of {new}.",
    Phase.MIGRATED: "{t} is partitioned and complete; {history}, the former table, is a partition of it.",
    Phase.FINALIZING: "{t} is partitioned and complete; what is left of the migration is being dropped.",
}


@dataclass(frozen=True)
class PeriodResult:
    """The result of comparing a period's copy with its source, noted rows aside.

    ``alike`` is None when rows were only counted.
    """

    old_rows: int
    new_rows: int
    alike: bool | None

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return self.old_rows == self.new_rows and self.alike is not False


@dataclass(frozen=True)
class Heap:
    """What the plain table gives up when it becomes a partition, and gets back from a rollback.

    ``key`` is the index that identified its rows; ``triggers`` are its row triggers; ``nullable`` says
    whether its time column was.
    """

    key: Index
    identities: tuple[Identity, ...]
    triggers: tuple[Trigger, ...]
    nullable: bool

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Heap:
        """From JSON as parsed by the driver."""
        return cls(
            key=Index(**found["key"]),
            identities=tuple(
                Identity(**{**i, "grants": tuple(Grant(**g) for g in i["grants"])})
                for i in found["identities"]
            ),
            triggers=tuple(Trigger(**t) for t in found["triggers"]),
            nullable=found["nullable"],
        )


@dataclass(frozen=True)
class Expected:
    """The estimate when a migration began: rows to be copied; bytes of the table with its indexes, of extra
    disk and of WAL; seconds of the six steps.
    """

    rows: int
    bytes: int
    seconds: float
    wal_bytes: float
    disk_bytes: float


@dataclass(frozen=True)
class Plan:
    """What is fixed when a migration begins; times are the server's, UTC.

    ``cutoff`` is the oldest instant whose rows are copied, ``first`` and ``end`` bound the partitions.
    ``old_key`` are the columns that identify a row of the plain table, ``new_key`` those and the time
    column; ``renames`` the names taken over in the swap: (kind, name, aside, built as); ``sequences`` those
    that the plain table owns; ``foreign_keys`` those that it loses in the swap and gets back in a rollback;
    ``functions`` the definitions of functions that had the names of ours; ``heap`` is only for the strategy
    ATTACH: then ``first`` is the bound before which every row stays in the old table; ``expected`` is set if
    a report is wanted.
    """

    table: TableSpec
    strategy: Strategy
    started_at: datetime
    cutoff: datetime
    first: datetime
    end: datetime
    old_key: tuple[str, ...]
    new_key: tuple[str, ...]
    renames: tuple[tuple[str, str, str, str], ...] = ()
    sequences: tuple[OwnedSequence, ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()
    functions: tuple[str, ...] = ()
    heap: Heap | None = None
    expected: Expected | None = None

    @property
    def attaches(self) -> bool:
        """Whether the plain table becomes a partition."""
        return self.strategy is Strategy.ATTACH

    @property
    def former(self) -> str:
        """What the plain table is called once the partitioned one has its name."""
        return self.table.history if self.attaches else self.table.old

    @property
    def periods(self) -> list[Period]:
        """Every period that gets a partition, oldest first."""
        return self.table.periods(self.first, self.end)

    def as_json(self) -> str:
        """For the state's table."""
        return json.dumps(
            {
                **asdict(self),
                "table": self.table.as_json(),
                **{
                    when: getattr(self, when).isoformat() for when in ("started_at", "cutoff", "first", "end")
                },
            }
        )

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Plan:
        """The reverse of ``as_json``, from JSON as parsed by the driver."""
        times = {
            when: datetime.fromisoformat(found[when]).astimezone(UTC)
            for when in ("started_at", "cutoff", "first", "end")
        }
        return cls(
            table=TableSpec.from_json(found["table"]),
            strategy=Strategy(found["strategy"]),
            old_key=tuple(found["old_key"]),
            new_key=tuple(found["new_key"]),
            renames=tuple((a, b, c, d) for a, b, c, d in found["renames"]),
            sequences=tuple(OwnedSequence(**s) for s in found["sequences"]),
            foreign_keys=tuple(ForeignKey(**k) for k in found["foreign_keys"]),
            functions=tuple(found["functions"]),
            heap=Heap.from_json(found["heap"]) if found["heap"] else None,
            expected=Expected(**found["expected"]) if found.get("expected") else None,
            **times,
        )


@dataclass(frozen=True)
class State:
    """The row. ``compared`` maps the start of each filled and compared period to its result; ``fence`` is the
    instant of the swap; ``verified`` says that the rows noted before it have been compared since; ``quieted``
    maps the plain table's triggers and rules, while they are disabled, to the states (O, D, R, A) that they
    had before; ``options`` are those that the operator gave, which a resumed run reuses.
    """

    run_id: uuid.UUID
    phase: Phase
    plan: Plan
    compared: dict[datetime, PeriodResult] = field(default_factory=dict)
    fence: datetime | None = None
    verified: bool = False
    quieted: dict[str, str] = field(default_factory=dict)
    changed_at: datetime | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> TableSpec:
        """The table that is migrated."""
        return self.plan.table


# The comment on the state's table begins with these words, and the table is found by them.
COMMENT = "chronos: how far the migration of "

_CREATE = """
CREATE TABLE {table} (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    run_id uuid NOT NULL,
    phase text NOT NULL,
    plan jsonb NOT NULL,
    compared jsonb NOT NULL DEFAULT '{{}}',
    fence timestamptz,
    verified boolean NOT NULL DEFAULT false,
    quieted jsonb NOT NULL DEFAULT '{{}}',
    changed_at timestamptz NOT NULL DEFAULT now(),
    options jsonb NOT NULL DEFAULT '{{}}'
);
-- An event trigger may have given it to a role whose state could not be trusted.
ALTER TABLE {table} OWNER TO CURRENT_USER;
COMMENT ON TABLE {table} IS {comment};
INSERT INTO {table} (run_id, phase, plan, options) VALUES ({run_id}, {phase}, {plan}, {options})
"""


def create_statement(state: State) -> Statement:
    """The state's table and its row as it is first."""
    return statement(
        _CREATE,
        table=_name(state.table),
        comment=f"{COMMENT}{state.table} has come; finalize and rollback remove it",
        run_id=str(state.run_id),
        phase=state.phase.value,
        plan=state.plan.as_json(),
        options=json.dumps(state.options),
    )


# The run that carries the migration on executes what the state holds, so its owner must be that role or a
# superuser. The owner of the migrated table, or of its schema, is not enough.
_OWNER = """
SELECT pg_get_userbyid(c.relowner), c.relkind = 'r',
       o.rolsuper OR o.rolname = current_user,
       (SELECT count(*) FROM pg_attribute a
        WHERE a.attrelid = c.oid AND a.attname IN ('phase', 'verified')) = 2
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_roles o ON o.oid = c.relowner
WHERE n.nspname = {schema} AND c.relname = {state}
"""


def read(conn: Connection, table: TableSpec, *, only_to_show: bool = False) -> State | None:
    """The state of the migration of ``table``; None when there is none, or the table is the application's.

    Raises RefusedError when it is not a table, or belongs to a role that the current user must not trust;
    with ``only_to_show`` a table is read whoever owns it.
    """
    found = execute(conn, statement(_OWNER, schema=table.home, state=table.state)).one_or_none()
    if found is None:
        return None
    owner, is_table, trusted, looks_like_one = found
    if not is_table or not (trusted or only_to_show):
        raise RefusedError(
            f"{table.state}, where a migration of {table} keeps its state, belongs to {owner}, whom the"
            f" current user must not trust; nothing was changed. Connect as {owner}, or find out what that"
            " table is"
        )
    if not looks_like_one:
        return None
    row = execute(
        conn,
        statement(
            "SELECT run_id::text, phase, plan, compared, fence, verified, quieted, changed_at, options"
            " FROM {table}",
            table=_name(table),
        ),
    ).one_or_none()
    if row is None:
        return None
    return State(
        run_id=uuid.UUID(row[0]),
        phase=Phase(row[1]),
        plan=Plan.from_json(row[2]),
        compared={
            datetime.fromisoformat(start).astimezone(UTC): PeriodResult(**result)
            for start, result in row[3].items()
        },
        fence=row[4],
        verified=row[5],
        quieted=row[6],
        changed_at=row[7],
        options=row[8],
    )


def claim(conn: Connection, table: TableSpec, run_id: uuid.UUID) -> None:
    """Lock the state until the end of the transaction and make sure that it is this run's.

    SHARE ROW EXCLUSIVE on the state's table. Raises SupersededError when another run has taken over.
    """
    execute(conn, _locked(table))
    mine = execute(
        conn,
        statement(
            "SELECT FROM {table} WHERE run_id = {run_id}::uuid", table=_name(table), run_id=str(run_id)
        ),
    )
    if mine.one_or_none() is None:
        raise SupersededError("another run has taken this migration over; this one wrote nothing more")


def _name(table: TableSpec) -> sql.Identifier:
    return name(table.home, table.state)


def _locked(table: TableSpec) -> Statement:
    return lock_table(table.home, table.state, "SHARE ROW EXCLUSIVE")


def phase_statement(table: TableSpec, phase: Phase) -> Statement:
    """Enter ``phase``, in the transaction that makes it true."""
    return statement(
        "UPDATE {table} SET phase = {phase}, changed_at = now()", table=_name(table), phase=phase.value
    )


def fence_statement(table: TableSpec) -> Statement:
    """The instant of the swap, for its transaction, under the lock."""
    return statement("UPDATE {table} SET fence = clock_timestamp()", table=_name(table))


def verified_statement(table: TableSpec) -> Statement:
    """Record that the keys replayed before the swap were compared after it."""
    return statement("UPDATE {table} SET verified = true", table=_name(table))


def quieted_statement(table: TableSpec, states: dict[str, str]) -> Statement:
    """Record the former states of the plain table's triggers and rules."""
    return statement("UPDATE {table} SET quieted = {states}", table=_name(table), states=json.dumps(states))


def options_statement(table: TableSpec, options: dict[str, Any]) -> Statement:
    """Record the options that the migration carries on with."""
    return statement(
        "UPDATE {table} SET options = {options}", table=_name(table), options=json.dumps(options)
    )


def compared_statement(table: TableSpec, period: Period, result: PeriodResult) -> Statement:
    """Record the result of comparing ``period``."""
    return statement(
        "UPDATE {table} SET compared = compared || jsonb_build_object({start}::text, {result}::jsonb)",
        table=_name(table),
        start=period.start.isoformat(),
        result=json.dumps(asdict(result)),
    )


def take_over(conn: Connection, state: State) -> State:
    """Make this run the owner; waits for the previous run's last batch, if it is still running."""
    mine = replace(state, run_id=uuid.uuid4())
    execute(conn, _locked(state.table))
    execute(
        conn,
        statement(
            "UPDATE {table} SET run_id = {run_id}::uuid", table=_name(state.table), run_id=str(mine.run_id)
        ),
    )
    return mine


def where(engine: Engine, table: TableSpec) -> str:
    """Which table the application is writing, as far as can be determined."""
    try:
        with opened(engine) as conn, transaction(conn):
            found = read(conn, table)
    except DBAPIError:
        return "The state of the tables is unknown: the server cannot be reached."
    if found is None:
        return f"{table} is the plain table."
    return describe(found)


def own(conn: Connection, table: TableSpec, run_id: uuid.UUID) -> State | None:
    """The current state, None when there is none, in a transaction of its own.

    Waits for a batch that another connection of this run may still be executing. Raises SupersededError when
    another run has taken over.
    """
    with transaction(conn):
        found = read(conn, table)
        if found is not None:
            claim(conn, table, run_id)
            found = read(conn, table)
    return found


def undone_by_hand(conn: Connection, state: State) -> bool:
    """Whether somebody has dropped the partitioned table and renamed the plain one back, without us."""
    table = state.table
    return state.phase.swapped and (
        relkind(conn, table.home, table.name) == "r"
        or (
            relkind(conn, table.home, table.name) is None
            and relkind(conn, table.home, state.plan.former) == "r"
        )
    )


def finalized_by_hand(conn: Connection, state: State) -> bool:
    """Whether somebody has dropped the old table of a finished migration, without us."""
    table = state.table
    return (
        state.phase in (Phase.MIGRATED, Phase.FINALIZING)
        and relkind(conn, table.home, table.name) == "p"
        and relkind(conn, table.home, state.plan.former) is None
    )


def relkind(conn: Connection, schema: str, table: str) -> str | None:
    """The kind of a relation: ``r`` a plain table, ``p`` a partitioned one; None if there is none."""
    kind: str | None = execute(
        conn,
        statement(
            "SELECT relkind::text FROM pg_class WHERE oid = to_regclass(format('%I.%I', {schema}, {table}))",
            schema=schema,
            table=table,
        ),
    ).scalar()
    return kind
