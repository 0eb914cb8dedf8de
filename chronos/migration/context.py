"""What the parts of a migration share: server, table, state, and the operator who watches it."""

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

    ``oldest`` is where the oldest partition began when the way back started; ``longest_lock_s`` the longest
    that any session can have waited behind a lock of ours, ``swap_s`` the same for the swap (None: not yet);
    ``notes_replayed`` how many notes this run has replayed; ``may_stop`` false when a stop must not interrupt
    it; ``needs_notes`` false when the operator accepts losing what was not noted.
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
        """Read the state again. Raises SupersededError when it is another run's, or gone."""
        with transaction(self.conn):
            found = states.read(self.conn, self.table)
        if found is None or found.run_id != self.state.run_id:
            raise SupersededError("another run has taken this migration over")
        self.state = found

    def since(self, direction: Direction) -> datetime:
        """Notes of rows older than this are not replayed: the target has no partition for them or, on the way
        back, retention has dropped them from the source, and the plain table keeps what it had.
        """
        if direction is Direction.BACK:
            return self.oldest or self.plan.first
        # Where every row is kept, one older than all partitions must not be skipped silently.
        return self.plan.cutoff if self.table.retention_days is not None else _BEFORE_ALL

    def locks(self, attempts: int | None = AN_HOUR) -> Locks:
        """Attempts at strong locks, for about an hour; None: as many as the operator's patience allows."""
        return self.operator.locks(attempts, may_stop=self.may_stop)

    def note(self, locks: Locks) -> None:
        """Remember the longest that any session can have waited behind one of our locks."""
        self.longest_lock_s = max(self.longest_lock_s, locks.longest_s)


def read_plain(conn: Connection, state: State) -> TableShape:
    """The shape of the plain table, which has another name while the partitioned one is in use.

    Its triggers and rules have the states they had before we disabled them.
    """
    shape = read_shape(conn, state.table, state.plan.former if state.phase.swapped else state.table.name)
    return with_states(shape, state.quieted) if state.phase.swapped else shape


def with_states(shape: TableShape, was: dict[str, str]) -> TableShape:
    """``shape`` with the states of triggers and rules kept in ``State.quieted``."""
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
        """The mark of the notes that are replayed: those taken in the table in use."""
        return self.value

    def source(self, table: TableSpec) -> str:
        """The table in use."""
        return table.name

    def target(self, table: TableSpec) -> str:
        """The table that is being filled."""
        return table.new if self is Direction.FORWARD else table.old

    def key(self, plan: Plan) -> tuple[str, ...]:
        """The columns that identify a row in the target."""
        return plan.new_key if self is Direction.FORWARD else plan.old_key


def match(columns: tuple[str, ...], one: str, other: str) -> Statement:
    """``one.a = other.a AND one.b = other.b``, by the server's own =.

    The role's own search path may apply where rows are moved, and somebody else's = (for varchar, say) could
    be the better match.
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
