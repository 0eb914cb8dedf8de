"""Strong locks in short attempts: who holds them, what would end that, and a retry after a pause.

A long wait in the lock queue blocks everybody behind it. So an attempt waits 100 ms at most, gives up its
place, and says who was in the way. Only when attempts keep failing may each wait longer, up to the operator's
``--max-lock-wait``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from psycopg2 import sql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos.db import Statement, begin, execute, is_lock_failure, joined, name, statement, transaction
from chronos.errors import LockUnavailableError

Tables = list[tuple[str, str]]

_POLL_S = 0.02
_GRACE_S = 0.05
# What the server shows instead of a query that the current user may not see.
_NOT_SHOWN = "<insufficient privilege>"


@dataclass(frozen=True)
class Patience:
    """How long to wait for a lock, and how often.

    An attempt waits ``shortest_s`` seconds; after ``short_attempts`` of them each waits twice as long as the
    one before, up to ``longest_s``: nobody queues behind us for longer. ``attempts`` is the maximum. The
    pause between two attempts doubles up to ``longest_pause_s`` and is jittered, so that two waiters do not
    keep colliding.
    """

    shortest_s: float = 0.1
    longest_s: float = 1.0
    short_attempts: int = 5
    attempts: int = 60
    first_pause_s: float = 0.1
    longest_pause_s: float = 3.0
    sleep: Callable[[float], None] = time.sleep

    def wait_s(self, attempt: int) -> float:
        """Seconds that the attempt with this number (from 1) waits for its locks."""
        grown = self.shortest_s * 2.0 ** min(max(0, attempt - self.short_attempts), 16)
        if grown < self.longest_s:
            return grown
        # Slightly more than the usual deadlock_timeout, after which the server cancels a blocking autovacuum.
        return self.longest_s + (_GRACE_S if self.longest_s >= 1 else 0)

    def pause_s(self, attempt: int) -> float:
        """Seconds to wait after the attempt with this number."""
        ceiling = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(attempt - 1, 16))
        return ceiling * random.uniform(0.5, 1.0)  # jitter, not cryptography


@dataclass(frozen=True)
class LockConflict:
    """Why an attempt failed: the whole ``text``, and its parts: ``what`` was waited for, ``who`` was in the
    way (a pid and its application) and the ``remedy``, the statement that would end that; empty if unknown.
    """

    text: str
    what: str
    who: str
    remedy: str = ""

    def __str__(self) -> str:
        return self.text


class BlockedError(Exception):
    """An attempt cannot get what it needs now, though no lock was refused."""

    def __init__(self, conflict: LockConflict) -> None:
        super().__init__(conflict.text)
        self.conflict = conflict


@dataclass(frozen=True)
class LockHolder:
    """The holder of a lock that we wait for: a session by its pid, or a prepared transaction by its gid."""

    pid: int | None
    gid: str | None
    application: str
    state: str
    seconds: float
    query: str

    @property
    def remedy(self) -> str:
        """The statement that would end it."""
        if self.pid is None:
            escaped = (self.gid or "").replace("'", "''")
            return f"ROLLBACK PREPARED '{escaped}'"
        return f"SELECT pg_terminate_backend({self.pid})"

    @property
    def who(self) -> str:
        """Its pid and application, or the name of the prepared transaction."""
        if self.pid is None:
            return f"prepared transaction '{self.gid}'"
        return f"pid {self.pid}" + (f" ({self.application})" if self.application else "")

    def __str__(self) -> str:
        if self.pid is None:
            return f"{self.who}, open for {self.seconds:.0f} s; {self.remedy} would end it"
        if self.query == _NOT_SHOWN:
            return (
                f"{self.who}, of a role whose queries only members of pg_monitor can see;"
                f" {self.remedy} would end it"
            )
        doing = f", query: {self.query}" if self.query else ""
        state = self.state or "in a transaction"
        return f"{self.who}, {state} for {self.seconds:.0f} s{doing}; {self.remedy} would end it"


# A query may contain a row's data, so only its first words are shown, without literals; and no control
# characters reach the terminal.
_HOLDERS = r"""
WITH held AS (
    SELECT DISTINCT l.pid, l.virtualtransaction FROM pg_locks l
    JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND (n.nspname, c.relname) IN ({wanted})
)
SELECT a.pid, NULL::text,
       coalesce(nullif(a.application_name, ''), nullif(a.backend_type, 'client backend'), ''),
       coalesce(a.state, ''),
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::float8 AS age,
       left(regexp_replace(regexp_replace(coalesce(a.query, ''), '''[^'']*(''|$)', '''...''', 'g'),
                           '[[:space:][:cntrl:]]+', ' ', 'g'), 60)
FROM pg_stat_activity a WHERE a.pid IN (SELECT pid FROM held) AND a.pid <> pg_backend_pid()
  AND NOT a.pid = ANY({ours})
UNION ALL
SELECT NULL, p.gid, '', '', extract(epoch FROM clock_timestamp() - p.prepared)::float8, ''
FROM pg_prepared_xacts p
WHERE p.database = current_database() AND EXISTS (
    SELECT FROM held h JOIN pg_locks x ON x.virtualtransaction = h.virtualtransaction
    WHERE h.pid IS NULL AND x.pid IS NULL
      AND x.locktype = 'transactionid' AND x.transactionid = p.transaction)
ORDER BY age DESC
"""


def lock_holders(conn: Connection, tables: Tables, ours: tuple[int, ...] = ()) -> list[LockHolder]:
    """Who holds locks on ``tables`` (schema, name), the oldest first; takes no lock itself.

    ``ours`` are the pids of our own other connections, which are left out.
    """
    wanted = joined([statement("({schema}, {table})", schema=s, table=t) for s, t in tables])
    mine = statement("{pids}::int[]", pids=list(ours))
    rows = execute(conn, statement(_HOLDERS, wanted=wanted, ours=mine)).all()
    return [LockHolder(*row) for row in rows]


def lock_table(schema: str, table: str, mode: str, *, partitions: bool = False) -> Statement:
    """LOCK TABLE, for this table alone unless its ``partitions`` are to be locked too."""
    return statement(
        "LOCK TABLE {only}{table} IN {mode} MODE",
        only=sql.SQL("" if partitions else "ONLY "),
        table=name(schema, table),
        mode=sql.SQL(mode),
    )


class Attempt:
    """One short transaction on ``conn``; a lock that it cannot get ends it without an error."""

    def __init__(self, locks: Locks, conn: Connection, wait_s: float) -> None:
        self._locks = locks
        self._conn = conn
        self.wait_s = wait_s
        self.began = time.monotonic()
        self.asked = self.began
        self.succeeded = False
        self.why: LockConflict | None = None

    @property
    def left_s(self) -> float:
        """Seconds left of the time that others may have to wait for this attempt."""
        return max(self.wait_s - (time.monotonic() - self.asked), 0.0)

    def asks_now(self) -> None:
        """Call it after preliminary checks: others wait only from here on."""
        self.asked = time.monotonic()

    def __enter__(self) -> Connection:
        self._transaction = self._conn.begin()
        begin(self._conn, lock_timeout_ms=max(1, round(self.wait_s * 1000)))
        # Sessions behind our lock need not wait for the disk too: any later commit flushes ours with it, so
        # after a crash both are there, or neither.
        execute(self._conn, statement("SELECT set_config('synchronous_commit', 'off', true)"))
        return self._conn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if error is None:
                self._transaction.commit()
                self.succeeded = True
                return False
            if self._transaction.is_active:
                self._transaction.rollback()
        except DBAPIError as second:
            if error is None and is_lock_failure(second):
                return True
            if error is None:
                raise
        finally:
            self._locks.last_s = time.monotonic() - self.asked
            self._locks.longest_s = max(self._locks.longest_s, self._locks.last_s)
        if isinstance(error, BlockedError):
            self.why = error.conflict
            return True
        return isinstance(error, DBAPIError) and is_lock_failure(error)


class Locks:
    """Attempts at strong locks: ``for attempt in locks.attempts(...): with attempt as conn: ...``.

    ``on_blocked`` is called for each failed attempt; it may raise to give up. ``longest_s`` is the longest
    that any attempt took from the moment it asked for the strong lock, waiting and working together: no
    session can have waited behind one of ours for longer; ``last_s`` is that of the last attempt.
    """

    def __init__(
        self, patience: Patience | None = None, on_blocked: Callable[[LockConflict, int], None] | None = None
    ) -> None:
        self.patience = patience or Patience()
        self.longest_s = 0.0
        self.last_s = 0.0
        self._on_blocked = on_blocked or (lambda conflict, attempt: None)

    def attempts(self, conn: Connection, tables: Tables, ours: tuple[int, ...] = ()) -> Iterator[Attempt]:
        """Attempts until one has committed. Raises LockUnavailableError when all are used up."""
        for number in range(1, self.patience.attempts + 1):
            attempt = Attempt(self, conn, self.patience.wait_s(number))
            yield attempt
            if attempt.succeeded:
                return
            conflict = attempt.why or self._held(conn, tables, ours)
            if number < self.patience.attempts:
                self._on_blocked(conflict, number)
                self.patience.sleep(self.patience.pause_s(number))
                self._wait_for_a_gap(conn, tables, ours)
        raise LockUnavailableError(f"gave up {conflict} ({number} attempts)")

    def _wait_for_a_gap(self, conn: Connection, tables: Tables, ours: tuple[int, ...]) -> None:
        """Wait until one of the holders has let go: the best moment to ask is before it comes back.

        Two readers with overlapping queries may never leave a gap by themselves; one that comes back while we
        ask must wait, and falls into step with the other.
        """
        before: set[int] | None = None
        for _ in range(round(self.patience.longest_pause_s / _POLL_S)):
            with transaction(conn):
                now = {h.pid for h in lock_holders(conn, tables, ours) if h.pid is not None}
            if not now or (before is not None and before - now):
                return
            before = now if before is None else before | now
            self.patience.sleep(_POLL_S)

    def _held(self, conn: Connection, tables: Tables, ours: tuple[int, ...]) -> LockConflict:
        with transaction(conn):
            holders = lock_holders(conn, tables, ours)
        what = f"a lock on {' and '.join(dict.fromkeys(table for _, table in tables))}"
        gone = "a session that has since gone"
        held_by = "; ".join(map(str, holders[:3])) or gone
        first = holders[0] if holders else None
        return LockConflict(
            f"waiting for {what}, held by {held_by}",
            what,
            first.who if first else gone,
            first.remedy if first else "",
        )
