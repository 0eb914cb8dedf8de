"""The documented way to start the migration; the same as ``python -m chronos migrate``."""

from chronos.cli import migrate
from chronos.migration.preflight import COMMAND

if __name__ == "__main__":
    migrate(prog_name=COMMAND)
