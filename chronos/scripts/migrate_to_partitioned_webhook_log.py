"""The documented way to start the migration; the same as ``python -m chronos migrate``."""

from chronos.cli import migrate
from chronos.commands import migrate as command
from chronos.table import WEBHOOK_LOG

if __name__ == "__main__":
    migrate(prog_name=command(WEBHOOK_LOG))
