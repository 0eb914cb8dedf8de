"""What travels through a migration together: server, table, state, and the operator who is told about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum

from psycopg2 import sql
from sqlalchemy.engine import Connection, Engine

from chronos.catalog.shape import TableShape
from chronos.catalog.shape import read as read_shape
from chronos.db import Statement, joined, name, statement, transaction
from chronos.errors import SupersededError
from chronos.locks import Locks, Tables
from chronos.migration import state as states
from chronos.migration.operator import AN_HOUR, Operator
from chronos.migration.state import Plan, State
from chronos.table import TableSpec

_BEFORE_ALL = datetime(1, 1, 1, tzinfo=UTC)


@dataclass
class Migration:
    """A migration that this run owns. ``shape`` is that of the plain table, whatever its name is now.

    ``oldest`` is where the partitions began when a way back set out, ``longest_lock_s`` the longest that
    anybody can have stood behind a lock of ours, ``swap_s`` how long they can have in the swap (None: not
    yet), ``notes_replayed`` how many notes this run has replayed, ``may_stop`` false when a stop must not cut
    this short, ``needs_notes`` false when the operator goes back without what was not noted.
    """

    engine: Engine
    conn: Connection
    operator: Operator
    state: State
    shape: TableShape
    longest_lock_s: float = 0.0
    swap_s: float | None = None
    notes_replayed: int = 0
    oldest: datetime | None = None
    may_stop: bool = True
    needs_notes: bool = True

    @property
    def plan(self) -> Plan:
        """What was fixed when the migration began."""
        return self.state.plan

    @property
    def table(self) -> TableSpec:
        """The table that is migrated."""
        return self.plan.table

    def relation(self, table: str) -> sql.Identifier:
        """A table of this name in the table's schema, quoted."""
        return name(self.table.home, table)

    def referred(self) -> Tables:
        """The tables that the foreign keys refer to."""
        return [(key.schema, key.table) for key in self.plan.foreign_keys]

    def claim(self, conn: Connection) -> None:
        """``state.claim`` for this run."""
        states.claim(conn, self.table, self.state.run_id)

    def refresh(self) -> None:
        """Read the state anew. Raises SupersededError when it is another run's, or gone."""
        with transaction(self.conn):
            found = states.read(self.conn, self.table)
        if found is None or found.run_id != self.state.run_id:
            raise SupersededError("another run has taken this migration over")
        self.state = found

    def since(self, direction: Direction) -> datetime:
        """Notes of rows older than this are not replayed: the target has no place for such rows, or, on the
        way back, retention has dropped them in the source, and the plain table keeps what it had.
        """
        if direction is Direction.BACK:
            return self.oldest or self.plan.first
        # Where every row is kept, one that is older than all partitions must not be passed over.
        return self.plan.cutoff if self.table.retention_days is not None else _BEFORE_ALL

    def locks(self, attempts: int | None = AN_HOUR) -> Locks:
        """Attempts at strong locks, an hour of them; None: as many as the operator has patience for."""
        return self.operator.locks(attempts, may_stop=self.may_stop)

    def note(self, locks: Locks) -> None:
        """Remember how long anybody can have stood behind one of our locks."""
        self.longest_lock_s = max(self.longest_lock_s, locks.longest_s)


def read_plain(conn: Connection, state: State) -> TableShape:
    """The shape of the plain table, which has another name while the partitioned one is in use.

    Its triggers and rules have the states that they had before we switched them off.
    """
    shape = read_shape(conn, state.table, state.plan.former if state.phase.swapped else state.table.name)
    return with_states(shape, state.quieted) if state.phase.swapped else shape


def with_states(shape: TableShape, was: dict[str, str]) -> TableShape:
    """``shape`` with the states of triggers and rules that ``State.quieted`` has kept."""
    return replace(
        shape,
        triggers=tuple(replace(t, enabled=was.get(f"trigger {t.name}", t.enabled)) for t in shape.triggers),
        rules=tuple(replace(r, enabled=was.get(f"rule {r.name}", r.enabled)) for r in shape.rules),
    )


def states_of(shape: TableShape) -> dict[str, str]:
    """The states of the table's triggers and rules, as ``State.quieted`` keeps them."""
    return {f"trigger {t.name}": t.enabled for t in shape.triggers} | {
        f"rule {r.name}": r.enabled for r in shape.rules
    }


class Direction(Enum):
    """Which way rows go: FORWARD into the partitioned table, BACK into the plain one."""

    FORWARD = "o"
    BACK = "n"

    @property
    def origin(self) -> str:
        """The notes that are replayed: those taken in the table in use."""
        return self.value

    def source(self, table: TableSpec) -> str:
        """The table in use."""
        return table.name

    def target(self, table: TableSpec) -> str:
        """The table that is being filled."""
        return table.new if self is Direction.FORWARD else table.old

    def key(self, plan: Plan) -> tuple[str, ...]:
        """The columns by which the target knows a row."""
        return plan.new_key if self is Direction.FORWARD else plan.old_key


def match(columns: tuple[str, ...], one: str, other: str) -> Statement:
    """``one.a = other.a AND one.b = other.b``, by the server's own =.

    The role's search path may be in force where rows are moved, and an = of a stranger's, for varchar say,
    would fit better.
    """
    return joined(
        [
            statement("{o}.{c} OPERATOR(pg_catalog.=) {p}.{c}", o=name(one), p=name(other), c=name(c))
            for c in columns
        ],
        " AND ",
    )


def names(columns: tuple[str, ...], alias: str | None = None) -> Statement:
    """The columns, of ``alias`` if there is one, one after another."""
    return joined([name(alias, c) if alias else name(c) for c in columns])
