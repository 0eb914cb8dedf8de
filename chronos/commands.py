"""What to type: the commands that messages name, written in one place."""

from __future__ import annotations

from shlex import quote

from chronos.table import WEBHOOK_LOG, TableSpec


def migrate(table: TableSpec) -> str:
    """The command that migrates ``table``; ``--resume`` may follow."""
    if table.name == WEBHOOK_LOG.name:
        return "python -m chronos.scripts.migrate_to_partitioned_webhook_log"
    return _verb("migrate", table)


def rollback(table: TableSpec) -> str:
    """The command that goes back to the plain table."""
    return _verb("rollback", table)


def finalize(table: TableSpec) -> str:
    """The command that drops the old table."""
    return _verb("finalize", table)


def status() -> str:
    """The command that says how things stand."""
    return "python -m chronos status"


def upgrade_functions(table: TableSpec) -> str:
    """The command that installs the SQL functions of ``table`` again."""
    return _verb("upgrade-functions", table)


def _verb(verb: str, table: TableSpec) -> str:
    command = f"python -m chronos {verb}"
    return command if table.name == WEBHOOK_LOG.name else f"{command} {quote(table.name)}"
