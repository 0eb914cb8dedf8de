"""The commands that messages tell the operator to type, in one place.

A command names its table, quoted for the shell, unless that is the only one configured.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from shlex import quote

from chronos.errors import RefusedError
from chronos.settings import get_settings
from chronos.table import WEBHOOK_LOG, TableSpec

# As it was started: with pipx or uvx, `python` in a shell is not the Python that has chronos.
INSTALLED = PurePath(sys.argv[0]).name == "chronos"
PROGRAM = "chronos" if INSTALLED else "python -m chronos"
SCRIPT = f"{PROGRAM} migrate" if INSTALLED else f"{PROGRAM}.scripts.migrate_to_partitioned_webhook_log"


def migrate(table: TableSpec) -> str:
    """The command that migrates ``table``; ``--resume`` may follow."""
    if table.name == WEBHOOK_LOG.name and _only(table):
        return SCRIPT
    return _verb("migrate", table)


def start(table: TableSpec) -> str:
    """The command that starts a migration; it describes a table that no configuration lists."""
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
    """The command that shows the state of every configured table, or of one that is not configured."""
    command = f"{PROGRAM} status"
    return command if table is None or _listed(table) else f"{command} {quote(table.typed)}"


def upkeep() -> str:
    """The command that cron runs once a night."""
    return f"{PROGRAM} upkeep"


def upgrade_functions(table: TableSpec) -> str:
    """The command that installs the SQL functions of ``table`` again."""
    return _verb("upgrade-functions", table)


def _verb(verb: str, table: TableSpec) -> str:
    command = f"{PROGRAM} {verb}"
    return command if _only(table) else f"{command} {quote(table.typed)}"


def _only(table: TableSpec) -> bool:
    """Whether TABLE may be left out: it is the only one configured."""
    return len(_configured()) == 1 and _listed(table)


def _listed(table: TableSpec) -> bool:
    return any(
        spec.name == table.name and (None in (spec.schema, table.schema) or spec.schema == table.schema)
        for spec in _configured()
    )


def _configured() -> tuple[TableSpec, ...]:
    """The configured tables; none if the configuration cannot be read: this is for messages only."""
    try:
        return get_settings().tables
    except RefusedError:
        return ()
