"""Old snapshots: who could still see the tables as they were before our last commit.

A REPEATABLE READ transaction whose snapshot is older than the last replayed rows would not see them in the
table that takes the name. So the swap waits until no such snapshot is left. pg_stat_activity does not show
when a snapshot was taken, only the oldest transaction that was running then: a session no longer counts once
it has no snapshot, a later one, or another transaction. A single statement counts too, as a function that it
calls may read the table later; a session that waits for a lock of ours does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.engine import Connection

from chronos.db import execute, statement
from chronos.locks import LockConflict


@dataclass(frozen=True)
class Snapshot:
    """A session with a snapshot: ``xmin`` is the oldest transaction that was running when it was taken."""

    pid: int
    xact_start: str
    xmin: int
    application: str
    seconds: float
    has_lock: bool

    def as_conflict(self) -> LockConflict:
        """Why the swap waits for it, and what would end it."""
        who = f"pid {self.pid}" + (f" ({self.application})" if self.application else "")
        remedy = f"SELECT pg_terminate_backend({self.pid})"
        return LockConflict(
            f"waiting for {who}, whose transaction of {self.seconds:.0f} s may not see the last changes;"
            f" {remedy} would end it",
            "an old snapshot",
            who,
            remedy,
        )


_SNAPSHOTS = """
SELECT a.pid, coalesce(a.xact_start::text, ''), a.backend_xmin::text::bigint,
       coalesce(a.application_name, ''),
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::float8,
       EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.granted
               AND l.relation = to_regclass(format('%I.%I', {schema}, {table})))
FROM pg_stat_activity a
WHERE a.datname = current_database() AND a.backend_xmin IS NOT NULL
  AND a.pid <> pg_backend_pid() AND NOT a.pid = ANY ({ours}::int[])
  AND a.backend_type NOT IN ('autovacuum worker', 'walsender')
  AND NOT EXISTS (SELECT FROM pg_stat_progress_vacuum v WHERE v.pid = a.pid)
  AND CASE WHEN coalesce(a.wait_event_type, 'Lock') = 'Lock'
           THEN NOT pg_blocking_pids(a.pid) && {ours}::int[] ELSE true END
"""


def snapshots(conn: Connection, schema: str, table: str, ours: tuple[int, ...]) -> list[Snapshot]:
    """All snapshots but ours, and whether each session has a lock on the table; takes no lock."""
    rows = execute(conn, statement(_SNAPSHOTS, schema=schema, table=table, ours=list(ours))).all()
    return [Snapshot(*row) for row in rows]


def still_there(before: list[Snapshot], now: list[Snapshot]) -> list[Snapshot]:
    """Those of ``before`` that may still be the same snapshot ``now``."""
    current = {(s.pid, s.xact_start): s.xmin for s in now}
    return [s for s in before if current.get((s.pid, s.xact_start), s.xmin + 1) <= s.xmin]
