"""Swap the names: the filled table takes the place of the one in use, in milliseconds.

Two sessions do it. A locks the table in use so that writers wait and readers go on; B replays the last few
notes and commits; A waits until no snapshot is older than that commit, takes the lock that readers also wait
for, checks again what refers to the table, and changes the names. So even a REPEATABLE READ transaction,
begun before or during the swap, finds every row, whichever table its query reaches.

An attempt that cannot get all of this in time lets go and is retried after a pause; meanwhile the notes are
replayed, and nobody waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from sqlalchemy.engine import Connection

from chronos.catalog.ddl import (
    disable_statements,
    enable_statements,
    force_statements,
    foreign_key_statements,
    partition_differences,
    rename,
    restore_statements,
    rule_statements,
    sequence_statements,
    sequences_back_statements,
)
from chronos.catalog.dependents import dependents, oid_of, redirect_statements, require_dependents
from chronos.catalog.shape import TableShape, differences
from chronos.catalog.shape import read as read_shape
from chronos.db import Statement, execute, joined, name, opened, statement, transaction
from chronos.errors import NotesLostError, ShapeError
from chronos.locks import Attempt, BlockedError, lock_table
from chronos.migration.changes import (
    FEW,
    note_everything_statement,
    notes_are_taken,
    replay,
    replay_most,
    triggers_after_the_way_back,
    unlink_function_statement,
    waiting_notes,
)
from chronos.migration.context import Direction, Migration, states_of
from chronos.migration.snapshots import Snapshot, snapshots, still_there
from chronos.migration.state import Phase, Plan, fence_statement, phase_statement, quieted_statement
from chronos.migration.workers import CheckStop

# An older transaction with a snapshot must end before we make anybody wait.
_OLD_S = 0.5
_POLL_S = 0.002
_OF_DEADLOCK_TIMEOUT = 0.95


class _TooMuchToReplayError(Exception):
    """While we waited for the lock, more was noted than may be replayed under it."""


def swap(migration: Migration, direction: Direction, check_stop: CheckStop) -> None:
    """Let the filled table take the place of the one in use, in either direction.

    SHARE ROW EXCLUSIVE on the table in use while the last notes are replayed, then ACCESS EXCLUSIVE on it for
    the renames, and, on the way back, SHARE ROW EXCLUSIVE on the tables that its foreign keys refer to; all
    within the operator's patience. The table that goes out of use keeps its keys: see ``drop_keys``.
    Raises LockUnavailableError, ShapeError, NotesLostError, TruncatedError, with nothing changed.
    """
    table = migration.table
    with opened(migration.engine) as other:
        ours = (_pid(migration.conn), _pid(other))
        while True:
            replay_most(migration, direction, check_stop, other)
            locks = migration.locks()
            referred = migration.referred() if direction is Direction.BACK else []
            tables = [(table.home, table.name), (table.home, direction.target(table)), *referred]
            try:
                for attempt in locks.attempts(migration.conn, tables, ours):
                    replay_most(migration, direction, check_stop, other)
                    with attempt as conn:
                        _Exchange(migration, direction, attempt, conn, other, ours).run()
                break
            except _TooMuchToReplayError:
                continue
            finally:
                migration.note(locks)
    migration.swap_s = locks.last_s
    migration.refresh()


def _pid(conn: Connection) -> int:
    with transaction(conn):
        return int(execute(conn, statement("SELECT pg_backend_pid()")).scalar_one())


class _Exchange:
    """One attempt: ``conn`` is session A, whose transaction is open, ``other`` session B."""

    def __init__(
        self,
        migration: Migration,
        direction: Direction,
        attempt: Attempt,
        conn: Connection,
        other: Connection,
        ours: tuple[int, ...],
    ) -> None:
        self.migration = migration
        self.direction = direction
        self.attempt = attempt
        self.conn = conn
        self.other = other
        self.ours = ours
        self.table = migration.table
        self.in_use = self.table.name
        self.target = direction.target(self.table)

    def run(self) -> None:
        """From the first check to the last rename; the caller commits."""
        migration, conn = self.migration, self.conn
        self._require_no_old_snapshot()
        migration.claim(conn)
        # No DDL on the table in use while the two are compared; the application reads and writes.
        execute(conn, lock_table(self.table.home, self.in_use, "SHARE UPDATE EXCLUSIVE"))
        oid, versions = self._oid(), self._versions()
        self._require_alike()
        self._wait_less_than_deadlock_timeout()
        partitions = self.direction is Direction.BACK
        execute(conn, lock_table(self.table.home, self.in_use, "SHARE ROW EXCLUSIVE", partitions=partitions))
        if migration.needs_notes and not notes_are_taken(conn, self.table):
            raise NotesLostError(
                f"the note triggers on {self.table} were dropped or disabled, so what was written since then"
                " is unknown"
            )
        if waiting_notes(conn, migration, self.direction, FEW + 1) > FEW:
            raise _TooMuchToReplayError
        self._replay_the_rest()
        self._wait_for_snapshots()
        self._take_the_rest_of_the_locks()
        # GRANT takes no lock on the table, so one may have happened meanwhile.
        if self._versions() != versions:
            self._require_alike()
        following = dependents(conn, oid)
        forward = self.direction is Direction.FORWARD
        statements = (
            forward_statements(migration.shape, migration.plan)
            if forward
            else back_statements(migration.shape, migration.plan)
        )
        former = name(self.table.home, self.table.old if forward else self.table.new)
        redirects = redirect_statements(following, name(self.table.home, self.in_use), former)
        execute(conn, joined([*statements, *redirects], ";\n"))
        require_dependents(conn, following, self._oid())
        if not forward:
            self._require_restored()

    def _wait_less_than_deadlock_timeout(self) -> None:
        """From here on a session may wait for us and we for it: give up before the deadlock check runs.

        It runs after deadlock_timeout in the session that has waited that long, and would cancel it: theirs.
        """
        deadlock_s = execute(
            self.conn,
            statement("SELECT setting::float8 / 1000 FROM pg_settings WHERE name = 'deadlock_timeout'"),
        ).scalar_one()
        self.attempt.wait_s = min(self.attempt.wait_s, _OF_DEADLOCK_TIMEOUT * deadlock_s)
        self.attempt.asks_now()
        wait = str(max(1, round(self.attempt.wait_s * 1000)))
        execute(self.conn, statement("SELECT set_config('lock_timeout', {wait}, true)", wait=wait))

    def _require_no_old_snapshot(self) -> None:
        """Before any lock: a session with an old snapshot that does not use the table must end first."""
        old = [s for s in self._snapshots() if s.seconds > _OLD_S and not s.has_lock]
        if old:
            raise BlockedError(old[0].as_conflict())

    def _snapshots(self) -> list[Snapshot]:
        with transaction(self.other):
            return snapshots(self.other, self.table.home, self.in_use, self.ours)

    def _replay_the_rest(self) -> None:
        """Session B: replay what was noted before writers had to wait."""
        while True:
            with transaction(self.other, lock_timeout_ms=max(1, round(self.attempt.left_s * 1000))):
                notes = replay(self.other, self.migration, self.direction)
            if not notes:
                return
            self.migration.notes_replayed += notes

    def _wait_for_snapshots(self) -> None:
        """Wait until no snapshot predates the last replay; the lock itself waits for users of the table."""
        self.before = self._snapshots()
        while waiting := [s for s in still_there(self.before, self._snapshots()) if not s.has_lock]:
            if not self.attempt.left_s:
                raise BlockedError(waiting[0].as_conflict())
            time.sleep(_POLL_S)

    def _take_the_rest_of_the_locks(self) -> None:
        """In the order in which an insert takes its locks; readers wait from here on."""
        home = self.table.home
        locks = [lock_table(home, table, "ACCESS EXCLUSIVE") for table in (self.in_use, self.target)]
        if self.direction is Direction.BACK:
            locks += [lock_table(s, t, "SHARE ROW EXCLUSIVE") for s, t in self.migration.referred()]
        for lock in locks:
            # Time spent on one lock is no longer available for the next.
            left = str(max(1, round(self.attempt.left_s * 1000)))
            timeout = statement("SELECT set_config('lock_timeout', {left}, true)", left=left)
            execute(self.conn, joined([timeout, lock], ";\n"))
        if waiting := still_there(self.before, self._snapshots()):
            raise BlockedError(waiting[0].as_conflict())

    def _versions(self) -> tuple[object, ...]:
        """The version of each catalog row of the table in use."""
        return tuple(execute(self.conn, statement(_CATALOG_ROWS, oid=self._oid())).one())

    def _require_alike(self) -> None:
        """Raise ShapeError unless the new table matches the plain one, but for announced differences."""
        if self.direction is Direction.BACK:
            return
        plan = self.migration.plan
        was = read_shape(self.conn, self.table, self.table.name)
        built = read_shape(self.conn, self.table, self.table.new)
        names = [(temporary, original) for _, original, _, temporary in plan.renames]
        found = differences(was, replace(built, rules=was.rules), names, announced=True)
        found += partition_differences(self.conn, was, built.oid)
        if found:
            raise ShapeError(changed_meanwhile(plan, found))
        self.migration.shape = was

    def _require_restored(self) -> None:
        """Raise ShapeError unless the plain table has everything back and is otherwise unchanged."""
        plan = self.migration.plan
        was, now = self.migration.shape, read_shape(self.conn, self.table, self.table.name)
        renamed = [(original, aside) for _, original, aside, _ in plan.renames]
        ignored = {"rules": (), "sequences": (), "foreign_keys": ()}
        found = differences(replace(was, **ignored), replace(now, **ignored), renamed)  # type: ignore[arg-type]
        if set(now.sequences) != set(plan.sequences):
            found.append(f"sequences: {plan.sequences} became {now.sequences}")
        if [r.enabled for r in was.rules] != [r.enabled for r in now.rules]:
            found.append("rules: one was enabled or disabled")
        if found:
            raise ShapeError(f"{plan.table} would not be the table it was before: {'; '.join(found)}")

    def _oid(self) -> int:
        """The OID of the table that has the name now."""
        return oid_of(self.conn, self.table.home, self.in_use)


_CATALOG_ROWS = """
SELECT c.xmin::text, (SELECT string_agg(a.xmin::text, ' ' ORDER BY a.attnum)
                      FROM pg_attribute a WHERE a.attrelid = c.oid)
FROM pg_class c WHERE c.oid = {oid}
"""


def changed_meanwhile(plan: Plan, found: list[str]) -> str:
    """What to do when the table in use was changed after the other one was built."""
    return (
        f"{plan.table} was changed after {plan.table.new} was built, and now differs from it:"
        f" {'; '.join(found)}."
        f" Undo that change and carry on; or roll back and migrate the changed table"
    )


def _linked(shape: TableShape, plan: Plan, linked: Direction) -> list[Statement]:
    """The table that goes out of use, the target of ``linked``, keeps its foreign keys for a while: writers
    of the other one delete copies from it, and its own triggers and rules do not fire.
    """
    if not plan.foreign_keys:
        return []
    table = linked.target(plan.table)
    return [
        unlink_function_statement(shape, plan, linked=linked),
        *disable_statements(shape, name(plan.table.home, table)),
        *force_statements(shape, name(plan.table.home, table), off=True),
    ]


def _renamed(plan: Plan, position: Callable[[tuple[str, str, str, str]], tuple[str, str]]) -> list[Statement]:
    return [rename(plan.table.home, found[0], *position(found)) for found in plan.renames]


def forward_statements(shape: TableShape, plan: Plan) -> list[Statement]:
    """What runs under the locks when the partitioned table takes the name."""
    table = plan.table
    home = table.home
    return [
        rename(home, "TABLE", table.name, table.old),
        *_renamed(plan, lambda r: (r[1], r[2])),
        rename(home, "TABLE", table.new, table.name),
        *_renamed(plan, lambda r: (r[3], r[1])),
        *_linked(shape, plan, Direction.BACK),
        *([quieted_statement(table, states_of(shape))] if plan.foreign_keys else []),
        *enable_statements(shape, name(home, table.name)),
        *sequence_statements(shape),
        *rule_statements(shape, name(home, table.name)),
        fence_statement(table),
        note_everything_statement(shape),
        phase_statement(table, Phase.MIGRATED),
    ]


def back_statements(shape: TableShape, plan: Plan) -> list[Statement]:
    """What runs under the locks when the plain table gets its name back, and everything it had given up.

    Its foreign keys are enforced for new writes at once, and validated afterwards.
    """
    table = plan.table
    home = table.home
    plain = name(home, table.name)
    return [
        rename(home, "TABLE", table.name, table.new),
        *_renamed(plan, lambda r: (r[1], r[3])),
        rename(home, "TABLE", table.old, table.name),
        *_renamed(plan, lambda r: (r[2], r[1])),
        *_linked(shape, plan, Direction.FORWARD),
        *triggers_after_the_way_back(shape),
        *restore_statements(shape, plain),
        quieted_statement(table, {}),
        *foreign_key_statements(plan.foreign_keys, plain, not_valid=True),
        *sequences_back_statements(table, plan.sequences),
        phase_statement(table, Phase.UNDONE),
    ]
