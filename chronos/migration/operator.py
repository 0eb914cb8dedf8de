"""One operator at a time: who may change the table, how they are told things, and how they call it off."""

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

# A lock that stands between a finished copy and its swap is worth waiting for: about an hour.
AN_HOUR = 900


# A terminal that goes (SIGHUP) asks to stop as well, unless it was to be outlived, as under nohup.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Have every signal that asks to stop handled like this while the block runs."""
    stops = [n for n in _STOPS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in stops}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class StopRequestedError(Exception):
    """The operator asked to stop; raised at the next point where stopping is clean."""


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
        """Attempts at locks that tell the operator who is waited for, and end when asked to."""

        def on_blocked(conflict: LockConflict, attempt: int) -> None:
            self.output.waiting(conflict, attempt)
            if may_stop:
                self.check_stop()

        return Locks(replace(self.patience, attempts=attempts or self.patience.attempts), on_blocked)


def at_work_key(table: TableSpec) -> Statement:
    """The key of the advisory lock of whoever is at work on a located table."""
    return statement("hashtextextended({text}, 0)", text=f"chronos migration of {table.home}.{table}")


def asking_key(table: TableSpec) -> Statement:
    """The key of the advisory lock of whoever has still to be asked about it."""
    return statement("hashtextextended({text}, 0)", text=f"chronos asks about {table.home}.{table}")


def _holder(conn: Connection, key: Statement) -> str | None:
    found: str | None = execute(conn, statement(_HOLDER, key=key)).scalar()
    return found


def at_work(conn: Connection, table: TableSpec) -> str | None:
    """Who is at work on a located table, and not only asked whether to begin; looks, and takes no lock."""
    asked = _holder(conn, asking_key(table))
    return None if asked else _holder(conn, at_work_key(table))


@contextmanager
def sole_operator(engine: Engine, table: TableSpec) -> Iterator[tuple[Connection, TableSpec]]:
    """A connection and the table with its schema, with the operator's lock held while the block runs.

    The lock is an advisory one in an open transaction of a connection of its own, not in a session,
    so that it also holds behind a pooler that hands out server connections by the transaction. It
    holds no snapshot: VACUUM is not kept back. Raises RefusedError when there is no such table, or
    when somebody else holds the lock, naming them.
    """
    with opened(engine) as conn, opened(engine) as holding:
        located = require_located(conn, table)
        key = at_work_key(located)
        holding.begin()
        mine = execute(holding, statement(_TAKE, key=key, no_timeout=no_transaction_timeout())).scalar_one()
        if not mine:
            raise RefusedError(
                f"somebody else is at work on {table} ({_holder(holding, key) or 'just gone'});"
                " nothing was changed. Wait until they are done"
            )
        yield conn, located


@contextmanager
def asking(conn: Connection, table: TableSpec) -> Iterator[None]:
    """While the block asks a person, ``status`` sees that nobody is at work on the located ``table`` yet.

    It holds another advisory lock, in a transaction without a snapshot that ends with the block.
    """
    with transaction(conn):
        execute(conn, statement("SELECT pg_advisory_xact_lock_shared({key})", key=asking_key(table)))
        yield


@contextmanager
def going_on_with(command: str, work: str, engine: Engine, table: TableSpec) -> Iterator[None]:
    """Whatever ends ``work`` half-way becomes an InterruptedRunError that names the command to go on with."""
    try:
        yield
    except SupersededError as error:
        raise InterruptedRunError(f"{error}; that run goes on") from error
    except InterruptedRunError:
        raise
    except (StopRequestedError, KeyboardInterrupt, DBAPIError, ChronosError) as error:
        stopped = isinstance(error, StopRequestedError)
        why = "was stopped as asked" if stopped else f"was cut off: {one_line(error)}"
        raise InterruptedRunError(
            f"the {work} {why}; nothing is lost. {where(engine, table)} Go on with: {command}"
        ) from error
