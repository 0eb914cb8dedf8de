"""What the operator sees before a verb begins: where it will work, on which table, and what it will do."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError

from chronos.db import is_lock_failure, opened, transaction
from chronos.migration.checks import Survey
from chronos.migration.console import ago, counted, in_bytes
from chronos.migration.old_and_new import weigh
from chronos.migration.run import Options
from chronos.migration.state import Phase, State, describe, what_becomes_of
from chronos.settings import Settings
from chronos.table import TableSpec, quoted


def beginning(
    url: URL, found: Survey, lock_wait_s: float, settings: Settings | None = None, *, hold: bool = False
) -> str:
    """Before a migration begins."""
    facts, what = _announcement(found, hold=hold)
    return f"{_head(url, found.spec, facts, settings)}\n{what}\n{_lock_wait(lock_wait_s)}"


def resuming(engine: Engine, found: State, options: Options, settings: Settings) -> str:
    """Before a migration is resumed with ``options``. ACCESS SHARE on the table, waiting at most 1 s."""
    facts = (
        f"{_weight(engine, found.table)}\n"
        f"Started: {found.plan.started_at:%Y-%m-%d %H:%M} UTC   Phase: {found.phase}"
        f"{f'   Options: {options}' if str(options) else ''}"
    )
    what = f"{describe(found)}\n{_what_is_left(found, hold=options.hold)}"
    return f"{_head(engine.url, found.table, facts, settings)}\n{what}\n{_lock_wait(options.max_lock_wait)}"


def going_back(url: URL, found: State, settings: Settings, *, by_hand: bool) -> str:
    """Before a rollback; ``by_hand``: somebody has already put the plain table back."""
    table = quoted(found.table.name)
    what = f"{table} was put back by hand, and stays as it is; what is left of the migration will be removed."
    if found.phase is Phase.UNDONE:
        what = describe(found)
    elif not by_hand:
        since = ", with every row written since the swap" if found.phase.swapped else ""
        what = f"{describe(found)}\n{table} will be the plain table again{since}."
    return f"{_head(url, found.table, settings=settings)}\n{what}"


def finalizing(engine: Engine, found: State, settings: Settings, *, old_is_there: bool) -> str:
    """Before a finalize. ACCESS SHARE on both tables, waiting at most 1 s."""
    what = _what_finalize_drops(engine, found, old_is_there=old_is_there)
    return f"{_head(engine.url, found.table, settings=settings)}\n{what}"


def _head(url: URL, table: TableSpec, facts: str = "", settings: Settings | None = None) -> str:
    """Where a verb will work, and on which table; never the password."""
    testing = "" if settings is None else f"   TESTING: {str(settings.testing).lower()}"
    return (
        f"Host: {url.host or 'local socket'}   Port: {url.port or 5432}   Database: {url.database}\n"
        f"User: {url.username or 'the system user'}{testing}\n"
        f"Table: {table.typed}{f'   {facts}' if facts else ''}"
    )


def _lock_wait(seconds: float) -> str:
    return f"Writers wait for a lock at most {seconds:g} s at a time (--max-lock-wait)."


def _weighed(engine: Engine, table: TableSpec) -> tuple[datetime, dict[str, tuple[int, int]]] | None:
    """What ``weigh`` finds, under ACCESS SHARE, waiting at most 1 s; None: a table is locked."""
    with opened(engine) as conn:
        try:
            with transaction(conn, lock_timeout_ms=1_000):
                return weigh(conn, table)
        except DBAPIError as error:
            if not is_lock_failure(error):
                raise
            return None


def _weight(engine: Engine, table: TableSpec) -> str:
    """Rows and bytes of the table in use."""
    found = _weighed(engine, table)
    if found is None:
        return "Size: unknown, because somebody has locked it"
    rows, size = found[1][table.name]
    return f"Rows (estimate): {rows:,}   Size: {in_bytes(size)}"


def _announcement(found: Survey, *, hold: bool = False) -> tuple[str, str]:
    """What is known about a table to be migrated, and what will be done to it."""
    table, since = found.spec, f"{found.cutoff:%Y-%m-%d %H:%M} UTC"
    at_last = _at_last(table, hold, attaches=found.attaches)
    if found.attaches:
        what = (
            f"Nothing is copied: partitions are built from {since} on;\n"
            f"{quoted(table.name)} gets an index and a check;\n{at_last}"
        )
    else:
        rows = "Every row is" if table.retention_days is None else f"The rows since {since} are"
        what = f"{rows} copied into partitions beside it\nand compared; {at_last}"
    return f"Rows (estimate): {found.rows_estimate:,}   Size: {in_bytes(found.bytes)}", what


def _at_last(table: TableSpec, hold: bool, *, attaches: bool = False) -> str:
    if hold:
        return "no name changes yet."
    if attaches:
        return (
            f"then it is renamed to {quoted(table.history)}\n"
            "and becomes the partition for all rows before that."
        )
    return (
        f"then {quoted(table.name)} is renamed to {quoted(table.old)},\n"
        "and the partitioned table takes its name."
    )


def _what_is_left(found: State, *, hold: bool) -> str:
    """What ``migrate --resume`` will do."""
    table = found.table
    if found.phase is Phase.RETURNING:
        return f"The rollback is called off: {table} stays partitioned, with everything that was written."
    if found.plan.attaches:
        if found.phase.swapped:
            return "The foreign keys of the partitions become part of those of the whole table."
        left = "It is ready" if found.phase is Phase.READY else "It gets an index and a check"
        return f"{left}." if hold else f"{left}; then it becomes the partition {quoted(table.history)}."
    if found.phase.swapped:
        return "The rows written during the migration are compared once more."
    ready = found.phase is Phase.READY
    left = "What was written meanwhile is replayed" if ready else "The rest is copied and compared"
    return f"{left}; {_at_last(table, hold)}"


def _what_finalize_drops(engine: Engine, found: State, *, old_is_there: bool) -> str:
    if not old_is_there:
        return (
            f"{quoted(found.plan.former)} is already dropped; what is left of the migration will be removed."
        )
    if found.plan.attaches:
        return (
            f"{describe(found)}\nNothing is dropped, and there is no way back afterwards.\n"
            f"{what_becomes_of(found.plan)}."
        )
    with_it = ""
    if found.table.retention_days is not None:
        with_it = f", and with it every row from\nbefore {found.plan.cutoff:%Y-%m-%d %H:%M} UTC"
    return (
        f"{describe(found)}\n{_old_and_new(engine, found)}\n"
        f"{quoted(found.table.old)} will be dropped for good{with_it}."
    )


def _old_and_new(engine: Engine, found: State) -> str:
    """How much both tables hold, and how long ago the swap was."""
    weighed = _weighed(engine, found.table)
    if weighed is None:
        return "The sizes are unknown: somebody has locked one of the tables."
    now, sizes = weighed
    lines = [
        f"{quoted(relation)}: {counted(rows, 'row')} (estimate), {in_bytes(size)}"
        for relation, (rows, size) in sizes.items()
    ]
    if found.fence is not None:
        lines.append(f"swapped {ago(now - found.fence)}")
    return "\n".join(lines)
