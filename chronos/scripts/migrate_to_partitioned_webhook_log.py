"""The documented command for the migration; the same as ``python -m chronos migrate webhook_log``."""

import sys

from chronos.cli import migrate
from chronos.commands import SCRIPT
from chronos.table import WEBHOOK_LOG

if __name__ == "__main__":
    migrate(args=[WEBHOOK_LOG.name, *sys.argv[1:]], prog_name=SCRIPT)
