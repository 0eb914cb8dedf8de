"""What to type: the commands that messages name, written in one place.

A command names its table, in quotes where the shell needs them, unless it is the only one that is configured.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from shlex import quote

from chronos.errors import RefusedError
from chronos.settings import get_settings
from chronos.table import WEBHOOK_LOG, TableSpec

# As it was started: where pipx or uvx has put the command, this Python is not the one that a shell finds.
INSTALLED = PurePath(sys.argv[0]).name == "chronos"
PROGRAM = "chronos" if INSTALLED else "python -m chronos"
SCRIPT = f"{PROGRAM} migrate" if INSTALLED else f"{PROGRAM}.scripts.migrate_to_partitioned_webhook_log"


def migrate(table: TableSpec) -> str:
    """The command that migrates ``table``; ``--resume`` may follow."""
    if table.name == WEBHOOK_LOG.name and _only(table):
        return SCRIPT
    return _verb("migrate", table)


def start(table: TableSpec) -> str:
    """The command that begins a migration: a table that is in no configuration needs to be described."""
    command = migrate(table)
    if _listed(table):
        return command
    command += f" --column {quote(table.column)} --every {table.every}"
    if table.retention_days is not None:
        command += f" --retention-days {table.retention_days}"
    return f"{command} --ahead-days {table.ahead_days}"


def rollback(table: TableSpec) -> str:
    """The command that goes back to the plain table."""
    return _verb("rollback", table)


def finalize(table: TableSpec) -> str:
    """The command that drops the old table."""
    return _verb("finalize", table)


def status(table: TableSpec | None = None) -> str:
    """The command that says how things stand: with every configured table, or with one that is in no file."""
    command = f"{PROGRAM} status"
    return command if table is None or _listed(table) else f"{command} {quote(table.typed)}"


def upkeep() -> str:
    """The command that cron gives once a night."""
    return f"{PROGRAM} upkeep"


def upgrade_functions(table: TableSpec) -> str:
    """The command that installs the SQL functions of ``table`` again."""
    return _verb("upgrade-functions", table)


def _verb(verb: str, table: TableSpec) -> str:
    command = f"{PROGRAM} {verb}"
    return command if _only(table) else f"{command} {quote(table.typed)}"


def _only(table: TableSpec) -> bool:
    """Whether TABLE may be left out: it is the only one that is configured."""
    return len(_configured()) == 1 and _listed(table)


def _listed(table: TableSpec) -> bool:
    return any(
        spec.name == table.name and (None in (spec.schema, table.schema) or spec.schema == table.schema)
        for spec in _configured()
    )


def _configured() -> tuple[TableSpec, ...]:
    """The tables of the configuration; none when it cannot be read, for a message is being written."""
    try:
        return get_settings().tables
    except RefusedError:
        return ()
