"""One operator at a time: who may change the table, what they are told, and how they stop it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from chronos.catalog.locate import require_located
from chronos.db import Statement, execute, no_transaction_timeout, one_line, opened, statement, transaction
from chronos.errors import ChronosError, InterruptedRunError, RefusedError, SupersededError
from chronos.locks import LockConflict, Locks, Patience
from chronos.migration.console import Output
from chronos.migration.state import where
from chronos.table import TableSpec

_TAKE = """
SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL search_path = pg_catalog, pg_temp;
SELECT set_config('idle_in_transaction_session_timeout', '0', true), {no_timeout};
SELECT pg_try_advisory_xact_lock({key})
"""

_HOLDER = """
SELECT format('pid %s, user %s', a.pid, coalesce(a.usename, 'unknown'))
    || coalesce(', from ' || coalesce(host(a.client_addr), 'a local socket') || ' since '
                || to_char(a.backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') || ' UTC', '')
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
  AND l.classid::bigint = ({key} >> 32) & 4294967295
  AND l.objid::bigint = {key} & 4294967295
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

# When only a lock is missing between a finished copy and its swap, it is worth waiting: about an hour.
AN_HOUR = 900


# A terminal that closes (SIGHUP) also asks to stop, unless the run was meant to outlive it, as under nohup.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle every signal that asks to stop with ``handler`` while the block runs."""
    stops = [n for n in _STOPS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in stops}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class StopRequestedError(Exception):
    """The operator asked to stop; raised at the next clean point."""


@dataclass
class Operator:
    """The person at the keyboard: reads ``output``, and may set ``stop`` at any moment."""

    output: Output
    stop: threading.Event = field(default_factory=threading.Event)
    patience: Patience = field(default_factory=Patience)

    def check_stop(self) -> None:
        """Raise StopRequestedError once ``stop`` is set."""
        if self.stop.is_set():
            raise StopRequestedError

    def locks(self, attempts: int | None = None, *, may_stop: bool = True) -> Locks:
        """Attempts at locks that tell the operator who is in the way, and end when asked to."""

        def on_blocked(conflict: LockConflict, attempt: int) -> None:
            self.output.waiting(conflict, attempt)
            if may_stop:
                self.check_stop()

        return Locks(replace(self.patience, attempts=attempts or self.patience.attempts), on_blocked)


def at_work_key(table: TableSpec) -> Statement:
    """The key of the advisory lock held while somebody works on a located table."""
    return statement("hashtextextended({text}, 0)", text=f"chronos migration of {table.home}.{table}")


def asking_key(table: TableSpec) -> Statement:
    """The key of the advisory lock held while somebody is still asked to confirm."""
    return statement("hashtextextended({text}, 0)", text=f"chronos asks about {table.home}.{table}")


def _holder(conn: Connection, key: Statement) -> str | None:
    found: str | None = execute(conn, statement(_HOLDER, key=key)).scalar()
    return found


def at_work(conn: Connection, table: TableSpec) -> str | None:
    """Who is working on a located table, not counting an open confirmation prompt. Takes no lock."""
    asked = _holder(conn, asking_key(table))
    return None if asked else _holder(conn, at_work_key(table))


@contextmanager
def sole_operator(engine: Engine, table: TableSpec) -> Iterator[tuple[Connection, TableSpec]]:
    """A connection and the table with its schema, with the operator's lock held while the block runs.

    It is an advisory lock in an open transaction of a connection of its own, not a session lock, so that it
    also works behind a pooler in transaction mode. It holds no snapshot, so it does not hold back VACUUM.
    Raises RefusedError when there is no such table, or when somebody else holds the lock, naming them.
    """
    with opened(engine) as conn, opened(engine) as holding:
        located = require_located(conn, table)
        key = at_work_key(located)
        holding.begin()
        mine = execute(holding, statement(_TAKE, key=key, no_timeout=no_transaction_timeout())).scalar_one()
        if not mine:
            raise RefusedError(
                f"somebody else is working on {table} ({_holder(holding, key) or 'just finished'});"
                " nothing was changed. Wait until they are done"
            )
        yield conn, located


@contextmanager
def asking(conn: Connection, table: TableSpec) -> Iterator[None]:
    """While the block asks the operator, ``status`` sees that nobody is working on the located ``table`` yet.

    It holds another advisory lock, in a transaction without a snapshot that ends with the block.
    """
    with transaction(conn):
        execute(conn, statement("SELECT pg_advisory_xact_lock_shared({key})", key=asking_key(table)))
        yield


@contextmanager
def resumable_with(command: str, work: str, engine: Engine, table: TableSpec) -> Iterator[None]:
    """If ``work`` ends half-way, raise an InterruptedRunError that names the command to carry on with."""
    try:
        yield
    except SupersededError as error:
        raise InterruptedRunError(f"{error}; that run continues") from error
    except InterruptedRunError:
        raise
    except (StopRequestedError, KeyboardInterrupt, DBAPIError, ChronosError) as error:
        stopped = isinstance(error, StopRequestedError)
        why = "was stopped as asked" if stopped else f"was interrupted: {one_line(error)}"
        raise InterruptedRunError(
            f"the {work} {why}; nothing is lost. {where(engine, table)} Carry on with: {command}"
        ) from error
