"""Compare the configuration of a table with its partitions or, while it is plain, with its migration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sqlalchemy.engine import Connection

from chronos.catalog.partitions import scheme
from chronos.db import execute, statement, transaction
from chronos.errors import RefusedError
from chronos.migration import state as states
from chronos.settings import CONFIGURATION
from chronos.table import TableSpec, quoted


def as_it_is(conn: Connection, table: TableSpec) -> TableSpec:
    """``table`` with the column and interval of its partitions or, while it is plain, of its migration.

    If neither is known, ``table`` is returned unchanged. The configured interval wins while any of the newest
    few partitions has it. Call it inside ``db.transaction``; it takes ACCESS SHARE on the state of the
    migration, if the role may read that.
    """
    column, widths = scheme(conn, table)
    if column is not None:
        every = table.every if table.every in widths or not widths else widths[0]
        return replace(table, column=column, every=every)
    readable = statement(
        "SELECT has_table_privilege(to_regclass(format('%I.%I', {s}, {t})), 'SELECT')"
        " AND has_schema_privilege({s}, 'USAGE')",
        s=table.home,
        t=table.state,
    )
    found = states.read(conn, table) if execute(conn, readable).scalar_one() else None
    if found is None or states.undone_by_hand(conn, found):
        return table
    return replace(table, column=found.table.column, every=found.table.every)


def contradictions(table: TableSpec, real: TableSpec, listed_in: Path | None) -> list[str]:
    """What ``listed_in`` gets wrong about ``table``, one sentence each; None: no file lists the table."""
    found = []
    for what, said, truth, but in (
        ("column", table.column, real.column, f"it is partitioned by {quoted(real.column)}"),
        ("every", table.every.value, real.every.value, f"its partitions are {real.every}s"),
    ):
        if said == truth:
            continue
        line = f'{what} = "{truth}"'
        if listed_in is None:
            found.append(
                f'without {CONFIGURATION}, {what} = "{said}" is assumed for {real.typed}, but {but};'
                f" list it there, with {line}"
            )
        else:
            found.append(f"{listed_in} says {said} for {real.typed}, but {but}; put {line} there")
    return found


def require_agreement(conn: Connection, table: TableSpec, listed_in: Path | None) -> None:
    """Raise RefusedError when the configuration is wrong about a located ``table``. No lock on the table."""
    with transaction(conn):
        found = contradictions(table, as_it_is(conn, table), listed_in)
    if found:
        raise RefusedError(f"{'; '.join(found)}; nothing was changed")
